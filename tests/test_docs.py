"""What docs/ and the README show runs as it is written."""

import json
import re
import runpy
import shlex
from functools import wraps
from importlib import import_module
from pathlib import Path

import pytest
from published import PUBLISHED

from minilora.__main__ import COMMANDS, SUBCOMMANDS, main
from minilora.settings import resolve
from minilora.tools.plan import forecast

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COURSE = sorted((ROOT / "docs" / "course").glob("*.md"))


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


BLOCKS = blocks(ROOT / "docs" / "python.md")


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_runs_as_written(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "block.py").write_text(BLOCKS[number])
    runpy.run_path(str(tmp_path / "block.py"), {"DIR": ROOT / "minilora/demo/mini"})


@pytest.mark.parametrize("page", COURSE, ids=lambda p: p.stem)
def test_a_page_of_the_course_runs_from_top_to_bottom(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names = {"DIR": ROOT / "minilora/demo/mini"}
    for block in blocks(page):
        exec(compile(block, page.name, "exec"), names)  # noqa: S102 our own pages
    assert page.read_text().count("\n## ") == 1 and re.findall(
        r"^(\d)\. ", page.read_text().partition("## ")[2], re.MULTILINE
    ) == ["1", "2", "3"]


def commands(page: Path) -> list[str]:
    """The minilora commands of a page's indented blocks, without their comments."""
    lines = [line for line in page.read_text().splitlines() if line.startswith("    ")]
    words = [re.split(r"\s+#", line)[0].strip() for line in lines]
    return [word for word in words if word.startswith("minilora ") and word.split()[1] in COMMANDS]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_flag_of_a_command_is_there(page: Path, monkeypatch: pytest.MonkeyPatch):
    """Parsed as the command line parses them; none is carried out."""
    parsed = []
    for command in commands(page):
        _, name, kind, *_ = command.split()
        module = import_module(f"minilora.cli.{name}_{kind}" if name in SUBCOMMANDS else f"minilora.cli.{name}")
        monkeypatch.setattr(module, "run", wraps(module.run)(lambda **given: parsed.append(given)))
        assert main(shlex.split(command)[1:]) == 0 and parsed, command
        parsed.clear()


def test_a_link_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
        for target in re.findall(r"`((?:bench|docs|minilora|models|kernels|tests)/[\w/.-]+\.\w+)`", page.read_text()):
            assert (ROOT / target).exists(), (page.name, target)


@pytest.mark.long
@pytest.mark.parametrize("name", ["Qwen2.5-7B", "ChatGLM-6B", "GLM-4-9B", "Qwen3-32B"])
def test_what_fits_is_what_plan_says(name: str, tmp_path: Path):
    """The table of docs/quantised.md."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name][1]))
    settings = {"model": str(tmp_path), "quant": "nf4", "lora_r": 8, "batch_size": 1, "checkpointing": True}
    found = forecast(resolve(settings), 8)
    sizes = [f"{found['memory'][part] / 1e9:.2f}" for part in ("weights", "total")]
    cells = [f"{card['checkpointing']:,} ({card['kept']:,})" for card in found["cards"]]
    assert f"| {' | '.join([name, *sizes, *cells])} |" in (ROOT / "docs" / "quantised.md").read_text()
