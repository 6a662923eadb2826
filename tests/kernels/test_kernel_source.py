"""What the source of a kernel may not contain, because the interpreter would not show what a GPU makes of it."""

import ast
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[2] / "kernels").glob("*.py"))
# an order that hangs on the schedule; a choice that hangs on a stopwatch; code that the interpreter does not run
BANNED = ("atomic", "autotune", "heuristics", "libdevice", "inline_asm")


def faults(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        if any(word in name for word in BANNED):
            found.append(f"line {node.lineno}: {name}")  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load":
            given = {keyword.arg for keyword in node.keywords}
            if ("mask" in given or len(node.args) > 1) and not ("other" in given or len(node.args) > 2):
                found.append(f"line {node.lineno}: a load with a mask and without other")
        if isinstance(node, ast.ImportFrom | ast.Import) and "libdevice" in ast.unparse(node):
            found.append(f"line {node.lineno}: libdevice")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_kernel_file_uses_nothing_that_hides_from_the_interpreter(path: Path):
    assert faults(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "x = tl.load(p, mask=m)", "x = tl.load(p, m)", "tl.atomic_add(p, x)", "@triton.autotune(c, k)\ndef f(): ...",
        "from triton.language.extra import libdevice", "tl.inline_asm_elementwise(a)",
    ],
)  # fmt: skip
def test_a_planted_fault_is_found(line: str):
    assert faults(line)


def test_a_load_with_other_or_of_everything_is_fine():
    assert faults("x = tl.load(p, mask=m, other=0.0) + tl.load(q)") == []
