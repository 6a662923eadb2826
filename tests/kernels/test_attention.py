"""Attention that is kept from the first pass to the recomputation, and the paths that a CPU does not take by itself."""

import sys
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from oracle import check_op, run, upstream
from torch import Tensor

from minilora.kernels import attention as module
from minilora.kernels.attention import attention, attention_forward, attention_ref
from minilora.kernels.dispatch import deterministic_backward
from minilora.models.stream import Context, Documents
from minilora.run.setup import kernels
from minilora.settings import resolve

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_backward_of_short_documents_in_16_bits_computes_in_fp32(dtype: torch.dtype):
    q, k, v, cu_seqlens = packed(dtype)
    out, lse = attention_forward(q, k, v, cu_seqlens)
    spec = module.MaskSpec(tuple(cu_seqlens), None, None)

    def backward(*given: Tensor) -> tuple[Tensor, ...]:
        dout, q, k, v, out = given
        assert lse is not None
        return module._cpu_backward(dout, q, k, v, out, lse, spec)

    given = upstream(q), q, k, v, out
    found, wide = backward(*given), backward(*(x.float() for x in given))
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(found, wide, strict=True))


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


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0, 1)], ids=str)
def test_flash_attention_is_given_rows_that_lie_side_by_side(order: tuple[int, int, int]):
    x = torch.randn(2, 3, 4).permute(order)
    (found,) = module._side_by_side(x)
    assert torch.equal(found, x) and found.stride(-1) == 1 and (found is x) == (order == (0, 1, 2))


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


# the calls on CUDA, on a stand-in that follows the contract of torch's operators

NO_KEYS = float("inf")  # flash attention 2's lse of a query without keys; 3 has -inf


