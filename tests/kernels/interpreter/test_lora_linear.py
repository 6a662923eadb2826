"""The kernels of linear layers with adapters, on the interpreter: every plan, each against the specification in fp64."""

# pyright: reportCallIssue=false, reportOptionalMemberAccess=false

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import as_wrong_as, check_op, run, upstream, widen
from test_row_kernels import guarded, in_nan
from torch import Tensor

from minilora.kernels import lora_gemm, lora_linear, lora_shrink, lora_swiglu
from minilora.kernels.augmented import Augmented
from minilora.kernels.dispatch import kernels_enabled, use_gemm
from minilora.kernels.dropout import DropoutKey, dropout_mask_ref, keep_mask, philox_key, threshold
from minilora.kernels.lang import jit, tl
from minilora.kernels.packed import join
from minilora.kernels.projection import Adapter, Projection

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
KEY = DropoutKey(seed=7, step=3, micro=1, module=11)
SCALES = (1.75, 0.625, -0.375)  # exact in fp32, which a kernel's numbers are; no powers of two
P = 0.2  # 1 / (1 - p) is exact in fp32 too
# ranks (0: no adapter), widths, biases, dropout of a group
GROUPS = {
    "qkv": ((3, 3, 3), (53, 7, 7), (True, True, True), 0.0),
    "qkv dropped": ((3, 3, 3), (53, 7, 7), (False, False, False), P),
    "ranks differ": ((1, 16, 17), (33, 19, 3), (True, False, True), P),
    "one without adapter": ((8, 0, 5), (37, 1, 34), (False, True, False), 0.0),
    "first without adapter": ((0, 20), (5, 33), (True, True), P),
    "one alone": ((5,), (67,), (True,), P),
    "large rank": ((70,), (19,), (False,), 0.0),
}
groups = pytest.mark.parametrize("name", ["qkv dropped", "one without adapter", "one alone"])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@contextmanager
def plan(single: bool) -> Iterator[None]:
    """Force the one-pass kernel, or the two-kernel plan, for single layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_gemm, "single_pass_wins", lambda *_: single)
        yield


def group(
    ranks: tuple[int, ...],
    ns: tuple[int, ...],
    biases: tuple[bool, ...],
    p: float,
    dtype: torch.dtype,
    tokens: int = 35,
    k: int = 37,
    augment: bool = False,
) -> tuple[Callable, Callable, list[Tensor], tuple[int, ...]]:
    """The group and its specification as functions of x and the flat tensors; these; and the places of the trained ones.

    The outputs stand side by side in one matrix.
    """
    wide = torch.promote_types(dtype, torch.float32)
    tensors, trained = [torch.randn(tokens, k, dtype=dtype)], [0]
    for rank, n, bias in zip(ranks, ns, biases, strict=True):
        tensors.append(torch.randn(n, k, dtype=dtype) * k**-0.5)
        if bias:
            tensors.append(torch.randn(n, dtype=dtype))
        if rank:
            trained += [len(tensors), len(tensors) + 1]
            tensors += [torch.randn(rank, k, dtype=wide) * k**-0.5, torch.randn(n, rank, dtype=wide)]

    def projections(flat: Any) -> list[Projection]:
        rest, made = iter(flat), []
        for j, (rank, bias) in enumerate(zip(ranks, biases, strict=True)):
            weight, b = next(rest), next(rest) if bias else None
            rate = p if j != 1 else p / 4  # members may drop at different rates
            adapter = Adapter(next(rest), next(rest), SCALES[j], rate, KEY._replace(module=j)) if rank else None
            made.append(Projection(weight, b, adapter))
        return Augmented(made).holding(made) if augment else made

    def of(function: Callable) -> Callable:
        return lambda x, *flat: torch.cat(function(x, projections(flat)), dim=1)

    ours, ref = lora_linear.lora_linear_group, lora_linear.lora_linear_group_ref
    return of(ours), of(ref), tensors, tuple(trained)


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


SOME = [(name, torch.float32) for name in GROUPS] + [("ranks differ", dtype) for dtype in DTYPES[1:]]


@pytest.mark.parametrize("name, dtype", SOME, ids=lambda x: str(x))
def test_every_group_within_fences(name: str, dtype: torch.dtype):
    op, ref, args, trained = group(*GROUPS[name], dtype)
    if dtype == torch.float64 and GROUPS[name][3]:
        op, ref, args, trained = group(*GROUPS[name][:3], 0.0, dtype)  # p / 4 is not exact in fp32
    with plan(single=False), guarded() as wholes:
        check_op(op, ref, args, trained)
    assert wholes


@pytest.mark.parametrize("form", ["library", "augmented"])
@pytest.mark.parametrize(
    "name, dtype", [(name, torch.float32) for name in GROUPS] + [("qkv dropped", torch.bfloat16)], ids=str
)
def test_the_library_s_forms_on_the_narrow_kernels(name: str, dtype: torch.dtype, form: str):
    """The same S and dS, and dropout's part of dX by a kernel of its own."""
    op, ref, args, trained = group(*GROUPS[name], dtype, augment=form == "augmented")
    with use_gemm(form), guarded():
        check_op(op, ref, args, trained)


