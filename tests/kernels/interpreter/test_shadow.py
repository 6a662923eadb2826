"""Every launch of every kernel: in bounds, without races, in any order of its programs, and no byte more than its plan."""

import importlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from oracle import leaves_of, upstream
from shadow import backwards, shadow, shuffled
from test_shadow_wide import KERNELS
from torch import Tensor

from minilora.kernels import rms_norm, rope, swiglu
from minilora.kernels.lang import jit, tl


class Case(NamedTuple):
    op: Callable
    example: Callable
    ragged: tuple[int, ...]  # arguments of example before the dtype: odd sizes, several programs
    large: tuple[int, ...]  # sizes at which bytes are counted
    trained: tuple[int, ...]
    least: dict[str, Callable[..., int]]  # kernel -> the bytes its launches must move, of the operation's arguments
    form: Mapping[str, Any] = MappingProxyType({})  # keywords of example
    within: float = 1.02  # times least


def size(*tensors: Tensor | None) -> int:
    """Bytes of tensors that are loaded, or stored, once."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


ROPE = {"rope._rotate_kernel": lambda x, cos, sin, *_: 2 * size(x, x, cos, sin)}
NORM = {
    "rms_norm._fwd_kernel": lambda x, w, *_: size(x, x, w),
    "rms_norm._bwd_kernel": lambda x, w, *_: size(x, x, x, w),
}
ADD_NORM = {
    "rms_norm._fwd_kernel": lambda x, r, w, *_: size(x, r, x, x, w),
    "rms_norm._bwd_kernel": lambda x, r, w, *_: size(x, x, x, x, w),
}
CASES = {
    "rms_norm": Case(rms_norm.rms_norm, rms_norm.example, (37, 101), (64, 896), (0,), NORM),
    "rms_norm once": Case(rms_norm.rms_norm, rms_norm.example, (37, 101), (64, 896), (0,), NORM, {"round_once": True}),
    # a partial sum for 32 rows, as 8192 rows have on MAX_PARTIALS programs: more than the least, but no more than this
    "rms_norm trained": Case(rms_norm.rms_norm, rms_norm.example, (67, 1030), (64, 896), (0, 1), NORM, {}, 1.05),
    "add_rms_norm": Case(rms_norm.add_rms_norm, rms_norm.add_example, (37, 101), (64, 896), (0, 1), ADD_NORM),
    "add_rms_norm trained": Case(
        rms_norm.add_rms_norm, rms_norm.add_example, (37, 101), (64, 896), (0, 1, 2), ADD_NORM, {}, 1.05
    ),
    "swiglu": Case(
        swiglu.swiglu, swiglu.example, (7, 1111), (16, 1216), (0, 1),
        {"swiglu._fwd_kernel": lambda g, u: size(g, u, g), "swiglu._bwd_kernel": lambda g, u: size(g, u, g, g, u)},
    ),
    "swiglu_fused": Case(
        swiglu.swiglu_fused, swiglu.fused_example, (7, 1111), (16, 1216), (0,),
        {"swiglu._fwd_kernel": lambda gu: size(gu) * 3 // 2, "swiglu._bwd_kernel": lambda gu: size(gu) * 5 // 2},
    ),
    "rope": Case(rope.rope, rope.example, (11, 17, 130), (32, 14, 64), (0,), ROPE),
    "rope partial": Case(rope.rope, rope.example, (11, 17, 130), (32, 14, 64), (0,), ROPE, {"rotated": 32}),
    "rope interleaved": Case(
        rope.rope, rope.example, (11, 17, 130), (32, 14, 64), (0,), ROPE, {"rotated": 32, "interleaved": True}
    ),
}  # fmt: skip
each = pytest.mark.parametrize("name", CASES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def few_partials(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(rms_norm, "MAX_PARTIALS", 2)


def forward(case: Case, args: Sequence[Any]) -> tuple[tuple[Tensor, ...], list[Any]]:
    """The outputs, and the arguments as leaves."""
    leaves = leaves_of(args, case.trained)
    out = case.op(*leaves)
    return out if isinstance(out, tuple) else (out,), leaves


def both(case: Case, args: Sequence[Any]) -> list[Tensor]:
    """The outputs and the gradients of the trained arguments."""
    outputs, leaves = forward(case, args)
    torch.autograd.backward(outputs, [upstream(o) for o in outputs])
    return [*(o.detach() for o in outputs), *(leaves[i].grad for i in case.trained)]


def in_larger_memory(x: Any) -> Any:
    """The same values as a view whose rows are apart, so that a byte beyond a row is beyond the tensor."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    big = torch.full([n + 8 for n in x.shape], math.nan, dtype=x.dtype)
    return big[tuple(slice(3, 3 + n) for n in x.shape)].copy_(x)


@each
@dtypes
def test_no_access_outside_and_no_race(name: str, dtype: torch.dtype):
    case = CASES[name]
    args = [in_larger_memory(a) for a in case.example(*case.ragged, dtype, **case.form)[0]]
    with shadow() as launches:
        both(case, args)
    assert len(launches) >= 2 and max(launch.programs for launch in launches) > 1
    assert [fault for launch in launches for fault in launch.faults()] == []


@each
@pytest.mark.parametrize("order", [backwards, shuffled])
def test_the_order_of_the_programs_changes_no_bit(name: str, order: Callable):
    case = CASES[name]
    args = case.example(*case.ragged, torch.bfloat16, **case.form)[0]
    expected = both(case, args)
    with shadow(order):
        found = both(case, args)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@each
