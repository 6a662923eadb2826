"""Every operation against its reference in fp64: outputs, gradients, odd shapes, and what all promise."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import as_wrong_as, check_op, leaves_of, run, upstream
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from minilora.kernels import (
    attention,
    cross_entropy,
    dropout,
    gated_delta,
    linear_cross_entropy,
    lora_linear,
    rms_norm,
    rope,
    short_conv,
    swiglu,
)
from minilora.kernels.dispatch import kernels_enabled
from minilora.kernels.dropout import DropoutKey

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
KEY = DropoutKey(seed=7, step=3, micro=1, module=11)
few = settings(max_examples=12, deadline=None, derandomize=True, database=None)
size = st.integers(1, 67)
# a few values in bf16 are no measure of an error
wide_dtype = st.sampled_from([torch.float32, torch.float64])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fixed random numbers; and new memory is full of NaN in this mode, so that what is not written shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: list[int],
    window: int | None = None,
    prefix_lens: list[int] | None = None,
) -> Tensor:
    """Attention as transformers writes it out: the GEMMs in the dtype of q, the softmax in fp32."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    seen = attention_mask(cu_seqlens, window, prefix_lens)
    scores = torch.einsum("qhe,khe->hqk", q, k) * q.shape[-1] ** -0.5
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1, dtype=wide).to(q.dtype)
    return torch.einsum("hqk,khe->qhe", weights, v)


def attention_mask(cu_seqlens: list[int], window: int | None, prefix_lens: list[int] | None) -> Tensor:
    """[T, T], true where a query may look, by the definition and one document at a time."""
    mask = torch.zeros(cu_seqlens[-1], cu_seqlens[-1], dtype=torch.bool)
    for i, (start, end) in enumerate(pairwise(cu_seqlens)):
        for q in range(start, end):
            mask[q, max(start, 0 if window is None else q - window + 1) : q + 1] = True
        prefix = slice(start, start + (prefix_lens[i] if prefix_lens else 0))
        mask[prefix, prefix] = True
    return mask


def example(module: ModuleType, *sizes: Any) -> tuple[Any, ...]:
    """The arguments of module.example; the same ones in every call, which hypothesis relies on."""
    torch.manual_seed(0)
    return module.example(*sizes)[0]


def side_by_side(op: Callable) -> Callable:
    """Both outputs of an operation as one tensor, each with its own part of the upstream gradient."""
    return lambda *args: torch.cat(op(*args), dim=-1)


class Case(NamedTuple):
    op: Callable
    ref: Callable
    args: tuple
    trained: tuple[int, ...]
    plain: Callable | None = None


def case(name: str, dtype: torch.dtype, small: bool = False) -> Case:
    """An operation with arguments of ragged sizes; small ones for gradcheck."""
    if name.startswith(("rms_norm", "add_rms_norm")):
        shape = (3, 7) if small else (37, 101)
        form: tuple[Any, ...] = (dtype, "cpu", 1.0, True) if name.endswith("once") else (dtype,)
        if name.startswith("rms_norm"):
            return Case(rms_norm.rms_norm, rms_norm.rms_norm_ref, example(rms_norm, *shape, *form), (0, 1))
        torch.manual_seed(0)
        args = rms_norm.add_example(*shape, *form)[0]
        return Case(side_by_side(rms_norm.add_rms_norm), side_by_side(rms_norm.add_rms_norm_ref), args, (0, 1, 2))
    if name == "swiglu_fused":
        torch.manual_seed(0)
        args = swiglu.fused_example(*((3, 7) if small else (37, 101)), dtype)[0]
        return Case(swiglu.swiglu_fused, swiglu.swiglu_fused_ref, args, (0,))
    if name == "swiglu":
        args = example(swiglu, *((3, 7) if small else (37, 101)), dtype)
        return Case(swiglu.swiglu, swiglu.swiglu_ref, args, (0, 1))
    if name.startswith("rope"):
        shape = (3, 2, 6) if small else (37, 3, 26)
        if name == "rope_partial":
            args = example(rope, *shape, dtype, "cpu", 4 if small else 10)
        elif name == "rope_interleaved":
            args = example(rope, *shape, dtype, "cpu", 4 if small else 18, True)
        elif name == "rope_sections":
            args = in_two_sections(*shape, 2 if small else 10, dtype)
        else:
            args = example(rope, *shape, dtype)
        return Case(rope.rope, rope.rope_ref, args, (0,))
    if name.startswith("attention"):
        window = 5 if name == "attention_window" else None
        prefix_lens = ([2, 1] if small else [2, 1, 0, 7]) if name == "attention_prefix" else None
        args = example(attention, *(([2, 3], 2, 1, 4) if small else ([13, 1, 31, 7], 6, 2, 26)), dtype)
        args = (*args, window, prefix_lens)
        return Case(attention.attention, attention.attention_ref, args, (0, 1, 2), plain_attention)
    if name == "gated_delta":
        args = example(gated_delta, *(([2, 3], 1, 2, 3) if small else ([13, 1, 70, 2, 3], 2, 4, 10)), dtype)
        return Case(
            gated_delta.gated_delta_rule, lambda *a: gated_delta.gated_delta_rule_ref(*a)[0], args, (0, 1, 2, 3, 4)
        )
    if name == "short_conv":
        args = example(short_conv, *(([2, 5], 3, 4) if small else ([13, 1, 31, 2, 3], 26, 4)), dtype)
        return Case(short_conv.short_conv, short_conv.short_conv_ref, args, (0, 1))
    if name.startswith("lora_linear"):
        args = lora_arguments(*((3, 7, 5, 2) if small else (37, 61, 53, 3)), dtype)
        p = 0.2 if name == "lora_linear_dropout" else 0.0
        return Case(lora_linear.lora_linear, lora_linear.lora_linear_ref, (*args, p, KEY), (0, 3, 4))
    if name == "cross_entropy":
        args = example(cross_entropy, *((3, 7) if small else (37, 211)), dtype)
        return Case(summed_cross_entropy, lambda *a: cross_entropy.cross_entropy_ref(*a)[0], args, (0,))
    assert name == "linear_cross_entropy", name
    args = example(linear_cross_entropy, *((3, 5, 7) if small else (37, 29, 211)), dtype)
    return Case(cross_entropy_in_chunks, linear_cross_entropy.linear_cross_entropy_ref, args, (0, 1))