@pytest.mark.parametrize("tokens, k, n, r", [(1, 1, 1, 1), (1, 67, 35, 3), (33, 32, 5, 64), (3, 41, 2, 8)])
@pytest.mark.parametrize("single", [True, False], ids=["one pass", "two"])
def test_one_layer_by_both_plans(tokens: int, k: int, n: int, r: int, single: bool):
    op, ref, args, trained = group((r,), (n,), (True,), 0.0 if single else P, torch.float32, tokens, k)
    with plan(single), guarded():
        check_op(op, ref, args, trained)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_one_pass_kernel_in_other_dtypes(dtype: torch.dtype):
    op, ref, args, trained = group((3,), (53,), (True,), 0.0, dtype)
    with plan(single=True), guarded():
        check_op(op, ref, args, trained)


@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(
    st.integers(1, 50), st.integers(1, 50), st.lists(st.tuples(st.integers(0, 20), st.integers(1, 40)), min_size=1, max_size=3),
    st.sampled_from([0.0, P]), st.booleans(),
)  # fmt: skip
def test_groups_of_any_shape(tokens: int, k: int, members: list[tuple[int, int]], p: float, bias: bool):
    torch.manual_seed(0)
    ranks, ns = tuple(r for r, _ in members), tuple(n for _, n in members)
    op, ref, args, trained = group(ranks, ns, (bias,) * len(members), p, torch.float32, tokens, k)
    check_op(op, ref, args, trained)


@pytest.mark.parametrize("single, p", [(True, 0.0), (False, 0.3)], ids=["one pass", "two"])
def test_gradcheck(single: bool, p: float):
    ranks, ns = ((2,), (3,)) if single else ((1, 0), (2, 1))
    op, _, args, trained = group(ranks, ns, (True,) * len(ns), p, torch.float64, 2, 3)

    def only(*leaves: Tensor) -> Tensor:
        given = dict(zip(trained, leaves, strict=True))
        return op(*(given.get(i, a) for i, a in enumerate(args)))

    with plan(single):
        assert torch.autograd.gradcheck(only, [args[i].requires_grad_() for i in trained])


def test_ranks_and_rows_and_columns_over_many_partial_sums(monkeypatch: pytest.MonkeyPatch):
    """Splits of K in S, of rows in dA and dB, of columns in dS, and none of them: the same sums but for rounding."""
    op, ref, args, trained = group((3, 18), (67, 35), (True, False), P, torch.float32, 40, 40)
    truth, plain = (run(ref, a, trained, upstream(op(*args))) for a in (widen(args), args))
    found = []
    for programs in (1, 12):
        for table in (lora_shrink.PROGRAMS,):
            monkeypatch.setitem(table, 0, programs)
        found.append(run(op, args, trained, upstream(plain[0])))
        for ours, yard, exact in zip(found[-1], plain, truth, strict=True):
            as_wrong_as(ours, yard, exact, scale=float(truth[0].abs().max()))
    assert not equal(found[0], found[1])