def test_bytes_are_those_of_the_plan(name: str):
    """Of every kernel; and of the whole forward what the example says that it costs."""
    case = CASES[name]
    args, cost = case.example(*case.large, torch.bfloat16, **case.form)
    with shadow() as there:
        outputs, _ = forward(case, args)
    assert cost["bytes"] <= sum(launch.total() for launch in there) <= case.within * cost["bytes"]
    with shadow() as back:
        torch.autograd.backward(outputs, [upstream(o) for o in outputs])
    counted = Counter[str]()
    for launch in there + back:
        counted[launch.kernel] += launch.total()
        rows = [a.name for a in launch.arguments if a.numel() >= args[0].numel()]
        assert all(launch.loads()[a] <= 1 for a in rows), "an element of a large tensor is loaded once"
    assert counted.keys() == case.least.keys()
    for kernel, formula in case.least.items():
        assert formula(*args) <= counted[kernel] <= case.within * formula(*args), kernel


def test_every_kernel_has_a_case():
    """A kernel that is not in CASES, or in those of test_shadow_wide, is not proven."""
    there = set()
    for path in Path(rms_norm.__file__).parent.glob("*.py"):
        module = importlib.import_module(f"minilora.kernels.{path.stem}")
        there |= {
            f"{path.stem}.{name}"
            for name, value in vars(module).items()
            if name.endswith("_kernel") and value.fn.__module__ == module.__name__
        }
    assert there == {kernel for case in CASES.values() for kernel in case.least} | KERNELS


# planted faults


@jit
def _copy_kernel(x_ptr, y_ptr, n, FROM: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr, MASK: tl.constexpr):
    """BLOCK values a program, STEP apart from those of the next; read FROM values further on than written."""
    at = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    mask = at < (n if MASK else 1 << 30)
    tl.store(y_ptr + at, tl.load(x_ptr + at + FROM, mask=mask, other=0), mask=mask)


@jit
def _again_kernel(y_ptr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    """Stores a block and loads it the other way round."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, at.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    tl.store(y_ptr + at, tl.load(y_ptr + (2 * tl.program_id(0) + 1) * BLOCK - 1 - at))


def faults(x: Tensor, y: Tensor, shift: int = 0, step: int = 16, mask: bool = True, programs: int = 3) -> list[str]:
    with shadow() as launches:
        _copy_kernel[(programs,)](x, y, 40, FROM=shift, STEP=step, BLOCK=16, MASK=mask)
    (launch,) = launches
    return launch.faults()


def test_a_sound_launch_has_no_fault_and_copies():
    x, y = torch.randn(40), torch.zeros(40)
    assert faults(x, y) == []
    assert torch.equal(x, y)
    assert faults(x, x) == [], "in place"


def test_a_planted_overrun_is_found_and_touches_nothing():
    x, whole = torch.randn(40), torch.full((64,), 7.0)
    found = faults(x, whole[:40], mask=False)
    assert found == [
        "test_shadow._copy_kernel: program 2: load of x_ptr[40] outside of it",
        "test_shadow._copy_kernel: program 2: store of y_ptr[40] outside of it",
    ]
    assert (whole[40:] == 7).all()
    assert faults(torch.randn(40), torch.zeros(40), shift=-1) != [], "before the first element"
    assert faults(torch.randn(80)[::2], torch.zeros(40)) != [], "between the elements of a view"
    assert faults(torch.randn(40), torch.zeros(40), shift=2**31 - 20) != [], "an offset that wraps round"


def test_a_planted_race_is_found():
    (found,) = faults(torch.randn(40), torch.zeros(40), step=8)
    assert found == "test_shadow._copy_kernel: written by two programs: y_ptr[8] by programs 0 and 1"


def test_a_planted_read_of_another_programs_output_is_found():
    x = torch.randn(41)
    (found,) = faults(x, x[:40], shift=1)
    assert found.startswith("test_shadow._copy_kernel: read and written by two programs: x_ptr[16] by programs 0 and 1")
    assert found.endswith("the second through y_ptr")


@pytest.mark.parametrize("barrier", [False, True])
def test_a_program_that_reads_what_it_wrote_needs_a_barrier(barrier: bool):
    with shadow() as launches:
        _again_kernel[(2,)](torch.zeros(32), BARRIER=barrier, BLOCK=16)
    assert ["without a barrier" in fault for fault in launches[0].faults()] == ([] if barrier else [True])


def test_an_atomic_operation_is_refused(monkeypatch: pytest.MonkeyPatch):
    @jit
    def kernel(y_ptr):
        tl.atomic_add(y_ptr, 1.0)

    with shadow(), pytest.raises(Exception, match="atomic"):
        kernel[(1,)](torch.zeros(1))


def test_bytes_are_counted_once_an_element_and_repeats_are_seen():
    x, y = torch.randn(40), torch.zeros(40)
    with shadow() as launches:
        _copy_kernel[(3,)](x, y, 40, FROM=0, STEP=8, BLOCK=16, MASK=True)
    assert launches[0].bytes() == {"x_ptr": (128, 0), "y_ptr": (0, 128)}
    assert launches[0].loads()["x_ptr"] == 48 / 32


def test_an_order_runs_every_program_once():
    for n in range(1, 60):
        assert sorted(backwards(n)) == sorted(shuffled(n)) == list(range(n))
    assert list(shuffled(7)) != list(range(7))
