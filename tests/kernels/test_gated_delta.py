"""The gated delta rule and its convolution over documents: packed is alone, chunks change nothing, a state goes on."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import check_op, run, upstream
from torch import Tensor

from minilora.kernels import fla, gated_delta
from minilora.kernels.gated_delta import Cut, gated_delta_rule
from minilora.kernels.short_conv import short_conv, short_conv_ref

# called with arguments from lists, whose number a type checker does not know
gated_delta_rule_ref: Any = gated_delta.gated_delta_rule_ref
gated_delta_rule_with_state: Any = gated_delta.gated_delta_rule_with_state
few = settings(max_examples=10, deadline=None, derandomize=True, database=None)
LENGTHS = [1, 70, 3, 2, 33, 32]  # documents shorter than the convolution, of whole chunks, and beyond them
EVERY = (0, 1, 2, 3, 4)


def example(
    lengths: list[int], groups: int = 2, heads: int = 6, size: int = 8, dtype: torch.dtype = torch.float64
) -> tuple:
    torch.manual_seed(0)
    return gated_delta.example(lengths, groups, heads, size, dtype)[0]


def ref(*args: Any) -> Tensor:
    return gated_delta_rule_ref(*args)[0]


def close(a: Tensor, b: Tensor, scale: float = 0.0) -> bool:
    return bool((a - b).abs().max() <= 1e-12 * max(scale, float(b.abs().max())))


@few
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 9),
)
def test_any_shape(lengths: list[int], groups: int, each: int, size: int, value_size: int):
    q, k, _, g, beta, bounds = example(lengths, groups, groups * each, size)
    v = torch.randn(len(q), groups * each, value_size, dtype=q.dtype)
    check_op(gated_delta_rule, ref, (q, k, v, g, beta, bounds), EVERY)


@pytest.mark.parametrize("chunk", [1, 2, 16, 32, 64, 128])
@pytest.mark.parametrize("at_once", [1, 1 << 20])
def test_chunks_and_parts_change_nothing(chunk: int, at_once: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gated_delta, "AT_ONCE", at_once)
    args = example(LENGTHS)
    dy = upstream(ref(*args))
    found, truth = run(lambda *a: gated_delta_rule(*a, chunk=chunk), args, EVERY, dy), run(ref, args, EVERY, dy)
    assert all(close(a, b) for a, b in zip(found, truth, strict=True))


def test_packed_is_alone():
    """To the last bit a document's own chunks are the same numbers; products of another batch may round otherwise."""
    *args, bounds = example(LENGTHS)
    dy = upstream(args[2])
    packed = run(gated_delta_rule, (*args, bounds), EVERY, dy)
    for start, end in pairwise(bounds):
        alone = run(gated_delta_rule, (*(t[start:end] for t in args), [0, end - start]), EVERY, dy[start:end])
        assert all(close(a[start:end], b, float(a.abs().max())) for a, b in zip(packed, alone, strict=True))


@pytest.mark.parametrize("lengths", [[1], [31], [32], [33], [65], [5, 0, 3, 0]])
def test_edges_of_chunks(lengths: list[int]):
    check_op(gated_delta_rule, ref, example(lengths), EVERY)


