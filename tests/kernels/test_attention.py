"""Attention that is kept from the first pass to the recomputation, and the paths that a CPU does not take by itself."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import check_op, run, upstream
from torch import Tensor

from minilora.kernels import attention as module
from minilora.kernels.attention import attention, attention_forward, attention_ref

FORMS: list[tuple[int | None, list[int] | None]] = [(None, None), (5, None), (None, [7, 1, 0, 7])]
forms = pytest.mark.parametrize("window, prefix_lens", FORMS, ids=["causal", "window", "prefix_lens"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)


def packed(dtype: torch.dtype, lengths: tuple[int, ...] = (13, 1, 31, 7)) -> tuple[Any, ...]:
    """q, k, v and cu_seqlens of a few documents."""
    torch.manual_seed(0)
    return module.example(list(lengths), 6, 2, 24, dtype)[0]


@pytest.fixture
def no_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_flash", lambda *_: False)


@forms
@dtypes
@pytest.mark.parametrize("lengths", [(52,), (13, 1, 31, 7)], ids=["one", "packed"])
def test_what_is_kept_gives_the_bits_of_the_plain_call(
    dtype: torch.dtype, window: int | None, prefix_lens: list[int] | None, lengths: tuple[int, ...]
):
    q, k, v, cu_seqlens = packed(dtype, lengths)
    form = cu_seqlens, window, prefix_lens and [sum(prefix_lens)] if len(lengths) == 1 else prefix_lens
    kept = attention_forward(q.requires_grad_(), k, v, *form)
    assert not kept[0].requires_grad
    plain = run(attention, (q, k, v, *form), (0, 1, 2), upstream(q))
    again = run(lambda *a: attention(*a, saved=kept), (q, k, v, *form), (0, 1, 2), upstream(q))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert again[0].data_ptr() == kept[0].data_ptr()


def test_with_what_is_kept_nothing_is_attended_again(monkeypatch: pytest.MonkeyPatch):
    """The backward has what it needs: the out and the log-sum-exp that are given, whatever they are."""
    q, k, v, cu_seqlens = packed(torch.float64)
    out, lse = attention_forward(q, k, v, cu_seqlens)
    assert lse is not None
    whole = run(lambda q, k, v: attention(q, k, v, cu_seqlens, saved=(out, lse)), (q, k, v), (0, 1, 2))
    shifted = run(lambda q, k, v: attention(q, k, v, cu_seqlens, saved=(out, lse + 1)), (q, k, v), (2,))
    torch.testing.assert_close(shifted[1], whole[3] / torch.e, rtol=1e-12, atol=0)  # every weight is e times smaller

    def fail(*_: Any) -> None:
        raise AssertionError("attended again")

    monkeypatch.setattr(module, "_cpu_forward", fail)
    monkeypatch.setattr(module.F, "scaled_dot_product_attention", fail)
    run(lambda q, k, v: attention(q, k, v, cu_seqlens, saved=(out, lse)), (q, k, v), (0, 1, 2))
    with pytest.raises(AssertionError, match="attended again"):
        attention(q, k, v, cu_seqlens)


@pytest.mark.parametrize("alone", [0, 1, 2])
def test_a_kept_output_with_one_input_that_requires_grad(alone: int):
    q, k, v, cu_seqlens = packed(torch.float32)
    kept = attention_forward(q, k, v, cu_seqlens)
    whole = run(lambda q, k, v: attention(q, k, v, cu_seqlens, saved=kept), (q, k, v), (0, 1, 2), upstream(q))
    one = run(lambda q, k, v: attention(q, k, v, cu_seqlens, saved=kept), (q, k, v), (alone,), upstream(q))
    assert torch.equal(one[1], whole[1 + alone])


def test_a_kept_output_that_was_written_to_is_refused():
    q, k, v, cu_seqlens = packed(torch.float32)
    kept = attention_forward(q, k, v, cu_seqlens)
    out = attention(q.requires_grad_(), k, v, cu_seqlens, saved=kept)
    kept[0].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@forms
@dtypes
def test_without_flash_attention(no_flash: None, dtype: torch.dtype, window: int | None, prefix_lens: list[int] | None):
    """One scaled dot product a document; there is no log-sum-exp to keep, and the kept form attends again."""
    q, k, v, cu_seqlens = packed(dtype)
    out, lse = attention_forward(q.requires_grad_(), k, v, cu_seqlens, window, prefix_lens)
    assert lse is None and not out.requires_grad
    plain = run(attention, (q, k, v, cu_seqlens, window, prefix_lens), (0, 1, 2), upstream(q))
    assert torch.equal(plain[0], out)
    again = run(
        lambda *a: attention(*a, saved=(out, lse)), (q, k, v, cu_seqlens, window, prefix_lens), (0, 1, 2), upstream(q)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    if dtype == torch.float64:
        check_op(attention, attention_ref, (q, k, v, cu_seqlens, window, prefix_lens), (0, 1, 2))


def test_documents_without_tokens():
    q, k, v, cu_seqlens = packed(torch.float64)
    gaps = [0, *cu_seqlens, cu_seqlens[-1]]
    for found, expected in zip(
        run(attention, (q, k, v, gaps), (0, 1, 2)), run(attention, (q, k, v, cu_seqlens), (0, 1, 2)), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "wrong, what",
    [
        ({"cu_seqlens": [0, 51]}, "cu_seqlens"),
        ({"cu_seqlens": [1, 52]}, "cu_seqlens"),
        ({"cu_seqlens": [0, 30, 20, 52]}, "cu_seqlens"),
        ({"cu_seqlens": [0]}, "cu_seqlens"),
        ({"window": 0}, "window"),
        ({"window": 4, "prefix_lens": [0, 0, 0, 0]}, "window"),
        ({"prefix_lens": [0, 0, 0]}, "prefix_lens"),
        ({"prefix_lens": [14, 0, 0, 0]}, "prefix_lens"),
        ({"prefix_lens": [-1, 0, 0, 0]}, "prefix_lens"),
        ({"k": torch.zeros(52, 2, 23)}, "it takes"),
        ({"k": torch.zeros(52, 4, 24), "v": torch.zeros(52, 4, 24)}, "it takes"),
        ({"v": torch.zeros(51, 2, 24)}, "it takes"),
        ({"q": torch.zeros(52, 144)}, "it takes"),
        ({"v": torch.zeros(52, 2, 24).bfloat16()}, "v torch.bfloat16"),
    ],
)
def test_what_does_not_fit_is_refused(wrong: dict[str, Any], what: str):
    arguments = dict(zip(("q", "k", "v", "cu_seqlens"), packed(torch.float32), strict=True)) | wrong
    with pytest.raises(ValueError, match=f"attention: .*{what}"):
        attention(**arguments)
    with pytest.raises(ValueError, match=f"attention: .*{what}"):
        attention_forward(**arguments)


# the call on CUDA, on a stand-in that follows the contract of torch's operators


def stream_scores(q: Tensor, k: Tensor, form: tuple[Any, ...], left: int, right: int) -> Tensor:
    """[H, T, T] scores of a packed stream as flash attention masks them: -1 is no limit on that side."""
    bounds, other, longest, longest_k, p, causal = form
    assert bounds.dtype == other.dtype == torch.int32 and torch.equal(bounds, other) and p == 0.0
    assert longest == longest_k == int(bounds.diff().max())
    place = torch.arange(len(q))
    seen = torch.zeros(len(q), len(q), dtype=torch.bool)
    for start, end in pairwise(bounds.tolist()):
        seen[start:end, start:end] = True
    if causal or right >= 0:
        seen &= place <= place[:, None] + (0 if causal else right)
    if left >= 0:
        seen &= place >= place[:, None] - left
    scores = torch.einsum("qhe,khe->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)) * q.shape[2] ** -0.5
    return scores.masked_fill(~seen, float("-inf"))


def stand_in_forward(
    q: Tensor, k: Tensor, v: Tensor, *form: Any, window_size_left: int, window_size_right: int
) -> tuple[Any, ...]:
    assert form[-1] is False  # the debug mask
    scores = stream_scores(q, k, form[:-1], window_size_left, window_size_right)
    lse = scores.logsumexp(-1)  # [H, T]
    values = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return torch.einsum("hqk,khe->qhe", (scores - lse[..., None]).exp(), values), lse, None, None, None


def stand_in_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *form: Any,
    window_size_left: int,
    window_size_right: int,
) -> tuple[Tensor, ...]:
    seed, offset = form[-2:]
    assert seed.dtype == torch.uint64 and seed.shape == (2,) and offset.numel() == 0
    group = q.shape[1] // k.shape[1]
    weights = (stream_scores(q, k, form[:-2], window_size_left, window_size_right) - lse[..., None]).exp()
    dweights = torch.einsum("qhe,khe->hqk", dout, v.repeat_interleave(group, dim=1))
    dscores = weights * (dweights - (dout * out).sum(-1).T[..., None]) * q.shape[2] ** -0.5
    dq = torch.einsum("hqk,khe->qhe", dscores, k.repeat_interleave(group, dim=1))
    dk, dv = torch.einsum("hqk,qhe->khe", dscores, q), torch.einsum("hqk,qhe->khe", weights, dout)
    return dq, *(d.unflatten(1, (-1, group)).sum(2) for d in (dk, dv))


@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_the_call_on_cuda_means_the_same(monkeypatch: pytest.MonkeyPatch, window: int | None):
    operators = SimpleNamespace(_flash_attention_forward=stand_in_forward, _flash_attention_backward=stand_in_backward)
    monkeypatch.setattr(module, "aten", operators)
    monkeypatch.setattr(module, "_cpu_forward", module._cuda_forward)
    monkeypatch.setattr(module, "_cpu_backward", module._cuda_backward)
    q, k, v, cu_seqlens = packed(torch.float64)
    check_op(attention, attention_ref, (q, k, v, cu_seqlens, window), (0, 1, 2))
    kept = attention_forward(q, k, v, cu_seqlens, window)
    again = run(lambda *a: attention(*a, saved=kept), (q, k, v, cu_seqlens, window), (0, 1, 2))
    plain = run(attention, (q, k, v, cu_seqlens, window), (0, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("window", [None, 5])
def test_torchs_own_operators_take_the_arguments(window: int | None):
    """On tensors without data, which is as far as a machine without a GPU comes."""
    *stream, cu_seqlens = packed(torch.bfloat16)
    q, k, v = (x.to("meta") for x in stream)
    sight = module.MaskSpec(tuple(cu_seqlens), window, None)
    out, lse = module._cuda_forward(q, k, v, sight)
    assert out.shape == q.shape and lse.shape == (6, 52) and lse.dtype == torch.float32
    grads = module._cuda_backward(out, q, k, v, out, lse, sight)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


def test_which_path_is_taken(monkeypatch: pytest.MonkeyPatch):
    """CUDA flash attention takes 16-bit numbers, heads of a multiple of 8 and no prefix_lens, on an Ampere card or a later one."""
    cards = {"capability": (8, 0)}
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(module, "capability", lambda _: cards["capability"])
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)

    def takes(dtype: torch.dtype = torch.bfloat16, size: int = 128, **form: Any) -> bool:
        q = SimpleNamespace(device=torch.device("cuda"), is_cuda=True, dtype=dtype, shape=(52, 6, size))
        return module._flash(q, q, module.MaskSpec((0, 52), **{"window": None, "prefix_lens": None, **form}))  # pyright: ignore

    assert takes() and takes(torch.float16) and takes(window=4) and takes(size=256)
    assert not takes(torch.float32) and not takes(size=100) and not takes(prefix_lens=(3,)) and not takes(size=264)
    cards["capability"] = (8, 9)
    assert takes() and takes(size=192) and not takes(size=256)
    cards["capability"] = (7, 5)
    assert not takes()