@groups
def test_tiles_change_rounding_only(name: str, monkeypatch: pytest.MonkeyPatch):
    """Other tiles draw the same masks and give the same sums."""
    op, ref, args, trained = group(*GROUPS[name], torch.float32, 45)
    for table, tile in (
        (lora_gemm.GEMM, {"BM": 16, "BN": 64, "BK": 16}),
        (lora_gemm.INPUT_GRADIENT, {"BM": 16, "BN": 64, "BK": 16}),
        (lora_shrink.SHRINK, {"BM": 32, "BK": 16}),
        (lora_shrink.EXPAND_BACKWARD, {"ROWS": 64, "BN": 32}),
    ):
        monkeypatch.setitem(table, 0, {**table[0], **tile})
    with plan(single=False):
        check_op(op, ref, args, trained)


@pytest.mark.parametrize("name", ["qkv dropped"])
def test_the_same_call_twice_gives_the_same_bits_and_writes_no_input(name: str):
    op, _, args, trained = group(*GROUPS[name], torch.float32)
    before, dy = [a.clone() for a in args], upstream(op(*args))
    assert equal(run(op, args, trained, dy), run(op, args, trained, dy))
    assert equal(args, before)


@pytest.mark.parametrize(
    "name, dtype", [("qkv dropped", torch.float32), ("one without adapter", torch.bfloat16)], ids=lambda x: str(x)
)
def test_views_inside_nan(name: str, dtype: torch.dtype):
    op, _, args, trained = group(*GROUPS[name], dtype)
    dy = upstream(op(*args))
    with plan(single=False):
        expected = run(op, args, trained, dy)
        assert equal(run(op, [in_nan(a) for a in args], trained, in_nan(dy)), expected)


def test_expanded_and_transposed_inputs_and_gradients():
    op, _, (x, *others), trained = group(*GROUPS["one without adapter"], torch.float32)
    dy = upstream(op(x, *others))
    for odd_x, odd_dy in (
        (x[:1].expand_as(x), dy[:1].expand_as(dy)),
        (x.T.contiguous().T, dy[:1, :1].expand_as(dy)),
        (x, dy.T.contiguous().T),
    ):
        expected = run(op, [odd_x.contiguous(), *others], trained, odd_dy.contiguous())
        assert equal(run(op, [odd_x, *others], trained, odd_dy), expected)


@pytest.mark.parametrize("single", [True, False], ids=["one pass", "two"])
def test_rows_further_apart_than_int32(single: bool):
    """Of x, and of the weight; the memory between the rows is never touched."""
    op, _, args, trained = group((3,), (3,), (True,), 0.0 if single else P, torch.float16, 3)
    apart = 5 * 2**28 + 3
    far = [
        torch.empty(2 * apart + a[0].numel(), dtype=a.dtype).as_strided(a.shape, (apart, 1)).copy_(a) for a in args[:2]
    ]
    with plan(single):
        dy = upstream(op(*args))
        assert equal(run(op, [*far, *args[2:]], trained, dy), run(op, args, trained, dy))


def test_no_rows():
    op, _, args, trained = group((3, 2), (5, 4), (True, True), P, torch.float32)
    out, *grads = run(op, [args[0][:0], *args[1:]], trained)
    assert out.shape == (0, 9) and grads[0].shape == (0, 37) and not any(g.any() for g in grads)


@groups
def test_each_input_alone_gets_the_gradient_that_it_gets_among_all(name: str):
    op, _, args, trained = group(*GROUPS[name], torch.float32, 19, 13)
    dy = upstream(op(*args))
    together = run(op, args, trained, dy)[1:]
    for i, expected in zip(trained, together, strict=True):
        assert equal(run(op, args, (i,), dy)[1:], [expected])