def summed_cross_entropy(logits: Tensor, targets: Tensor, scale: Tensor | None = None) -> Tensor:
    return cross_entropy.cross_entropy(logits, targets, scale)[0]


def cross_entropy_in_chunks(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy.linear_cross_entropy(x, head, targets, chunk_rows=10)


def in_two_sections(tokens: int, heads: int, size: int, rotated: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """x, cos, sin of positions that count up in one half of a head and down in the other."""
    x, _, _, interleaved = example(rope, tokens, heads, size, dtype)
    place = torch.arange(tokens)
    inverse = 10000.0 ** -(torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    return x, *rope.rope_angles(torch.stack((place, tokens - place), dim=1), inverse, 1.0, dtype), interleaved


def lora_arguments(tokens: int, k: int, n: int, r: int, dtype: torch.dtype, bias: bool = True) -> tuple[Any, ...]:
    """x, w, bias, A, B, scale; the scale is no power of two, so that where it is rounded shows."""
    x, w, b, a_matrix, b_matrix, _ = example(lora_linear, tokens, k, n, r, dtype)
    kept = torch.promote_types(dtype, torch.float32)  # adapters are fp32, or fp64 for fp64 truth
    return x, w, b if bias else None, a_matrix.to(kept), b_matrix.to(kept), 1.75


NAMES = [
    "rms_norm", "rms_norm_once", "add_rms_norm", "add_rms_norm_once", "swiglu", "swiglu_fused",
    "rope", "rope_partial", "rope_interleaved", "rope_sections", "attention", "attention_window", "attention_prefix",
    "gated_delta", "short_conv", "lora_linear", "lora_linear_dropout", "cross_entropy", "linear_cross_entropy",
]  # fmt: skip
every_op = pytest.mark.parametrize("name", NAMES)


# what every operation promises


@every_op
@dtypes
def test_output_and_gradients_are_as_wrong_as_the_reference(name: str, dtype: torch.dtype):
    c = case(name, dtype)
    check_op(c.op, c.ref, c.args, c.trained, c.plain)


@every_op
def test_gradcheck(name: str):
    c = case(name, torch.float64, small=True)
    leaves = [c.args[i].clone().requires_grad_() for i in c.trained]

    def op(*values: Tensor) -> Tensor:
        given = dict(zip(c.trained, values, strict=True))
        return c.op(*(given.get(i, a) for i, a in enumerate(c.args)))

    assert torch.autograd.gradcheck(op, leaves)


@every_op
@dtypes
def test_same_call_twice_gives_the_same_bits(name: str, dtype: torch.dtype):
    c = case(name, dtype)
    dy = upstream(c.op(*c.args))
    for first, second in zip(run(c.op, c.args, c.trained, dy), run(c.op, c.args, c.trained, dy), strict=True):
        assert torch.equal(first, second)


@every_op
@dtypes
def test_no_input_is_written_to(name: str, dtype: torch.dtype):
    c = case(name, dtype)
    dy = upstream(c.op(*c.args))
    tensors = [a for a in (*c.args, dy) if isinstance(a, Tensor)]
    before = [t.clone() for t in tensors]
    run(c.op, c.args, c.trained, dy)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


@every_op
def test_backward_twice_gives_the_same_gradients(name: str):
    """Under retain_graph the second pass must find what it saved as it was."""
    c = case(name, torch.float32)
    leaves = leaves_of(c.args, c.trained)
    out = c.op(*leaves)
    inputs = [leaves[i] for i in c.trained]
    first = torch.autograd.grad(out, inputs, upstream(out), retain_graph=True)
    second = torch.autograd.grad(out, inputs, upstream(out))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_op
def test_each_input_alone_gets_the_gradient_that_it_gets_among_all(name: str):
    c = case(name, torch.float32)
    dy = upstream(c.op(*c.args))
    together = run(c.op, c.args, c.trained, dy)[1:]
    for i, among_all in zip(c.trained, together, strict=True):
        assert torch.equal(run(c.op, c.args, (i,), dy)[1], among_all)


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith(("attention", "add"))])
def test_no_gradient_is_computed_for_a_frozen_input(name: str):
    """autograd would drop it in silence; the backward of the operation itself must return None."""
    c = case(name, torch.float32)
    for alone in c.trained:
        leaves = leaves_of(c.args, (alone,))
        out = c.op(*leaves)
        grads = out.grad_fn._forward_cls.backward(out.grad_fn, torch.ones_like(out))
        (given,) = (g for g in grads if g is not None)
        assert torch.equal(given, run(c.op, c.args, (alone,))[1])


@every_op
def test_an_expanded_upstream_gradient(name: str):
    """What .sum() sends back has strides of zero."""
    c = case(name, torch.float32)
    summed = run(lambda *a: c.op(*a).sum(), c.args, c.trained)
    spelled_out = run(c.op, c.args, c.trained)
    assert all(torch.equal(a, b) for a, b in zip(summed[1:], spelled_out[1:], strict=True))


@every_op
@pytest.mark.parametrize("how", ["strided", "transposed"])
def test_strided_inputs(name: str, how: str):
    c = case(name, torch.float32)

    def spread(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if how == "transposed":
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        return torch.stack((x, torch.full_like(x, 99)), dim=-1)[..., 0]

    args = [spread(a) for a in c.args]
    assert not args[0].is_contiguous()
    check_op(c.op, c.ref, args, c.trained, c.plain)


# rms_norm


offsets = st.sampled_from([0.0, 1.0])


@few
@given(st.integers(1, 40), size, offsets, st.booleans(), wide_dtype)
def test_rms_norm_of_any_shape(rows: int, n: int, offset: float, once: bool, dtype: torch.dtype):
    args = example(rms_norm, rows, n, dtype, "cpu", offset, once)
    check_op(rms_norm.rms_norm, rms_norm.rms_norm_ref, args, (0, 1))


@few
@given(st.integers(1, 40), size, offsets, st.booleans(), wide_dtype)
def test_add_rms_norm_of_any_shape(rows: int, n: int, offset: float, once: bool, dtype: torch.dtype):
    torch.manual_seed(0)
    args = rms_norm.add_example(rows, n, dtype, "cpu", offset, once)[0]
    check_op(side_by_side(rms_norm.add_rms_norm), side_by_side(rms_norm.add_rms_norm_ref), args, (0, 1, 2))


@dtypes
@pytest.mark.parametrize("once", [False, True])
def test_the_two_orders_of_rounding(dtype: torch.dtype, once: bool):
    """A row of 7 and 1, half and half, has 1 / rms = 1/5: the bits show what was rounded before the weight came."""
    x = torch.tensor([7.0, 1.0, -7.0, -1.0]).repeat(40, 16).to(dtype)
    w = torch.randn(64).to(dtype)
    n = x.to(torch.promote_types(dtype, torch.float32)) / 5
    n = n if once else n.to(dtype)
    expected = ((w.to(n.dtype) + 1) * n).to(dtype)
    wrong = (rms_norm.rms_norm(x, w, 1e-30, 1.0, once).double() - expected.double()).abs()
    assert (wrong <= 4e-7 * expected.abs()).all()  # an ulp of fp32, and no rounding of bf16


@pytest.mark.parametrize("once", [False, True])
@dtypes
def test_add_rms_norm_is_the_norm_of_the_rounded_sum(dtype: torch.dtype, once: bool):
    x, residual, w = torch.randn(37, 101).to(dtype), torch.randn(37, 101).to(dtype), torch.randn(101).to(dtype)
    y, s = rms_norm.add_rms_norm(x, residual, w, 1e-6, 1.0, once)
    assert torch.equal(s, x + residual)
    assert torch.equal(y, rms_norm.rms_norm(s, w, 1e-6, 1.0, once))


@pytest.mark.parametrize("used", [0, 1])
def test_add_rms_norm_when_one_output_is_used(used: int):
    torch.manual_seed(0)
    args = rms_norm.add_example(37, 101, torch.float32)[0]
    trained = (0, 1, 2) if used == 0 else (0, 1)
    check_op(lambda *a: rms_norm.add_rms_norm(*a)[used], lambda *a: rms_norm.add_rms_norm_ref(*a)[used], args, trained)


def test_rms_norm_refuses_what_does_not_fit():
    x, w = torch.randn(3, 7), torch.randn(7)
    for wrong in (w[:6], w[None]):
        with pytest.raises(ValueError, match="rms_norm: x .* it takes"):
            rms_norm.rms_norm(x, wrong, 1e-6)
        with pytest.raises(ValueError, match="add_rms_norm: x .* it takes"):
            rms_norm.add_rms_norm(x, x, wrong, 1e-6)
    with pytest.raises(ValueError, match="one shape"):
        rms_norm.add_rms_norm(x, x[:1], w, 1e-6)
    with pytest.raises(ValueError, match="rms_norm: x is torch.float32 on cpu, w torch.bfloat16"):
        rms_norm.rms_norm(x, w.bfloat16(), 1e-6)
    with pytest.raises(ValueError, match="torch.int64"):
        rms_norm.rms_norm(x.long(), w.long(), 1e-6)


def test_rms_norm_of_heads():
    """q_norm and k_norm run over [T, H, E]."""
    x, w = torch.randn(11, 3, 26), 1 + 0.1 * torch.randn(26)
    check_op(rms_norm.rms_norm, rms_norm.rms_norm_ref, (x, w, 1e-5), (0, 1))


def test_the_statistics_of_a_bf16_row_are_fp32():
    """With a weight of ones the result is rounded once: half a unit in the last of 8 bits."""
    x = torch.randn(200, 101).bfloat16()
    truth = rms_norm.rms_norm_ref(x.double(), torch.ones(101).double(), 1e-6)
    wrong = (rms_norm.rms_norm(x, torch.ones(101).bfloat16(), 1e-6).double() - truth).abs()
    assert (wrong <= (2**-8 + 1e-6) * truth.abs()).all()


def test_rms_norm_of_zeros_is_zero_and_its_gradient_finite():
    out, dx, dw = run(rms_norm.rms_norm, (torch.zeros(2, 5), torch.ones(5), 1e-6), (0, 1))
    assert torch.equal(out, torch.zeros(2, 5)) and dx.isfinite().all() and dw.isfinite().all()


# swiglu


@few
@given(st.integers(1, 40), size, wide_dtype)
def test_swiglu_of_any_shape(rows: int, n: int, dtype: torch.dtype):
    args = example(swiglu, rows, n, dtype)
    check_op(swiglu.swiglu, swiglu.swiglu_ref, args, (0, 1))


@few
@given(st.integers(1, 40), size, wide_dtype)
def test_swiglu_fused_of_any_shape(rows: int, n: int, dtype: torch.dtype):
    torch.manual_seed(0)
    args = swiglu.fused_example(rows, n, dtype)[0]
    check_op(swiglu.swiglu_fused, swiglu.swiglu_fused_ref, args, (0,))


@dtypes
def test_swiglu_fused_is_swiglu_of_its_halves_bit_for_bit(dtype: torch.dtype):
    """Any rank; the gradient is one whole tensor, not two that autograd pads and adds."""
    gu = torch.randn(5, 7, 202).to(dtype)
    g, u = gu.chunk(2, dim=-1)
    dh = upstream(g)
    out, dgu = run(swiglu.swiglu_fused, (gu,), (0,), dh)
    halves, dg, du = run(swiglu.swiglu, (g, u), (0, 1), dh)
    assert torch.equal(out, halves) and torch.equal(dgu, torch.cat((dg, du), dim=-1))
    assert dgu.is_contiguous()


def test_swiglu_refuses_what_does_not_fit():
    g, u = example(swiglu, 3, 7, torch.float32)
    with pytest.raises(ValueError, match="swiglu: g .* one shape"):
        swiglu.swiglu(g, u[:1])
    with pytest.raises(ValueError, match="swiglu: g is torch.float32 on cpu, u torch.float16"):
        swiglu.swiglu(g, u.half())
    with pytest.raises(ValueError, match="swiglu_fused: gu .* it takes"):
        swiglu.swiglu_fused(g)
    with pytest.raises(ValueError, match="swiglu_fused: gu is torch.int32"):
        swiglu.swiglu_fused(g.int())


@dtypes
def test_swiglu_far_out(dtype: torch.dtype):
    """exp must not overflow where the sigmoid is 0 or 1."""
    g = torch.tensor([-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4], dtype=dtype)
    check_op(swiglu.swiglu, swiglu.swiglu_ref, (g, torch.ones_like(g)), (0, 1))


# rope


@few
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 33), st.integers(0, 9), st.booleans(), wide_dtype)
def test_rope_of_any_shape(tokens: int, heads: int, half: int, rest: int, interleaved: bool, dtype: torch.dtype):
    args = example(rope, tokens, heads, 2 * half + rest, dtype, "cpu", 2 * half, interleaved)
    check_op(rope.rope, rope.rope_ref, args, (0,))


