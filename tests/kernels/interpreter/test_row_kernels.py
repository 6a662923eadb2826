"""What only the Triton kernels promise, on the interpreter; the rest of their promises are those of tests/kernels/test_kernels.py."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from oracle import check_op, run, upstream
from torch import Tensor

from minilora.kernels import rms_norm, rope, swiglu
from minilora.kernels.dispatch import kernels_enabled, use_triton

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Op(NamedTuple):
    op: Callable
    ref: Callable
    example: Callable
    shapes: list[tuple[int, ...]]  # arguments of example before the dtype
    trained: tuple[int, ...]


def side_by_side(op: Callable) -> Callable:
    """Both outputs of an operation as one tensor."""
    return lambda *args: torch.cat(op(*args), dim=-1)


def two_sections(tokens: int, heads: int, size: int, *where: Any) -> tuple[tuple[Any, ...], dict]:
    """rope of half of each half of a head, by angles of its own; the size is a multiple of 8."""
    (x, cos, sin, interleaved), cost = rope.example(tokens, heads, size, *where, rotated=size // 2)
    return (x, cos.unflatten(-1, (2, -1)), sin.unflatten(-1, (2, -1)), interleaved), cost


OPS = {
    "rms_norm": Op(
        rms_norm.rms_norm, rms_norm.rms_norm_ref, rms_norm.example,
        [(1, 1), (1, 257), (37, 101), (67, 7), (5, 128), (3, 4099), (601, 3)], (0, 1),
    ),
    "rms_norm_once": Op(
        rms_norm.rms_norm, rms_norm.rms_norm_ref, lambda *a: rms_norm.example(*a, offset=1.0, round_once=True),
        [(1, 1), (1, 257), (37, 101), (5, 128)], (0, 1),
    ),
    "add_rms_norm": Op(
        side_by_side(rms_norm.add_rms_norm), side_by_side(rms_norm.add_rms_norm_ref), rms_norm.add_example,
        [(1, 1), (1, 257), (37, 101), (67, 7), (5, 128)], (0, 1, 2),
    ),
    "swiglu": Op(
        swiglu.swiglu, swiglu.swiglu_ref, swiglu.example,
        [(1, 1), (1, 257), (13, 101), (7, 11), (5, 128), (3, 4099)], (0, 1),
    ),
    "swiglu_fused": Op(
        swiglu.swiglu_fused, swiglu.swiglu_fused_ref, swiglu.fused_example,
        [(1, 1), (1, 257), (13, 101), (5, 128), (3, 1025)], (0,),
    ),
    "rope": Op(
        rope.rope, rope.rope_ref, rope.example,
        [(1, 1, 2), (1, 7, 258), (11, 3, 26), (7, 1, 6), (5, 28, 128), (3, 17, 514)], (0,),
    ),
    "rope_interleaved": Op(
        rope.rope, rope.rope_ref, lambda *a: rope.example(*a, rotated=a[2] // 2, interleaved=True),
        [(1, 1, 4), (1, 7, 260), (7, 3, 36), (5, 32, 128)], (0,),
    ),
    "rope_sections": Op(
        rope.rope, rope.rope_ref, two_sections,
        [(1, 1, 8), (1, 7, 264), (5, 3, 40), (5, 32, 128)], (0,),
    ),
}  # fmt: skip
each = pytest.mark.parametrize("name", OPS)
SHAPES = [pytest.param(name, s, id=f"{name}-{'x'.join(map(str, s))}") for name, op in OPS.items() for s in op.shapes]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def arguments(name: str, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> list[Any]:
    return list(OPS[name].example(*(shape or OPS[name].shapes[2]), dtype)[0])


@contextmanager
def guarded() -> Iterator[list[Tensor]]:
    """torch.empty gives NaN with 64 values of 7 on both sides, which must still be there at the end."""
    wholes: list[Tensor] = []
    empty = torch.empty

    def fenced(shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        count = math.prod(shape) if isinstance(shape, tuple) else shape
        whole = torch.full((count + 128,), 7, dtype=dtype, device=device)
        whole[64 : 64 + count] = math.nan
        wholes.append(whole)
        return whole[64 : 64 + count].view(shape)

    torch.empty = fenced
    try:
        yield wholes
    finally:
        torch.empty = empty
    assert all((w[:64] == 7).all() and (w[-64:] == 7).all() for w in wholes)
    assert not any(w.isnan().any() for w in wholes)


def in_nan(x: Any, lead: int = 3, trail: int = 5) -> Any:
    """The same values as a view of a larger memory full of NaN, its rows apart from each other."""
    if not isinstance(x, Tensor):
        return x
    big = torch.full([n + lead + trail for n in x.shape], math.nan, dtype=x.dtype)
    view = big[tuple(slice(lead, lead + n) for n in x.shape)]
    return view.copy_(x)


@each
def test_the_interpreter_runs_the_kernels_and_the_switch_turns_them_off(name: str):
    args = arguments(name, torch.float32)
    assert use_triton(args[0])
    args[0].requires_grad_()

    def nodes() -> set[str]:
        node = OPS[name].op(*args).grad_fn
        return {node.name(), *(n.name() for n, _ in node.next_functions if n)}

    assert "_OnTritonBackward" in nodes()
    with kernels_enabled(False):
        assert not use_triton(args[0])
        assert "_OnTorchBackward" in nodes() and "_OnTritonBackward" not in nodes()
        with kernels_enabled(True):
            assert use_triton(args[0])
    assert use_triton(args[0])


@pytest.mark.parametrize("name, shape", SHAPES)
@dtypes
def test_every_dtype_and_ragged_shapes_within_fences(name: str, shape: tuple[int, ...], dtype: torch.dtype):
    c, args = OPS[name], arguments(name, dtype, shape)
    # a few values of 8 or 11 bits are no measure of an error: the yardstick of a low precision is a larger one's
    small = math.prod(shape) < 512 and dtype in (torch.float16, torch.bfloat16)
    plain = (lambda *a: c.ref(*a) * (1 + 2 * torch.finfo(dtype).eps)) if small else None
    with guarded() as wholes:
        check_op(c.op, c.ref, args, c.trained, plain)
    assert wholes


@each
@dtypes
def test_views_inside_nan(name: str, dtype: torch.dtype):
    """Rows apart, memory that is not aligned, and NaN where a wrong mask would read."""
    c, args = OPS[name], arguments(name, dtype)
    dy = upstream(c.op(*args))
    expected = run(c.op, args, c.trained, dy)
    found = run(c.op, [in_nan(a) for a in args], c.trained, in_nan(dy))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@each
@dtypes
def test_expanded_and_reversed_layouts(name: str, dtype: torch.dtype):
    c, args = OPS[name], arguments(name, dtype)
    x, *others = args
    for odd in (x[:1].expand_as(x), x.transpose(0, -1).contiguous().transpose(0, -1)):
        dy = upstream(c.op(odd, *others))
        dy = dy[:1].expand(dy.shape)
        expected = run(c.op, [odd.contiguous(), *others], c.trained, dy.contiguous())
        found = run(c.op, [odd, *others], c.trained, dy)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@each
def test_rows_further_apart_than_int32(name: str):
    """Offsets over 2^31 values; the memory between the rows is never touched."""
    c, args = OPS[name], arguments(name, torch.float16)
    x = args[0][:3]
    apart = 5 * 2**28 + 3
    far = torch.empty(2 * apart + x[0].numel(), dtype=x.dtype).as_strided(x.shape, (apart, *x.stride()[1:])).copy_(x)
    rest = [a[:3] if isinstance(a, Tensor) and a.shape[:1] == args[0].shape[:1] else a for a in args[1:]]
    dy = upstream(c.op(x, *rest))
    for a, b in zip(run(c.op, [far, *rest], c.trained, dy), run(c.op, [x, *rest], c.trained, dy), strict=True):
        assert torch.equal(a, b)


@each
def test_no_rows(name: str):
    """A batch may hold no target."""
    c, args = OPS[name], arguments(name, torch.float32)
    none = [a[:0] if isinstance(a, Tensor) and a.shape[:1] == args[0].shape[:1] else a for a in args]
    out, *grads = run(c.op, none, c.trained)
    assert out.numel() == 0
    assert [g.shape for g in grads] == [none[i].shape for i in c.trained] and not any(g.any() for g in grads)


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_result_is_rounded_once(name: str, dtype: torch.dtype):
    """The bits of the kernel in fp32 and then torch's cast; where a norm rounds twice by design, that rounding has no work."""
    c, args = OPS[name], arguments(name, dtype)
    if name == "rms_norm":
        args[1] = torch.ones_like(args[1])
    if name == "add_rms_norm":  # the sum too
        args[1:3] = args[0].clone(), torch.ones_like(args[2])
    wide = [a.float() if isinstance(a, Tensor) else a for a in args]
    dy = upstream(c.op(*args))
    for low, exact in zip(run(c.op, args, c.trained, dy), run(c.op, wide, c.trained, dy), strict=True):
        assert torch.equal(low, exact.to(dtype))