def test_what_is_not_wanted_is_not_computed():
    """Layer 0 needs no dX; a frozen adapter no dA and dB."""
    x, (w, bias, adapter) = lora_linear.group_example(5, 7, (3,), 2, torch.float32)[0][0], one_layer()
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (lora_gemm, "input_gradient"),
            (lora_shrink, "shrink_backward"),
            (lora_shrink, "expand_backward"),
        ):
            real = getattr(module, name)
            patch.setattr(module, name, lambda *a, real=real, name=name: calls.append(name) or real(*a))
        leaves = [x, w, bias, adapter.a, adapter.b, 2.0]
        for trained, expected in (
            ((0,), ["expand_backward", "input_gradient"]),
            ((3,), ["expand_backward", "shrink_backward"]),
            ((4,), ["expand_backward"]),
        ):
            run(lora_linear.lora_linear, leaves, trained)
            assert calls == expected
            calls.clear()


def one_layer() -> Projection:
    return lora_linear.group_example(5, 7, (3,), 2, torch.float32)[0][1][0]


def test_a_second_derivative_is_refused():
    op, _, args, _ = group((3, 2), (5, 4), (True, True), 0.0, torch.float32)
    x = args[0].requires_grad_()
    (dx,) = torch.autograd.grad(op(*args).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_y_and_dx_are_rounded_once():
    """With S and dS exact in bf16 the fp32 kernel and then torch's cast give the bits of the bf16 kernel."""
    op, _, args, _ = group((3, 2), (40, 33), (True, False), 0.0, torch.bfloat16)
    args = [torch.randint(-2, 3, a.shape).to(a.dtype) for a in args]
    args[0], args[1] = torch.randn(args[0].shape).bfloat16(), torch.randn(args[1].shape).bfloat16()
    for i in (3, 4):  # no adapter product that would be rounded to bf16 on the way
        args[i] = torch.zeros_like(args[i])
    dy = upstream(op(*args))
    low, exact = run(op, args, (0,), dy), run(op, [a.float() for a in args], (0,), dy)
    assert torch.equal(low[0][:, :40], exact[0][:, :40].bfloat16())


# plans and switches


def test_the_switches_choose_the_path():
    args, _ = lora_linear.example(5, 7, 3, 2, torch.float32)
    x, *rest = args

    def name() -> str:
        return type(lora_linear.lora_linear(x.requires_grad_(), *rest).grad_fn).__name__

    assert name() == "_OnTritonBackward"
    with use_gemm("library"):
        assert name() == "_OnTritonBackward"  # the narrow products
    with kernels_enabled(False):
        assert name() == "_OnTorchBackward"


def test_joined_weights_give_the_same_bits():
    """The kernels read each member from where it lies."""
    (x, projections), _ = lora_linear.group_example(9, 7, (5, 3), 2, torch.float32)
    weights = join([p.tensor for p in projections])
    moved = [p._replace(weight=w) for p, w in zip(projections, weights, strict=True)]
    both = (lora_linear.lora_linear_group(x, p) for p in (projections, moved))
    assert equal(*(list(ys) for ys in both))


@pytest.mark.parametrize(
    "name, dtype",
    [*(("one without adapter", d) for d in DTYPES), ("first without adapter", DTYPES[0])],
    ids=lambda x: str(x),
)
def test_dual_swiglu(name: str, dtype: torch.dtype):
    """Only h is written; g and u are rounded as the two layers would round them."""
    ranks, _, biases, p = GROUPS[name]
    p = 0.0 if dtype == torch.float64 else p
    _, _, (x, *flat), _ = group(ranks[:2], (35, 35), biases[:2], p, dtype)

    def made(flat: list[Tensor]) -> list[Projection]:
        rest = iter(flat)
        return [
            Projection(
                next(rest), next(rest) if bias else None, Adapter(next(rest), next(rest), s, p, KEY) if rank else None
            )
            for rank, bias, s in zip(ranks[:2], biases[:2], SCALES, strict=False)
        ]

    apart = made(flat)
    weights = join([p.tensor for p in apart])
    together = [p._replace(weight=weight) for p, weight in zip(apart, weights, strict=True)]
    with guarded() as wholes:
        h = lora_swiglu.lora_swiglu(x, together)
    assert len(wholes) == 2 or len(wholes) == 3  # S, its partials, h
    plain, truth = (lora_swiglu.lora_swiglu_ref(y, made(list(f))) for y, f in ((x, flat), (x.double(), widen(flat))))
    as_wrong_as(h, plain, truth)
    as_wrong_as(lora_swiglu.lora_swiglu(x, apart), plain, truth)  # two layers, and their product after them
    assert torch.equal(lora_swiglu.lora_swiglu(in_nan(x), together), h)


# dropout


@jit
def _mask_kernel(out_ptr, seed, threshold, rows, columns, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = first + tl.arange(0, COLUMNS)[None, :]
    tl.store(
        out_ptr + row * columns + col, keep_mask(seed, threshold, row, first, COLUMNS), (row < rows) & (col < columns)
    )


@pytest.mark.parametrize("rows_a_tile, columns_a_tile", [(8, 8), (64, 32)])
@pytest.mark.parametrize("p", [0.1, 0.999])
def test_a_kernel_draws_the_bits_of_the_reference_in_every_tiling(rows_a_tile: int, columns_a_tile: int, p: float):
    rows, columns = 37, 101
    mask: Any = torch.zeros(rows, columns, dtype=torch.bool)
    for first in range(0, columns, columns_a_tile):
        _mask_kernel[(math.ceil(rows / rows_a_tile),)](
            mask, philox_key(KEY), threshold(p), rows, columns, first, ROWS=rows_a_tile, COLUMNS=columns_a_tile
        )
    assert torch.equal(mask, dropout_mask_ref((rows, columns), p, KEY))


def test_forward_and_backward_of_each_member_drop_by_its_own_mask():
    """With W zero and the rest ones, y counts the kept values of a row, and dx and dA show the masks themselves."""
    keys = [KEY, KEY._replace(module=12)]
    ones = [torch.ones(4, 2, requires_grad=True) for _ in keys], [torch.ones(2, 30, requires_grad=True) for _ in keys]
    x = torch.ones(20, 30, requires_grad=True)
    projections = [
        Projection(torch.zeros(4, 30), None, Adapter(a, b, 1.0, 0.5, k)) for b, a, k in zip(*ones, keys, strict=True)
    ]
    ys = lora_linear.lora_linear_group(x, projections)
    torch.autograd.backward(ys, [torch.ones(20, 4)] * 2)
    masks = [dropout_mask_ref((20, 30), 0.5, k) for k in keys]
    for y, a, mask in zip(ys, ones[1], masks, strict=True):
        assert torch.equal(y, (2.0 * 2 * mask.sum(1, keepdim=True)).expand(20, 4))
        assert a.grad is not None and torch.equal(a.grad, (2.0 * 4 * mask.sum(0)).expand(2, 30))
    assert x.grad is not None and torch.equal(x.grad, 2.0 * 8 * (masks[0].float() + masks[1].float()))
    assert not torch.equal(*masks)


def test_autograd_takes_a_gradient_as_it_is():
    """A rank below the padded one leaves no gap in dB, for which it would be copied: both gradients lie in one storage."""
    (x, projections), _ = lora_linear.group_example(20, 30, (5, 7), 3, torch.float32)
    bs = [p.adapter.b.requires_grad_() for p in projections]
    ys = lora_linear.lora_linear_group(x.requires_grad_(), projections)
    torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    assert [b.grad.untyped_storage().nbytes() for b in bs] == [4 * 3 * (5 + 7)] * 2