@few
@given(st.integers(1, 20), st.integers(1, 5), st.integers(1, 5), st.integers(1, 9), st.booleans(), wide_dtype)
def test_rope_of_any_sections(tokens: int, heads: int, r: int, half: int, interleaved: bool, dtype: torch.dtype):
    x, cos, sin, _ = example(rope, tokens, heads, r * (2 * half + 3), dtype, "cpu", 2 * half * r)
    args = x, cos.unflatten(-1, (r, half)), sin.unflatten(-1, (r, half)), interleaved
    check_op(rope.rope, rope.rope_ref, args, (0,))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("heads, groups", [(5, 2), (1, 3), (14, 14), (200, 1)])
def test_rope_of_a_pair_is_that_of_each(heads: int, groups: int, interleaved: bool):
    """To the bit, forward and backward, with rows that do not lie side by side."""
    wide, cos, sin, _ = example(rope, 9, heads + groups, 26, torch.float32, "cpu", 10)
    q, k = pair = [part.requires_grad_() for part in wide.split((heads, groups), dim=1)]
    alone = [rope.rope(x, cos, sin, interleaved) for x in pair]
    both = rope.rope_pair(q, k, cos, sin, interleaved)
    assert all(torch.equal(a, b) for a, b in zip(alone, both, strict=True))
    dys = [torch.randn_like(y) for y in both]
    assert all(
        torch.equal(a, b)
        for a, b in zip(torch.autograd.grad(alone, pair, dys), torch.autograd.grad(both, pair, dys), strict=True)
    )
    with pytest.raises(ValueError, match="heads of one size"):
        rope.rope_pair(q, k[..., :20], cos, sin)


