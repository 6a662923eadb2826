"""What docs/ and the README show runs as it is written."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
from functools import wraps
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from published import PUBLISHED
from torch.distributed.run import parse_args

from minilora.__main__ import COMMANDS, SUBCOMMANDS, main
from minilora.checkpoint.load import FAMILIES
from minilora.cli.arguments import add_arguments
from minilora.cli.parser import Parser
from minilora.ranks.cost import LINKS
from minilora.ranks.scale import NF4_BITS, SHAPES, Costs
from minilora.settings import resolve
from minilora.tools.plan import forecast

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "README.zh.md", *sorted((ROOT / "docs").rglob("*.md"))]
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


def test_the_chinese_readme_shows_commands_of_the_english_one():
    assert len(commands(ROOT / "README.zh.md")) > 6
    assert set(commands(ROOT / "README.zh.md")) <= set(commands(ROOT / "README.md"))


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


# docs/scale.md


@pytest.mark.long
def test_what_a_card_has_room_for_is_what_plan_says(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Qwen3-32B"][1]))
    found = forecast(resolve({"model": str(tmp_path), "lora_r": 16, "checkpointing": True}), 80, gpus=8)
    assert f"streams of up to {found['most_tokens']:,} tokens" in (ROOT / "docs" / "scale.md").read_text()


RATES = {link.name: link.rate for link in LINKS}
BETWEEN = ("8 x 400 Gb/s", "400 Gb/s", "100 Gb/s")  # machines


def costs(name: str, bits: float, shard: bool, cards: int) -> Costs:
    targets = "attention" if SHAPES[name].experts > 1 else "all-linear"
    return SHAPES[name].costs(cards, 8192, 16, targets, bits, shard, documents=4)


def scale_rows() -> list[str]:
    """The table of models and cards, by the cost model."""
    bases = [
        ("Qwen2.5-7B", "bf16, whole", 16, False), ("Qwen3-32B", "bf16, whole", 16, False), ("Qwen3-32B", "bf16, shared", 16, True),
        ("Qwen3-235B-A22B", "bf16, shared", 16, True), ("Qwen3-235B-A22B", "NF4, shared", NF4_BITS, True),
    ]  # fmt: skip
    rows = []
    for name, base, bits, shard in bases:
        for cards in (8, 64, 512) if shard else (1, 8, 64, 512):
            c = costs(name, bits, shard, cards)
            parts = c.base, c.buffers, c.adapters, c.inputs
            memory = f"{' + '.join(f'{part / 1e9:.1f}' for part in parts)} = {sum(parts) / 1e9:.1f}"
            inside = [f"{100 * c.step.efficiency('H100', RATES['NVLink, H100']):.1f}" if cards == 8 else ""]
            between = [f"{100 * c.step.efficiency('H100', RATES[link]):.1f}" if cards > 8 else "" for link in BETWEEN]
            step = f"{c.step.computing('H100'):.2f}", f"{c.step.reduced / 1e6:,.0f}", f"{c.step.gathered / 1e9:,.1f}"
            rows.append(f"| {' | '.join([name, base, str(cards), memory, *step, *inside, *between])} |")
    return rows


def hiding_rows() -> list[str]:
    """The table of the tokens that a stream needs, so that computing it takes as long as gathering the base, on many cards."""
    rows = []
    for name in ("Qwen3-32B", "Qwen3-235B-A22B"):
        for base, bits in (("bf16", 16), ("NF4", NF4_BITS)):
            step = costs(name, bits, True, 512).step
            rates = [RATES[link] for link in ("NVLink, H100", *BETWEEN)]
            tokens = [8192 * step.gathered / rate / step.computing("H100") for rate in rates]
            rows.append(f"| {' | '.join([name, base, *(f'{n:,.0f}' for n in tokens)])} |")
    return rows


def test_scale_is_what_the_cost_model_says():
    page = (ROOT / "docs" / "scale.md").read_text()
    assert [row for row in scale_rows() + hiding_rows() if row not in page] == []


def test_clusters_are_started_by_words_that_torchrun_takes():
    """Every torchrun of the pages, with the command that it starts; and the yaml and shell around them."""
    page = (ROOT / "docs" / "scale.md").read_text()
    slurm, kubernetes = (re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("bash", "yaml"))
    assert slurm and kubernetes
    subprocess.run(["bash", "-n"], input=slurm[1], text=True, check=True)
    service, job = yaml.safe_load_all(kubernetes[1])
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    lines = [container["args"][0], slurm[1], (ROOT / "README.md").read_text(), page]
    found = [
        line for text in lines for line in re.findall(r"torchrun [^`]*?-m minilora [^`#\n]*", text.replace("\\\n", " "))
    ]
    assert len(found) >= 4
    for line in found:
        words = shlex.split(re.sub(r"\$\(.*?\)|\$RESUME.*|\.\.\.", "", line))
        given = parse_args(words[1:])
        assert given.module and given.training_script == "minilora" and given.nproc_per_node == "8"
        command, *flags = given.training_script_args
        parser = Parser(prog="minilora", allow_abbrev=False)
        add_arguments(parser, import_module(f"minilora.cli.{command}").run)
        parser.parse_args(flags)


SERVE = (ROOT / "docs" / "serve.md").read_text()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The server of docs/serve.md, with another adapter on the demo's model, on a free port."""
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    from served import running

    import minilora
    from minilora.files.model_folder import ModelFolder
    from minilora.serve.server import open_models

    folder = tmp_path_factory.mktemp("serve") / "adapter"
    model = minilora.load_model(ROOT / "minilora/demo/mini", device="cpu")
    minilora.add_lora(model, r=2)
    minilora.save_adapter(model, folder)
    with running(open_models(ModelFolder(ROOT / "minilora/demo/mini"), {"archer": str(folder)}, device="cpu")) as (
        url,
        _,
    ):
        yield url


