"""The planted faults follow the code: there are enough of them, each is Python and changes its file."""

import ast
from pathlib import Path

import pytest

from bench.proof import mutate

KERNELS = [f"kernels/{path.name}" for path in sorted((mutate.ROOT / "kernels").glob("*.py"))]
FILES = {file: (mutate.ROOT / file).read_text() for file in (*KERNELS, *mutate.ENGINE)}
FAULTS = {file: mutate.faults(file, source) for file, source in FILES.items()}


@pytest.mark.parametrize("files", [KERNELS, list(mutate.ENGINE)], ids=["kernels", "engine"])
def test_there_are_many_faults_of_many_kinds(files: list[str]):
    faults = [fault for file in files for fault in mutate.chosen(FAULTS[file], 1)]
    assert len(faults) >= 60
    assert len({fault.kind for fault in faults}) >= 12
    for fault in faults:
        planted = fault.planted(FILES[fault.file])
        assert ast.parse(planted) and planted != FILES[fault.file]


def test_what_is_said_to_change_nothing_is_still_there():
    there = {
        (Path(fault.file).stem, fault.function, fault.kind, fault.old(source))
        for file, source in FILES.items()
        for fault in FAULTS[file]
    }
    assert mutate.EQUIVALENT.keys() <= there


@pytest.mark.parametrize("file", mutate.BY_HAND)
def test_faults_written_out_are_python_that_differs(file: str):
    source = (mutate.ROOT / file).read_text()
    planted = [fault.planted(source) for fault in mutate.by_hand(file, source)]
    assert all(ast.parse(text) and text != source for text in planted) and len({*planted}) == len(mutate.BY_HAND[file])


def test_references_examples_and_tiles_are_left_alone():
    source = (
        "def f_ref(x):\n    return x + 1.0\n\ndef _tile(n):\n    return n + 1\n\ndef f(x):\n    return x + 'ä' - y\n"
    )
    faults = mutate.faults("kernels/f.py", source)
    assert {fault.function for fault in faults} == {"f"}
    assert "return ((x + 'ä') + (y))" in [line.strip() for f in faults for line in f.planted(source).splitlines()]


@pytest.mark.parametrize(
    "line, kind, becomes",
    [
        ("store(p, x, col < n)", "mask dropped", "store(p, x, ((col < n) == (col < n)))"),
        ("store(p, x, col < n)", "off by one", "store(p, x, ((col) <= (n)))"),
        ("row = tl.program_id(0).to(tl.int64)", "int64 forgotten", "row = (tl.program_id(0))"),
        ("dw += dy * n", "sum overwritten", "dw = dy * n"),
        ("y = x * scale", "factor dropped", "y = (x)"),
        ("acc = tl.zeros((4, 4), ACC)", "half accumulator", "acc = tl.zeros((4, 4), (tl.float16))"),
        ("os.fsync(handle)", "statement dropped", "pass"),
        ("if not x: raise E(f'{1 + x}')", "raise dropped", "if not x: pass"),
        ("if not x: return 3", "early exit dropped", "if not x: pass"),
        ("if not x: return 3", "condition always true", "if (True): return 3"),
        ("return not x", "not dropped", "return (x)"),
        ("if not x: return 3", "number off by one", "if not x: return (4)"),
        ("return a and b and c", "operand dropped", "return ((a) and (c))"),
        ("return [a for a in x if a]", "filter dropped", "return [a for a in x if (True)]"),
        ("return min(sorted(x), key=f)", "another function", "return (max)(sorted(x), key=f)"),
        ("return min(sorted(x), key=f)", "order forgotten", "return min((list(x)), key=f)"),
        ("return min(sorted(x), key=f)", "argument dropped", "return (min(sorted(x)))"),
    ],
)
def test_a_fault_is_what_it_is_called(line: str, kind: str, becomes: str):
    source = f"def kernel(x):\n    {line}\n"
    found = [f for file in ("kernels/f.py", "minilora/data.py") for f in mutate.faults(file, source)]
    assert becomes in [f.planted(source).splitlines()[1].strip() for f in found if f.kind == kind]


def test_what_only_tells_is_left_alone():
    source = '''def f(x):
    """Docstrings, messages, and texts that are put together."""
    what = "a" if x > 1 else "b"
    console.say(x + 1)
    y = json.dumps(z, indent=1) + "!"
    raise ModelError(f"{x + 1}", "b" if x > 1 else "c")
'''
    assert [f.kind for f in mutate.faults("minilora/data.py", source)] == ["raise dropped"]


def test_every_file_of_tests_is_there():
    names = {name for names in mutate.FILES.values() for name in names}
    paths = [mutate.ROOT / "tests" / name for name in names]
    assert all(path.is_dir() or path.with_suffix(".py").is_file() for path in paths)


def test_the_tests_of_a_file_are_those_that_name_it():
    there = {
        "1": ["t.py::test_property", "t.py::test_of_any[rope]", "t.py::test_rope_is_a_rotation"],
        "0": ["t.py::test_swiglu"],
    }
    fault = mutate.Fault("kernels/rope.py", "", "rope", 0, 0, 0, "")
    assert mutate.tests_of(fault, there) == [("1", there["1"][1:])]
    wide = fault._replace(file="kernels/lora_swiglu.py")
    with pytest.raises(AssertionError, match="no tests"):
        mutate.tests_of(wide, there)


def test_a_fault_of_every_file_comes_before_the_second_of_any():
    faults = [mutate.Fault(file, "", "", line, 0, 0, "") for file in ("a", "b") for line in range(9)]
    some = mutate.in_turn(faults[:10], 3)
    assert [(fault.file, fault.line) for fault in some] == [("a", 1), ("b", 0), ("a", 4), ("a", 7)]
