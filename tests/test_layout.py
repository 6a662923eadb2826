"""The architecture: imports point down, one name per module, and nothing heavy before it is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# what a folder may import of ours; the order is the order of the layers
BELOW = {"kernels": ("minilora.kernels",), "models": ("minilora.kernels", "minilora.models"), "minilora": ("minilora",)}
THIRD_PARTY_OF_KERNELS = {"torch", "triton", "numpy"}
PEERS = {"transformers", "peft", "accelerate", "datasets"}
SOURCES = [
    p
    for folder in BELOW
    for p in sorted((ROOT / folder).rglob("*.py"))
    if not {"kernels", "models"} & set(p.relative_to(ROOT).parts[1:-1])  # the links in minilora/
]
every_source = pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
# private words that had a name in the field, and that name
OLD_WORDS = {
    "agree": "check_same", "card": "arch, or gpu", "check_before": "check_unlocked",
    "check_claim": "check_output", "drops": "dropout_args", "durable": "atomic",
    "foreign_flags": "alias_flags", "joint": "projections", "keep_heap": "tune_malloc", "key_dropout": "set_dropout_keys",
    "lay_together": "pack_weights", "low_gradients": "expand_backward", "lows": "shrink", "lora_narrow": "lora_shrink",
    "members": "per_projection_args", "once": "round_once", "problem_of": "verify_manifest",
    "seams": "cu_seqlens", "sight": "mask_spec", "staged_folder": "atomic_folder", "stretch": "logn_scale",
    "together": "packed_modules", "turn_kernel": "rotate_kernel", "turned": "rotated", "wider": "accum_dtype",
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Every module that a file imports anywhere in it, by its full name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = (parts if parts[0] == "minilora" else ("minilora", *parts))[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def within(name: str, modules: tuple[str, ...] | set[str]) -> bool:
    return any(name == m or name.startswith(m + ".") for m in modules)


@every_source
def test_imports_point_down(path: Path):
    allowed = BELOW[path.relative_to(ROOT).parts[0]]
    ours = {name for name in imports(path) if within(name, {"minilora", "tests", "bench"})}
    assert {name for name in ours if not within(name, allowed)} == set()


@every_source
def test_one_name_for_one_module(path: Path):
    """`kernels` is another project's package, and a file with two names has two copies of its classes."""
    assert {name for name in imports(path) if within(name, {"kernels", "models"})} == set()


@every_source
def test_peers_are_no_dependency(path: Path):
    assert {name for name in imports(path) if within(name, PEERS)} == set()


@every_source
def test_no_old_word_is_left(path: Path):
    """A class counts as the variable that would hold it: _Sight is sight."""
    names = {path.stem}
    for node in ast.walk(ast.parse(path.read_text())):
        named = [getattr(node, field, None) for field in ("id", "attr", "arg", "name", "asname")]
        names |= {name.strip("_").lower() for name in named if isinstance(name, str)}
    assert {old: OLD_WORDS[old] for old in OLD_WORDS.keys() & names} == {}


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_know_torch_and_triton(path: Path):
    third = {name for name in imports(path) if not within(name, {"minilora", *sys.stdlib_module_names})}
    assert {name for name in third if not within(name, THIRD_PARTY_OF_KERNELS)} == set()


def test_the_folders_are_links_without_a_package_of_their_own():
    for folder in ("kernels", "models"):
        assert (ROOT / "minilora" / folder).readlink() == Path("..") / folder
        assert not (ROOT / folder / "__init__.py").exists()


def modules_after(*arguments: str) -> set[str]:
    """What a fresh interpreter has imported, by its own log."""
    command = [sys.executable, "-X", "importtime", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    lines = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}


HEAVY = {"torch", "numpy", "triton", "tokenizers", "yaml", "rich"}


def test_import_minilora_is_cheap():
    found = modules_after("-c", "import minilora")
    assert "minilora" in found and not found & HEAVY
    assert not {name for name in found if name.startswith("minilora.")}


def test_help_does_not_wait_for_torch():
    found = modules_after("-m", "minilora", "--help")
    assert "minilora.errors" in found and not found & HEAVY


def test_what_is_wrong_with_flags_and_paths_is_told_without_torch(tmp_path: Path):
    """By every command that has any; seconds of import would pass before a word otherwise."""
    model = ROOT / "minilora" / "demo" / "mini"
    wrong = {
        2: ["plan --lr abc", "train --no-such-flag 1", f"report {tmp_path}", f"compare {tmp_path}", "sweep none --output x",
            "chat --model m --top-p 7", "nonsense"],
        3: [f"{command} --model {model} --data none" for command in ("eval", "train --output x", "plan", "inspect data", "data score")]
           + [f"predict --model {model} --data none --output x", "data split --data none --val 1 --output x"],
        4: ["chat --model none", "eval --model none --data x", "plan --model none", "inspect model none", "convert none x",
            "inspect data --model none --data x", "merge --model none --adapter x --output y",
            f"chat --model {model} --adapter none", "predict --model none --data x --output y"],
    }  # fmt: skip
    code = f"""
import sys
from minilora.__main__ import main
for code, lines in {wrong!r}.items():
    for line in lines:
        assert main(line.split()) == code, (line, code)
        assert "torch" not in sys.modules, line
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr and done.stderr.count("error: ") == sum(map(len, wrong.values()))


def test_a_kernel_loads_nothing_of_the_engine():
    found = modules_after("-c", "import minilora.kernels.lora_linear")
    ours = {name for name in found if name.startswith("minilora")}
    assert ours == {
        "minilora",
        "minilora.kernels",
        "minilora.kernels.dispatch",
        "minilora.kernels.dropout",
        "minilora.kernels.frozen_linear",
        "minilora.kernels.lang",
        "minilora.kernels.lora_gemm",
        "minilora.kernels.lora_linear",
        "minilora.kernels.lora_shrink",
        "minilora.kernels.projection",
    }


def test_no_lazy_name_is_a_modules():
    """Importing a submodule sets the attribute of that name: a function so called would be gone from then on."""
    import minilora

    assert not [name for name in minilora._HOMES if (ROOT / "minilora" / f"{name}.py").exists()]


def test_every_lazy_name_is_there():
    """A typo in the table of minilora/__init__ would show at the user's first call."""
    import minilora

    assert all(callable(getattr(minilora, name)) for name in minilora._HOMES)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = minilora.no_such_name