def test_columns_of_one_matrix():
    """As the convolution leaves them: q, k and v are ranges of its rows, and so is what their gradients are of."""
    *_, g, beta, bounds = example(LENGTHS, size=8)
    whole = torch.randn(bounds[-1], 2 * 2 * 8 + 6 * 8, dtype=torch.float64)

    def of(op: Any) -> Any:
        def split(x: Tensor, *rest: Any) -> Tensor:
            q, k, v = x.split([16, 16, 48], dim=1)
            return op(q.unflatten(1, (2, 8)), k.unflatten(1, (2, 8)), v.unflatten(1, (6, 8)), *rest)

        return split

    check_op(of(gated_delta_rule), of(ref), (whole, g, beta, bounds), (0, 1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strong_decay_and_none(dtype: torch.dtype):
    """exp(g) from 0 to 1, beta 0 and 1: nothing overflows in what a chunk multiplies with."""
    q, k, v, g, beta, bounds = example([130, 3], dtype=dtype)
    g = torch.where(torch.rand_like(g) < 0.3, -1e4, torch.where(torch.rand_like(g) < 0.5, 0.0, g))
    beta = (torch.rand_like(beta) < 0.5).to(beta.dtype)
    check_op(gated_delta_rule, ref, (q, k, v, g, beta, bounds), (0, 1, 2, 4))


def test_alike_keys_are_as_stable_as_row_by_row():
    """Keys that all point one way: (I + A)^-1 has entries of 1, powers of A would reach 1e18."""
    q, _, v, g, beta, bounds = example([128], dtype=torch.float32)
    k = torch.ones_like(q) + 0.01 * torch.randn_like(q)
    check_op(gated_delta_rule, ref, (q, k, v, 1e-3 * g, torch.ones_like(beta), bounds), (0, 1, 2, 3, 4))


@pytest.mark.parametrize("pieces", [[30, 1, 1, 69, 1], [1, 1, 100], [102]])
def test_a_state_goes_on(pieces: list[int]):
    """Several documents, token by token or in longer pieces; the states and outputs are those of the whole."""
    *args, bounds = example([102, 102])
    o, state = gated_delta_rule_ref(*args, bounds)
    begun, outs, after = 0, [], None
    for n in pieces:
        rows = torch.cat([torch.arange(begun, begun + n) + start for start in bounds[:-1]])
        out, after = gated_delta_rule_with_state(*(t[rows] for t in args), [0, n, 2 * n], after)
        outs.append(out.unflatten(0, (2, n)))
        begun += n
    assert close(torch.cat(outs, 1).flatten(0, 1), o) and after is not None and close(after, state)


def test_states_are_in_the_order_of_the_documents():
    *args, bounds = example(LENGTHS)
    o, state = gated_delta_rule_with_state(*args, bounds)
    truth, states = gated_delta_rule_ref(*args, bounds)
    assert close(o, truth) and close(state, states)


def test_a_cut_holds_each_token_once():
    cut = Cut.of([0, 1, 71, 74], 64, torch.device("cpu"))
    assert cut.counts == (3, 1) and cut.order.tolist() == [1, 2, 0]
    assert cut.slot[:3].tolist() == [128, 0, 1] and cut.slot[64:66].tolist() == [63, 192]
    assert torch.equal(cut.source[cut.slot], torch.arange(74))


@few
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(sum), st.integers(1, 7), st.integers(1, 6))
def test_a_convolution_of_any_shape(lengths: list[int], channels: int, taps: int):
    torch.manual_seed(0)
    x, w = torch.randn(sum(lengths), channels, dtype=torch.float64), torch.randn(channels, taps, dtype=torch.float64)
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    check_op(short_conv, short_conv_ref, (x, w, bounds), (0, 1))


def test_what_does_not_fit_is_refused():
    q, k, v, g, beta, bounds = example([5, 3])
    for args, part in (
        ((q, k[:, :1], v, g, beta, bounds), "it takes twice"), ((q, k, v[:, :5], g[:, :5], beta[:, :5], bounds), "multiple of G"),
        ((q, k, v, g[:, :1], beta, bounds), "both must be"), ((q, k, v, g, beta, [0, 7]), "must go up"),
        ((q, k.float(), v, g, beta, bounds), "k torch.float32"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=part):
            gated_delta_rule(*args)
    for args, part in (((q[0], q[0], [0, 2]), "it takes"), ((q[:, 0], q[0, 0][:, None], [0, 7]), "must go up")):
        with pytest.raises(ValueError, match=part):
            short_conv(*args)


class TheirKernels:
    """In the place of FLA's two functions: our references, asked as FLA is."""

    @staticmethod
    def rule(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        *,
        use_qk_l2norm_in_kernel: bool,
        cu_seqlens: Tensor,
        cu_seqlens_cpu: Tensor,
    ) -> tuple[Tensor, None]:
        assert (
            use_qk_l2norm_in_kernel
            and torch.equal(cu_seqlens, cu_seqlens_cpu)
            and all(x.is_contiguous() for x in (q, k, v))
        )
        return gated_delta_rule_ref(q[0], k[0], v[0], g[0], beta[0], cu_seqlens.tolist())[0][None], None

    @staticmethod
    def conv(
        x: Tensor, w: Tensor, *, activation: str, cu_seqlens: Tensor, cu_seqlens_cpu: Tensor
    ) -> tuple[Tensor, None]:
        assert activation == "silu" and torch.equal(cu_seqlens, cu_seqlens_cpu)
        return short_conv_ref(x[0], w, cu_seqlens.tolist())[None], None


def test_fla_is_asked_for_documents(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fla, "runs_on_fla", lambda *_: True)
    monkeypatch.setattr(fla, "_installed", lambda: (TheirKernels.rule, TheirKernels.conv))
    args = example(LENGTHS)
    assert torch.equal(gated_delta_rule(*args), ref(*args))
    x, w = args[2].flatten(1), torch.randn(48, 4, dtype=torch.float64)
    assert torch.equal(short_conv(x, w, args[5]), short_conv_ref(x, w, args[5]))


@pytest.mark.skipif(
    not torch.cuda.is_available() or isinstance(fla._installed(), str), reason="needs a GPU and fla-core"
)
def test_fla_is_as_wrong_as_the_chunks():
    """In bf16, whose products FLA rounds: within a hundredth of the largest value, outputs and gradients."""
    args = [x.cuda() if isinstance(x, Tensor) else x for x in example(LENGTHS, 2, 4, 64, torch.bfloat16)]
    assert fla.runs_on_fla(args[0], args[2])
    dy = upstream(args[2])
    for ours, theirs in zip(run(ref, args, EVERY, dy), run(gated_delta_rule, args, EVERY, dy), strict=True):
        assert (ours.float() - theirs.float()).abs().max() <= 0.01 * ours.float().abs().max()


def test_without_fla_the_header_says_so():
    assert not fla.runs_on_fla(torch.zeros(1, 1, 8).bfloat16())
    if isinstance(fla._installed(), str):
        assert "minilora[hybrid]" in fla.fla_path(torch.zeros(1, 1, 8).bfloat16())