def stream_weights(q: Tensor, k: Tensor, form: tuple[Any, ...], left: int, right: int) -> tuple[Tensor, Tensor]:
    """Weights [H, T, T] and lse [H, T] of a packed stream as flash attention masks it: -1 is no limit on that side.

    The last query of a piece stands at its last key; a query without keys has weights of zero."""
    bounds, of_keys, longest, longest_k, p, causal = form
    assert bounds.dtype == of_keys.dtype == torch.int32 and p == 0.0
    assert bounds[0] == of_keys[0] == 0 and bounds[-1] == of_keys[-1] == len(q) and len(bounds) == len(of_keys)
    assert longest >= max(2, int(bounds.diff().max())) and longest_k >= int(of_keys.diff().max())
    seen = torch.zeros(len(q), len(q), dtype=torch.bool)
    for (start, end), (first, last) in zip(pairwise(bounds.tolist()), pairwise(of_keys.tolist()), strict=True):
        at = torch.arange(start, end)[:, None] - end
        key = torch.arange(first, last) - last
        seen[start:end, first:last] = (key <= at + (0 if causal else right)) if causal or right >= 0 else True
        if left >= 0:
            seen[start:end, first:last] &= key >= at - left
    scores = torch.einsum("qhe,khe->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)) * q.shape[2] ** -0.5
    scores = scores.masked_fill(~seen, float("-inf"))
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().masked_fill(~seen, 0), lse.masked_fill(~seen.any(-1), NO_KEYS)


def stand_in_forward(
    q: Tensor, k: Tensor, v: Tensor, *form: Any, window_size_left: int, window_size_right: int
) -> tuple[Any, ...]:
    assert form[-1] is False  # the debug mask
    weights, lse = stream_weights(q, k, form[:-1], window_size_left, window_size_right)
    values = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return torch.einsum("hqk,khe->qhe", weights, values), lse, None, None, None


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
    weights, own = stream_weights(q, k, form[:-2], window_size_left, window_size_right)
    assert torch.equal(own, lse)  # that of the forward of this call
    dweights = torch.einsum("qhe,khe->hqk", dout, v.repeat_interleave(group, dim=1))
    dscores = weights * (dweights - (dout * out).sum(-1).T[..., None]) * q.shape[2] ** -0.5
    dq = torch.einsum("hqk,khe->qhe", dscores, k.repeat_interleave(group, dim=1))
    dk, dv = torch.einsum("hqk,qhe->khe", dscores, q), torch.einsum("hqk,qhe->khe", weights, dout)
    return dq, *(d.unflatten(1, (-1, group)).sum(2) for d in (dk, dv))


@pytest.fixture
def on_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    operators = SimpleNamespace(_flash_attention_forward=stand_in_forward, _flash_attention_backward=stand_in_backward)
    monkeypatch.setattr(module, "aten", operators)
    monkeypatch.setattr(module, "_cpu_forward", module._cuda_forward)
    monkeypatch.setattr(module, "_cpu_backward", module._cuda_backward)


CALLS: list[tuple[int | None, list[int] | None]] = [
    (None, None), (1, None), (5, None), (100, None),
    # a prefix within its document, an empty one, one of one token, one that is the whole document
    (None, [7, 0, 30, 1]), (None, [13, 1, 31, 7]), (None, [0, 0, 0, 0]),
]  # fmt: skip


@pytest.mark.parametrize("window, prefix_lens", CALLS)
def test_the_calls_on_cuda_mean_the_same(on_stand_in: None, window: int | None, prefix_lens: list[int] | None):
    q, k, v, cu_seqlens = packed(torch.float64)
    form = cu_seqlens, window, prefix_lens
    check_op(attention, attention_ref, (q, k, v, *form), (0, 1, 2))
    kept = attention_forward(q, k, v, *form)
    again = run(lambda *a: attention(*a, saved=kept), (q, k, v, *form), (0, 1, 2))
    plain = run(attention, (q, k, v, *form), (0, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_prefixes_of_documents_without_tokens(on_stand_in: None):
    """And of the padding of a CUDA graph: bounds that repeat the last one."""
    q, k, v, cu_seqlens = packed(torch.float64)
    gaps, prefix_lens = [0, *cu_seqlens, cu_seqlens[-1]], [0, 7, 0, 30, 1, 0]
    wanted = run(attention, (q, k, v, cu_seqlens, None, prefix_lens[1:-1]), (0, 1, 2))
    found = run(attention, (q, k, v, gaps, None, prefix_lens), (0, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.parametrize("lse", [float("inf"), float("-inf")])
def test_prefixes_are_two_calls_without_a_mask(on_stand_in: None, monkeypatch: pytest.MonkeyPatch, lse: float):
    """However many documents there are; whatever lse the operator gives a query without keys."""
    calls = []

    def counting(*args: Any, **window: Any) -> Any:
        calls.append(args[7:9])
        return stand_in_forward(*args, **window)

    def refuse(*_: Any) -> None:
        raise AssertionError("a mask")

    monkeypatch.setitem(globals(), "NO_KEYS", lse)
    monkeypatch.setattr(module.aten, "_flash_attention_forward", counting)
    monkeypatch.setattr(module, "_mask", refuse)
    q, k, v, cu_seqlens = packed(torch.float64)
    check_op(attention, attention_ref, (q, k, v, cu_seqlens, None, [7, 1, 0, 7]), (0, 1, 2))
    calls.clear()
    attention_forward(q, k, v, cu_seqlens, None, [7, 1, 0, 7])
    assert calls == [(0.0, False), (0.0, True)]


@pytest.mark.parametrize("prefix_lens", [None, [7, 1, 0, 7]])
def test_layers_share_the_bounds_of_their_stream(
    on_stand_in: None, monkeypatch: pytest.MonkeyPatch, prefix_lens: list[int] | None
):
    """Nothing is made from the host in a layer, which a CUDA graph could not capture."""
    q, k, v, cu_seqlens = packed(torch.float64)
    wanted = run(attention, (q, k, v, cu_seqlens, None, prefix_lens), (0, 1, 2))
    documents = Documents.of([13, 1, 31, 7], prefix_lens).to(q.device)
    angles = torch.zeros(0)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a tensor from the host")

    monkeypatch.setattr(torch, "tensor", refuse)
    context = Context(angles, angles, documents)
    found = run(lambda q, k, v: context.attend(0, q, k, v), (q, k, v), (0, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.parametrize("window, prefix_lens", [(None, None), (5, None), (None, (7, 1, 0, 7))])
def test_torchs_own_operators_take_the_arguments(window: int | None, prefix_lens: tuple[int, ...] | None):
    """On tensors without data, which is as far as a machine without a GPU comes."""
    *stream, cu_seqlens = packed(torch.bfloat16)
    q, k, v = (x.to("meta") for x in stream)
    spec = module.MaskSpec(tuple(cu_seqlens), window, prefix_lens)
    out, lse = module._cuda_forward(q, k, v, spec)
    assert out.shape == q.shape and lse.shape == (12 if prefix_lens else 6, 52) and lse.dtype == torch.float32
    grads = module._cuda_backward(out, q, k, v, out, lse, spec)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("on", [True, False])
def test_the_backward_adds_in_one_order_where_that_is_asked_for(
    on_stand_in: None, monkeypatch: pytest.MonkeyPatch, on: bool
):
    """torch's switch, which is what its flash attention reads, is on for that call alone; as the forward was told."""
    seen, switches = [], cast(Any, torch.utils.deterministic)

    def looking(*args: Any, **window: Any) -> Any:
        seen.append((torch.get_deterministic_debug_mode(), switches.fill_uninitialized_memory))
        return stand_in_backward(*args, **window)

    monkeypatch.setattr(module.aten, "_flash_attention_backward", looking)
    q, k, v, cu_seqlens = packed(torch.float64)
    with deterministic_backward(on):
        out = attention(q.requires_grad_(), k, v, cu_seqlens)
    out.sum().backward()
    assert seen == [(2, False) if on else (0, True)]
    assert torch.get_deterministic_debug_mode() == 0 and switches.fill_uninitialized_memory


def test_which_path_is_taken(monkeypatch: pytest.MonkeyPatch):
    """CUDA flash attention takes 16-bit numbers and heads of a multiple of 8, on an Ampere card or a later one."""
    cards = {"capability": (8, 0)}
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(module, "capability", lambda _: cards["capability"])
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)

    def takes(dtype: torch.dtype = torch.bfloat16, size: int = 128) -> bool:
        q = SimpleNamespace(device=torch.device("cuda"), is_cuda=True, dtype=dtype, shape=(52, 6, size))
        return module._flash(q, q)  # pyright: ignore[reportArgumentType]

    assert takes() and takes(torch.float16) and takes(size=256)
    assert not takes(torch.float32) and not takes(size=100) and not takes(size=264)
    cards["capability"] = (8, 9)
    assert takes() and takes(size=192) and not takes(size=256)
    cards["capability"] = (7, 5)
    assert not takes()


@pytest.mark.parametrize(
    "card, size, importable, active, told",
    [
        ((9, 0), 128, True, "FA3", "FlashAttention 3"),
        ((9, 0), 256, True, "FA3", "FlashAttention 3"),
        ((9, 0), 128, False, None, "FlashAttention 2 (no 3: flash_attn_interface cannot be imported)"),
        ((10, 0), 128, True, "FA4", "FlashAttention 4"),
        ((10, 0), 192, True, None, "FlashAttention 2"),
        ((8, 0), 128, True, None, "FlashAttention 2"),
        ((12, 0), 128, True, None, "FlashAttention 2"),
        ((7, 5), 128, True, None, "PyTorch, a document at a time (no flash attention for heads of 128 in bfloat16)"),
    ],
)
def test_the_newest_flash_attention_is_taken_and_told(
    monkeypatch: pytest.MonkeyPatch, card: tuple[int, int], size: int, importable: bool, active: str | None, told: str
):
    """By torch's own registry, with its two entries doing nothing."""
    device, registry = torch.device("cuda"), torch.nn.attention._registry
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(module, "capability", lambda _: card)
    handle = SimpleNamespace(remove=lambda: None)
    for name, importing in ((name, importing) for name, importing, _ in module.NEWER.values()):
        monkeypatch.setitem(registry._FLASH_ATTENTION_IMPLS, name, lambda: handle)
        if importable:
            monkeypatch.setitem(sys.modules, importing, ModuleType(importing))
    try:
        module.use_newest_flash(device, size)
        module.use_newest_flash(torch.device("cpu"), size)
        assert torch.nn.attention.current_flash_attention_impl() == active
        q = SimpleNamespace(device=device, is_cuda=True, dtype=torch.bfloat16, shape=(1, 1, size))
        assert module.attention_path(q) == told  # pyright: ignore[reportArgumentType]
        with kernels(resolve({"deterministic": True})):
            assert ("in one order" in module.attention_path(q)) == told.startswith("Flash")  # pyright: ignore
    finally:
        torch.nn.attention.restore_flash_attention_impl()