@pytest.mark.parametrize("block", re.findall(r"```bash\n(.*?)```", SERVE, re.DOTALL))
def test_curl_runs_as_written(block: str, served: str):
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    command = ["bash", "-ec", block.replace("http://127.0.0.1:8000", served)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "temprature" in block:
        assert f"    {told}\n" in SERVE
        return
    lines = [line.removeprefix("data: ") for line in told.splitlines() if line and line != "data: [DONE]"]
    assert lines and not any("error" in json.loads(line) for line in lines)


def test_the_openai_client_runs_as_written(served: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("openai")
    (block,) = re.findall(r"```python\n(.*?)```", SERVE, re.DOTALL)
    (tmp_path / "block.py").write_text(block.replace("http://127.0.0.1:8000", served))
    runpy.run_path(str(tmp_path / "block.py"))
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told] == ["mini", "archer"] and "Mini" in told[0]


def files_of(family: str) -> set[str]:
    """The source files that know a family: its module, those that import from it, and those that name its model_type."""
    module = FAMILIES[family].__name__.rpartition(".")[2]
    known = re.compile(rf'"{family}"|models\.{module} import|from \.{module} import')
    sources = [p for folder in ("minilora", "models") for p in (ROOT / folder).rglob("*.py")]
    found = {str(p.relative_to(ROOT)) for p in sources if known.search(p.read_text(encoding="utf-8"))}
    return found | {f"models/{module}.py"}


def test_the_files_of_each_family_are_counted():
    page = (ROOT / "docs" / "adding-a-family.md").read_text(encoding="utf-8")
    told = {family: int(n) for names, n in re.findall(r"^\| (`.+?`) \| (\d+) \|", page, re.MULTILINE) for family in re.findall(r"`(\w+)`", names)}  # fmt: skip
    assert told == {family: len(files_of(family)) for family in FAMILIES}
