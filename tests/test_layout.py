"""The architecture: imports point down, one name per module, and nothing heavy before it is needed."""

import ast
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import numpy as np
import pytest
import torch

from minilora import add_lora, load_model
from minilora.data import Example, make_batch
from minilora.run.setup import optimizer_of
from minilora.settings import resolve
from minilora.train import train_step

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


def test_rooms_of_the_engine_import_in_one_direction():
    """minilora/ can be read room by room: there is an order in which nothing needs what comes after it."""

    def room(name: str) -> str:
        return name.split(".")[1]

    modules = {"minilora", *(".".join(p.relative_to(ROOT).with_suffix("").parts) for p in SOURCES)}
    needs: dict[str, set[str]] = {}
    for path in SOURCES:
        if path.is_relative_to(ROOT / "minilora"):
            ours = [name for name in imports(path) if within(name, {"minilora"}) and not within(name, BELOW["models"])]
            found = {name if name in modules else name.rpartition(".")[0] for name in ours} - {"minilora"}
            me = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
            needs.setdefault(me, set()).update({room(name) for name in found} - {me})
    tuple(TopologicalSorter(needs).static_order())  # raises CycleError, which names a circle


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


# files that belong to the program, the system or the user's own cache, and what is made here
READ_DIRECTLY = {
    "minilora/report/page.py", "minilora/serve/page.py", "minilora/tools/explain.py", "minilora/machine/cpu.py", "minilora/tools/doctor.py",
    "minilora/rows/token_store.py", "minilora/text/own_template.py", "minilora/ranks/start.py", "minilora/isolated.py",
}  # fmt: skip


@every_source
def test_files_are_read_through_one_door(path: Path):
    """A file that a stranger made may be a pipe or a device: files/regular.py opens what is a regular file, and nothing else."""
    direct = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        called, words = ast.unparse(node.func), [a.value for a in node.args if isinstance(a, ast.Constant)]
        writes = any(str(word)[:1] in ("a", "w", "x") for word in words)
        if called.endswith((".read_bytes", ".read_text")) or (called == "open" and not writes):
            direct.append(f"{called} in line {node.lineno}")
    name = str(path.relative_to(ROOT))
    assert not direct or name in READ_DIRECTLY or name == "minilora/files/regular.py", direct


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
        "minilora.kernels.augmented",
        "minilora.kernels.dequantize",
        "minilora.kernels.dispatch",
        "minilora.kernels.dropout",
        "minilora.kernels.fp8_rows",
        "minilora.kernels.frozen_linear",
        "minilora.kernels.group",
        "minilora.kernels.kept",
        "minilora.kernels.lang",
        "minilora.kernels.launch",
        "minilora.kernels.library_gemm",
        "minilora.kernels.lora_gemm",
        "minilora.kernels.lora_linear",
        "minilora.kernels.lora_shrink",
        "minilora.kernels.on_triton",
        "minilora.kernels.packed",
        "minilora.kernels.projection",
        "minilora.kernels.quantized",
        "minilora.kernels.wide_products",
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


# what one reads to follow a training step of Qwen: from the command line to the product with the low-rank part in it
CORE = (
    "minilora/__main__.py", "minilora/cli/train.py", "minilora/config.py", "minilora/train.py", "minilora/data.py", "models/stream.py",
    "models/decoder.py", "models/config.py", "models/qwen.py", "models/layers.py", "minilora/lora.py", "kernels/projection.py",
    "kernels/lora_linear.py",
)  # fmt: skip


def test_every_room_is_in_the_wheel():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    rooms = {p.parent for p in (ROOT / "minilora").rglob("*.py") if not {"kernels", "models"} & set(p.parts)}
    assert {".".join(room.relative_to(ROOT).parts) for room in rooms} == {*packages} - {
        "minilora.kernels",
        "minilora.models",
    }


def test_the_core_path_is_short():
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in CORE}
    assert len(CORE) <= 13 and sum(lines.values()) <= 1800, lines


def test_few_calls_from_a_training_step_to_the_matmul():
    """Nine to the q, k and v of a block, none over ten; counted by the interpreter itself, torch's own calls left out."""
    example = Example(np.arange(3, 40), np.arange(4, 41), "row", None)
    config = resolve({})
    model = load_model(ROOT / "minilora" / "demo" / "mini", torch.float32, "cpu")
    add_lora(model, r=4)
    optimizer, stacks = optimizer_of(model.train(), config), []

    def look(frame, event, called):
        if event == "c_call" and called is torch.nn.functional.linear:
            stack = []
            while frame.f_code is not train_step.__code__:
                if frame.f_code.co_filename.startswith(str(ROOT)):
                    stack.append(frame.f_code.co_qualname)
                frame = frame.f_back
            stacks.append((*reversed(stack), "F.linear"))

    sys.setprofile(look)
    try:
        train_step(model, optimizer, [make_batch([example])], config, 0)
    finally:
        sys.setprofile(None)
    to_qkv = {stack for stack in stacks if stack[4:6] == ("Attention.forward", "lora_linear_group")}
    assert to_qkv == {
        ("micro_batch", "Decoder.loss", "Decoder.forward", "Block.forward", "Attention.forward", "lora_linear_group", "_Group.forward",
         "OnTorch.forward", "F.linear")
    }  # fmt: skip
    assert max(map(len, stacks)) <= 10, max(stacks, key=len)