@each
def test_a_second_derivative_is_refused(name: str):
    """Autograd does not see into a kernel: better an error than a wrong number."""
    c, args = OPS[name], arguments(name, torch.float32)
    x = args[0].requires_grad_()
    (dx,) = torch.autograd.grad(c.op(*args).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


# rms_norm


@dtypes
@pytest.mark.parametrize("form", [(0.0, False), (0.0, True), (1.0, False), (1.0, True)], ids=str)
def test_rms_norm_rounds_in_the_order_of_the_torch_path(dtype: torch.dtype, form: tuple[float, bool]):
    """Rows of 7 and 1, half and half: 1 / rms is 1/5 in both paths, and the bits of the rest show where it was rounded."""
    rows = torch.tensor([7.0, 1.0]).repeat(32)[torch.stack([torch.randperm(64) for _ in range(40)])]
    x = rows * torch.randn(40, 64).sign()
    w = torch.randn(64).to(dtype)
    args = x.to(dtype), w, 1e-30, *form
    assert torch.equal(rms_norm.rms_norm(*args), rms_norm.rms_norm_ref(*args))


def test_rms_norm_partial_sums_over_many_programs(monkeypatch: pytest.MonkeyPatch):
    """Programs of several tiles, the last of them short."""
    monkeypatch.setattr(rms_norm, "MAX_PARTIALS", 3)
    args = arguments("rms_norm", torch.float32, (997, 131))
    check_op(rms_norm.rms_norm, rms_norm.rms_norm_ref, args, (0, 1))