def test_rope_is_a_rotation():
    """By the definition: the pair (i, i + P/2), or (2i, 2i + 1), as a complex number, times e^(i angle)."""
    x, cos, sin, _ = example(rope, 17, 3, 14, torch.float64, "cpu", 10)
    turn = torch.complex(cos, sin)[:, None]
    halves = torch.complex(x[..., :5], x[..., 5:10]) * turn
    expected = torch.cat((halves.real, halves.imag, x[..., 10:]), dim=-1)
    torch.testing.assert_close(rope.rope(x, cos, sin), expected, rtol=0, atol=1e-12)
    neighbours = torch.view_as_complex(x[..., :10].unflatten(-1, (5, 2))) * turn
    expected = torch.cat((torch.view_as_real(neighbours).flatten(-2), x[..., 10:]), dim=-1)
    torch.testing.assert_close(rope.rope(x, cos, sin, True), expected, rtol=0, atol=1e-12)


@dtypes
def test_rope_in_sections_is_each_section_alone(dtype: torch.dtype):
    x, cos, sin, _ = in_two_sections(17, 3, 28, 10, dtype)
    alone = [rope.rope(part, cos[:, i], sin[:, i]) for i, part in enumerate(x.chunk(2, dim=-1))]
    assert torch.equal(rope.rope(x, cos, sin), torch.cat(alone, dim=-1))


@dtypes
def test_what_does_not_turn_keeps_its_bits(dtype: torch.dtype):
    x, cos, sin, _ = example(rope, 7, 3, 26, dtype, "cpu", 10)
    x[..., 10:13] = torch.tensor([math.inf, -0.0, math.nan])
    for interleaved in (False, True):
        rest = rope.rope(x, cos, sin, interleaved)[..., 10:]
        torch.testing.assert_close(rest, x[..., 10:], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(rest.signbit(), x[..., 10:].signbit())


def test_rope_refuses_what_does_not_fit():
    x, cos, sin, _ = example(rope, 7, 3, 26, torch.float32)
    for args in (
        (x[0], cos, sin),
        (x[:6], cos, sin),
        (x, cos, sin[:, :5]),
        (x[..., :24], cos, sin),
        (x, cos[:, :0], sin[:, :0]),
    ):
        with pytest.raises(ValueError, match="rope: x .* it takes"):
            rope.rope(*args)
    with pytest.raises(ValueError, match="rope: x .* it takes"):  # 26 is no multiple of 4 sections
        rope.rope(x, *(a[:, :4, None].expand(7, 4, 2) for a in (cos, sin)))
    with pytest.raises(ValueError, match="rope: x is torch.float32 on cpu, cos torch.float64"):
        rope.rope(x, cos.double(), sin)


def test_rope_angles_of_late_positions_are_not_rounded_to_the_models_dtype():
    """bf16 has no position 257; the angle is made in fp32 and cast once."""
    positions, frequencies = torch.tensor([257, 30001]), torch.tensor([1.0, 0.01])
    cos, sin = rope.rope_angles(positions, frequencies, 1.5, torch.bfloat16)
    angles = torch.outer(positions.float(), frequencies)
    assert torch.equal(cos, (angles.cos() * 1.5).bfloat16())
    assert torch.equal(sin, (angles.sin() * 1.5).bfloat16())


# attention


def seams_of(lengths: list[int]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


@few
@given(
    st.lists(st.integers(1, 19), min_size=1, max_size=5),
    st.sampled_from([(4, 4), (6, 2), (5, 1)]),
    st.sampled_from([None, 1, 2, 7, 19, 100]),
    wide_dtype,
)
def test_attention_of_any_documents(lengths: list[int], heads: tuple[int, int], window: int | None, dtype: torch.dtype):
    args = example(attention, lengths, *heads, 10, dtype)
    check_op(attention.attention, attention.attention_ref, (*args, window), (0, 1, 2), plain_attention)


@few
@given(
    st.lists(st.tuples(st.integers(1, 19), st.integers(0, 19)), min_size=1, max_size=5),
    st.sampled_from([(4, 4), (6, 2), (5, 1)]),
    wide_dtype,
)
def test_attention_with_any_prefixes(documents: list[tuple[int, int]], heads: tuple[int, int], dtype: torch.dtype):
    args = example(attention, [n for n, _ in documents], *heads, 10, dtype)
    prefix_lens = [min(pair) for pair in documents]
    check_op(attention.attention, attention.attention_ref, (*args, None, prefix_lens), (0, 1, 2), plain_attention)


@pytest.mark.parametrize("window, prefix_lens", [(2, None), (None, [2, 0, 4]), (None, [3, 1, 6])])
def test_attention_reference_sees_what_the_definition_says(window: int | None, prefix_lens: list[int] | None):
    """The mask of the specification, read off with values that are one-hot."""
    cu_seqlens = seams_of([3, 1, 6])
    q, v = torch.zeros(10, 1, 10), torch.eye(10)[:, None]
    seen = attention.attention_ref(q, q, v, cu_seqlens, window, prefix_lens)[:, 0] > 0
    assert torch.equal(seen, attention_mask(cu_seqlens, window, prefix_lens))


@dtypes
@pytest.mark.parametrize("window, prefix_lens", [(None, None), (4, None), (None, [5, 1, 0, 31])])
def test_packed_documents_are_each_document_alone_bit_for_bit(
    dtype: torch.dtype, window: int | None, prefix_lens: list[int] | None
):
    lengths = [13, 1, 5, 31]
    q, k, v, cu_seqlens = example(attention, lengths, 6, 2, 26, dtype)
    dy = upstream(q)
    packed = run(attention.attention, (q, k, v, cu_seqlens, window, prefix_lens), (0, 1, 2), dy)
    for i, (start, end) in enumerate(pairwise(cu_seqlens)):
        own = [x[start:end].clone() for x in (q, k, v)]
        prefix = prefix_lens and prefix_lens[i : i + 1]
        alone = run(attention.attention, (*own, [0, end - start], window, prefix), (0, 1, 2), dy[start:end])
        assert all(torch.equal(whole[start:end], part) for whole, part in zip(packed, alone, strict=True))


@pytest.mark.parametrize("window", [8, 9, 10, 11])
def test_a_window_about_as_long_as_the_document(window: int):
    args = example(attention, [10, 9], 4, 2, 10, torch.float64)
    check_op(attention.attention, attention.attention_ref, (*args, window), (0, 1, 2))


def test_a_spoilt_document_spoils_no_other():
    q, k, v, cu_seqlens = example(attention, [5, 4, 6], 2, 1, 8, torch.float32)
    whole = attention.attention(q, k, v, cu_seqlens)
    q[5:9], k[5:9], v[5:9] = math.nan, math.nan, math.nan
    spoilt = attention.attention(q, k, v, cu_seqlens)
    assert torch.equal(spoilt[:5], whole[:5]) and torch.equal(spoilt[9:], whole[9:])
    assert spoilt[5:9].isnan().all()


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("groups", [1, 2, 4])
@dtypes
def test_cached_attention_is_the_end_of_the_whole(dtype: torch.dtype, groups: int, window: int | None):
    """One token at a time, several at once, and all of them: the last n queries over every key."""
    q, k, v, cu_seqlens = example(attention, [23], 4, groups, 10, dtype)
    for n in (1, 5, 23):
        check_op(
            lambda q, k, v, n=n: attention.attention_cached(q[-n:], k, v, window),
            lambda q, k, v, n=n: attention.attention_ref(q, k, v, cu_seqlens, window)[-n:],
            (q, k, v),
            (0, 1, 2),
            lambda q, k, v, n=n: plain_attention(q, k, v, cu_seqlens, window)[-n:],
        )


# lora_linear


@pytest.mark.parametrize("r", [1, 3, 8, 64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.4])
@dtypes
def test_lora_linear_of_any_rank(dtype: torch.dtype, p: float, bias: bool, r: int):
    args = lora_arguments(41, 61, 47, r, dtype, bias)
    check_op(lora_linear.lora_linear, lora_linear.lora_linear_ref, (*args, p, KEY), (0, 3, 4))


@few
@given(st.integers(1, 40), size, size, st.integers(1, 70), st.booleans(), st.sampled_from([0.0, 0.5]), wide_dtype)
def test_lora_linear_of_any_shape(t: int, k: int, n: int, r: int, bias: bool, p: float, dtype: torch.dtype):
    args = lora_arguments(t, k, n, r, dtype, bias)
    check_op(lora_linear.lora_linear, lora_linear.lora_linear_ref, (*args, p, KEY), (0, 3, 4))


def test_forward_and_backward_drop_the_same_values():
    """With W zero and the rest ones, y counts the kept values of a row and dx and dA show the mask itself."""
    x, w, a, b = torch.ones(20, 30), torch.zeros(4, 30), torch.ones(2, 30), torch.ones(4, 2)
    y, dx, da = run(lora_linear.lora_linear, (x, w, None, a, b, 1.0, 0.5, KEY), (0, 3))
    mask = dropout.dropout_mask((20, 30), 0.5, KEY)
    assert torch.equal(y, (2.0 * 2 * mask.sum(1, keepdim=True)).expand(20, 4))
    assert torch.equal(dx, 2.0 * 8 * mask)
    assert torch.equal(da, (2.0 * 4 * mask.sum(0)).expand(2, 30))


def test_the_low_rank_part_alone_is_dropped():
    """Dropout is on the input of A; the frozen weight sees all of x."""
    x, w, bias, a, b, _ = lora_arguments(9, 13, 5, 3, torch.float32)
    assert torch.equal(lora_linear.lora_linear(x, w, bias, a, torch.zeros_like(b), 2.0, 0.9, KEY), F.linear(x, w, bias))


def test_a_scale_is_not_rounded_below_the_dtype_of_x():
    """Adapters are fp32 even over an fp64 model: what is written out in fp64 must still be reached."""
    x, w, bias, a, b, _ = lora_arguments(9, 13, 5, 3, torch.float64)
    a, b = a.float(), b.float()
    truth = F.linear(x, w, bias) + 1.7 * (x @ a.double().T @ b.double().T)
    torch.testing.assert_close(lora_linear.lora_linear(x, w, bias, a, b, 1.7), truth, rtol=0, atol=1e-12)


# cross_entropy


LOSSES = ["cross_entropy", "linear_cross_entropy"]
each_loss = pytest.mark.parametrize("name", LOSSES)


@each_loss
@dtypes
def test_cross_entropy_of_masked_rows(name: str, dtype: torch.dtype):
    """No loss, a gradient of exactly zero, and nobody looks at what is in them."""
    c = case(name, dtype)
    *inputs, targets = c.args
    targets = targets.index_fill(0, torch.tensor([0, 5, 6]), cross_entropy.IGNORED)
    masked = targets == cross_entropy.IGNORED
    inputs[0] = inputs[0].index_fill(0, torch.tensor([6]), math.nan)
    loss, dx, *_ = run(c.op, (*inputs, targets), (0,))
    assert not dx[masked].any()
    kept, dkept, *_ = run(c.op, (inputs[0][~masked], *inputs[1:], targets[~masked]), (0,))
    as_wrong_as(loss, kept, kept.double(), "loss")
    as_wrong_as(dx[~masked], dkept, dkept.double(), "gradient")


@each_loss
def test_cross_entropy_where_every_row_is_masked_is_a_connected_zero(name: str):
    c = case(name, torch.float32)
    loss, *grads = run(c.op, (*c.args[:-1], torch.full_like(c.args[-1], cross_entropy.IGNORED)), c.trained)
    assert loss == 0 and len(grads) == len(c.trained) and not any(g.any() for g in grads)


def test_cross_entropy_counts_its_targets():
    logits, targets = example(cross_entropy, 37, 11, torch.float32)
    count = cross_entropy.cross_entropy(logits, targets)[1]
    assert count.dtype == torch.int64 and count == len([t for t in targets.tolist() if t != -100])


def test_cross_entropy_of_logits_without_rows():
    loss, dx = run(summed_cross_entropy, (torch.empty(0, 5), torch.empty(0, dtype=torch.int64)), (0,))
    assert loss == 0 and dx.shape == (0, 5)


def test_cross_entropy_of_logits_far_from_zero():
    """The fp32 numbers near 10^4 lie 0.001 apart; what is taken off before the exponential must not be rounded again."""
    logits, targets = example(cross_entropy, 19, 101, torch.float64)
    logits = (logits + 1e4).float()
    truth = run(lambda *a: cross_entropy.cross_entropy_ref(*a)[0], (logits.double(), targets), (0,))
    for found, true in zip(run(summed_cross_entropy, (logits, targets), (0,)), truth, strict=True):
        assert (found.double() - true).abs().max() < 2e-6 * true.abs().max()


@pytest.mark.parametrize("ahead", [1.0, 12.0, 40.0, 80.0])
def test_cross_entropy_of_a_class_that_is_almost_certain(ahead: float):
    """p - 1 and log(p) keep their digits where p itself is 1 in fp32."""
    logits, targets = torch.zeros(3, 5), torch.tensor([0, 3, 4])
    logits[range(3), targets] = ahead
    rest = 4 * math.exp(-ahead)
    loss, dx = run(summed_cross_entropy, (logits, targets), (0,))
    assert float(loss) == pytest.approx(3 * math.log1p(rest), rel=1e-5)
    assert float(dx[1, 3]) == pytest.approx(-rest / (1 + rest), rel=1e-5)
    assert float(dx.sum(1).abs().max()) < 1e-6 * rest
    loss, dx = run(linear_cross_entropy.linear_cross_entropy, (logits, torch.eye(5), targets), (0,))
    assert float(loss) == pytest.approx(3 * math.log1p(rest), rel=1e-5)
    assert float(dx[1, 3]) == pytest.approx(-rest / (1 + rest), rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1 / 3, 1e-3])
def test_cross_entropy_with_a_known_scale(scale: float):
    logits, targets = example(cross_entropy, 19, 101, torch.bfloat16)
    given = run(lambda z, t: summed_cross_entropy(z, t, torch.tensor(scale)), (logits, targets), (0,))
    after = run(lambda *a: summed_cross_entropy(*a) * torch.tensor(scale), (logits, targets), (0,))
    assert torch.equal(given[1], after[1]) and float(given[0]) == pytest.approx(float(after[0]), rel=1e-6)


WRONG = {
    "a class too many": lambda x, t: (x, t + x.shape[-1]),
    "a negative class": lambda x, t: (x, t - 10**6),
    "targets of int32": lambda x, t: (x, t.int()),
    "a target less": lambda x, t: (x, t[1:]),
    "three dimensions": lambda x, t: (x[None], t),
    "integers": lambda x, t: (x.long(), t),
}


@each_loss
@pytest.mark.parametrize("what", WRONG)
def test_cross_entropy_refuses_in_one_line(name: str, what: str):
    c = case(name, torch.float32)
    x, *between, targets = c.args
    targets = targets.where(targets != cross_entropy.IGNORED, 0)
    x, targets = WRONG[what](x, targets)
    if name == "linear_cross_entropy" and what == "a class too many":
        targets = targets + 211
    with pytest.raises(ValueError, match=f"^{name}: .*") as error:
        c.op(x, *between, targets)
    assert "\n" not in str(error.value)


# linear_cross_entropy


@dtypes
@pytest.mark.parametrize("chunk_rows", [1, 7, 16, 37, 256])
def test_chunks_change_rounding_only(dtype: torch.dtype, chunk_rows: int):
    def op(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy.linear_cross_entropy(x, head, targets, chunk_rows)

    args = example(linear_cross_entropy, 37, 29, 101, dtype)
    check_op(op, linear_cross_entropy.linear_cross_entropy_ref, args, (0, 1))


@few
@given(st.integers(1, 40), size, st.integers(1, 90), st.integers(1, 50), wide_dtype)
def test_cross_entropy_of_any_shape(rows: int, width: int, vocab: int, chunk_rows: int, dtype: torch.dtype):
    def op(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy.linear_cross_entropy(x, head, targets, chunk_rows)

    args = example(linear_cross_entropy, rows, width, vocab, dtype)
    check_op(op, linear_cross_entropy.linear_cross_entropy_ref, args, (0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long)], ids=str)
def test_cross_entropy_of_a_real_vocabulary(dtype: torch.dtype):
    args = example(linear_cross_entropy, 5, 8, 151_936, dtype)
    check_op(linear_cross_entropy.linear_cross_entropy, linear_cross_entropy.linear_cross_entropy_ref, args, (0,))


@dtypes
def test_cross_entropy_of_huge_logits(dtype: torch.dtype):
    """exp(logit) alone would overflow."""
    x, head, targets = example(linear_cross_entropy, 17, 23, 31, dtype)
    check_op(cross_entropy_in_chunks, linear_cross_entropy.linear_cross_entropy_ref, (1000 * x, head, targets), (0, 1))


@pytest.mark.parametrize("trained", [(0,), (0, 1)])
def test_no_rows_give_a_connected_zero(trained: tuple[int, ...]):
    """A batch may hold no target; backward must still run on every rank."""
    args = (torch.empty(0, 5), torch.randn(7, 5), torch.empty(0, dtype=torch.int64))
    loss, *grads = run(linear_cross_entropy.linear_cross_entropy, args, trained)
    assert loss == 0 and [g.shape for g in grads] == [args[i].shape for i in trained]
    assert not any(g.any() for g in grads)


def test_the_upstream_scale_is_not_rounded_to_the_dtype_of_x():
    """loss / targets sends 1 / targets back: one rounding more would be the same error in every gradient."""
    x, head, targets = example(linear_cross_entropy, 37, 29, 101, torch.bfloat16)
    _, dx = run(linear_cross_entropy.linear_cross_entropy, (x, head, targets), (0,))
    _, divided = run(lambda *a: linear_cross_entropy.linear_cross_entropy(*a) / 37, (x, head, targets), (0,))
    assert torch.equal(divided, (dx.float() * torch.tensor(1.0).div(37)).bfloat16())


def test_no_gradient_is_made_where_none_is_recorded():
    """Evaluation of a model that is trained in full: its head requires grad, only the loss is wanted."""
    x, head, targets = example(linear_cross_entropy, 37, 29, 101, torch.float32)
    with torch.no_grad(), kernels_enabled(False), FlopCounterMode(display=False) as counter:
        linear_cross_entropy.linear_cross_entropy(x.requires_grad_(), head.requires_grad_(), targets)
    assert counter.get_total_flops() == 2 * 37 * 29 * 101


# dropout


def near(share: float, expected: float, n: int) -> bool:
    """Within five standard deviations of a binomial share."""
    return abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / n)


@few
@given(st.integers(1, 40), size, st.floats(0.01, 0.99))
def test_same_key_same_bits(rows: int, columns: int, p: float):
    first, second = (dropout.dropout_mask((rows, columns), p, KEY) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (rows, columns) and first.dtype == torch.bool


def test_a_mask_does_not_depend_on_torchs_random_state():
    torch.manual_seed(1)
    first = dropout.dropout_mask((50, 50), 0.5, KEY)
    torch.rand(3)
    assert torch.equal(first, dropout.dropout_mask((50, 50), 0.5, KEY))


def test_the_mask_of_a_key_is_fixed_for_ever():
    """A checkpoint of today goes on with the same bits tomorrow: these must never change."""
    bits = dropout.dropout_mask((3, 8), 0.5, KEY).int().tolist()
    assert ["".join(map(str, row)) for row in bits] == ["01101011", "11000011", "01110101"]


@pytest.mark.parametrize("field", DropoutKey._fields)
def test_another_key_is_another_independent_mask(field: str):
    mask = dropout.dropout_mask((500, 500), 0.3, KEY)
    other = dropout.dropout_mask((500, 500), 0.3, KEY._replace(**{field: getattr(KEY, field) + 1}))
    both = float((mask & other).double().mean())
    assert near(both, 0.7**2, mask.numel())


@pytest.mark.parametrize("p", [0.01, 0.05, 0.3, 0.5, 0.9])
def test_the_share_of_kept_values(p: float):
    mask = dropout.dropout_mask((700, 701), p, KEY)
    assert near(float(mask.double().mean()), 1 - p, mask.numel())


def test_the_highest_dropout_keeps_the_highest_lane():
    """One lane in 65536: 16 are expected, and none would come with a probability of 1e-7."""
    kept = int(dropout.dropout_mask((1024, 1024), 65535 / 65536, KEY).sum())
    assert 0 < kept < 60


@dtypes
def test_kept_values_are_scaled_and_others_zero(dtype: torch.dtype):
    x = torch.randn(50, 50, dtype=dtype)
    mask = dropout.dropout_mask((50, 50), 0.3, KEY)
    assert torch.equal(dropout.dropout(x, 0.3, KEY), torch.where(mask, x * (1 / 0.7), 0))


def test_dropout_of_zero_is_x_itself():
    x = torch.randn(3, 4)
    assert dropout.dropout(x, 0.0, KEY) is x
