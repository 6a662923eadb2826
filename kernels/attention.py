"""Causal attention over a flat stream of packed documents; no document sees another.

    out[t] = softmax(q[t] K^T / sqrt(E)) V    over the keys of t's own document at or before t

q [T, H, E], k and v [T, G, E] (H a multiple of G: grouped queries), cu_seqlens [S + 1] the bounds of the documents in
the stream. `window` limits a query to the last `window` keys, its own included. `prefix_lens` [S] makes it a prefix LM
(ChatGLM-6B): the first prefix_lens[i] tokens of document i all see each other.

The work is torch's own flash attention (Dao, 2023): on the CPU one call a document, on CUDA one call for the whole
stream. The backward needs out and lse, the log-sum-exp of each query's scores. They are explicit here, so that a block
under activation checkpointing can keep them and need not attend again when it is recomputed:

    saved = attention_forward(q, k, v, cu_seqlens)          first pass, nothing recorded
    out = attention(q, k, v, cu_seqlens, saved=saved)        recomputation: saved's out, and the gradients of q, k and v

A mask over the whole stream would cost T^2; where a document needs one (window or prefix, on the CPU) it is that
document's own. CUDA flash attention takes fp16 and bf16 and no prefix_lens; in all other cases
F.scaled_dot_product_attention does one document at a time and gives no lse: attention_forward then returns None for it,
and attention attends again.

Proven on the CPU. The CUDA call follows torch's varlen_attn; its arguments were tested on a stand-in, it has not run on
a GPU. Its backward adds up dq in any order unless torch.use_deterministic_algorithms is on.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.kernels.dispatch import capability, check_same, once_differentiable

WIDE_BACKWARD = 256  # tokens of the longest document whose backward is computed in fp32 on a CPU
GROUPED_ON_CPU = torch.__version__ >= "2.9"  # flash attention there with fewer heads in k and v than in q
aten = torch.ops.aten


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: list[int],
    window: int | None = None,
    prefix_lens: list[int] | None = None,
) -> Tensor:
    """The specification: one [T, T] mask, softmax in fp32 or wider."""
    tokens, heads, size = q.shape
    k, v = (x.repeat_interleave(heads // k.shape[1], dim=1) for x in (k, v))
    position = torch.arange(tokens, device=q.device)
    document = torch.bucketize(position, torch.tensor(cu_seqlens[1:], device=q.device), right=True)
    seen = position[:, None] >= position
    if window is not None:
        seen &= position[:, None] - position < window
    if prefix_lens is not None:
        end = torch.tensor(cu_seqlens[:-1], device=q.device) + torch.tensor(prefix_lens, device=q.device)
        seen |= position < end[document]
    seen &= document[:, None] == document
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("qhe,khe->hqk", q.to(wide), k.to(wide)) * size**-0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khe->qhe", weights, v.to(wide)).to(q.dtype)


class MaskSpec(NamedTuple):
    """Which keys a query sees."""

    cu_seqlens: tuple[int, ...]
    window: int | None
    prefix_lens: tuple[int, ...] | None

    def documents(self, device: torch.device) -> Iterator[tuple[slice, Tensor | None]]:
        """The slice of each document in the stream, and its mask; None is causal."""
        lengths = [end - start for start, end in pairwise(self.cu_seqlens)]
        for start, n, prefix in zip(self.cu_seqlens, lengths, self.prefix_lens or [0] * len(lengths), strict=False):
            if n:
                yield slice(start, start + n), _mask(n, n, self.window, prefix, device)


def _mask(queries: int, keys: int, window: int | None, prefix: int, device: torch.device) -> Tensor | None:
    """[queries, keys], true where a query sees a key; the queries are the last keys. None where that is causal."""
    if queries == keys and (window is None or window >= keys) and prefix < 2:
        return None
    position = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)
    seen = key <= position
    if window is not None:
        seen &= position - key < window
    return seen | (key < prefix) if prefix else seen


def _heads_first(*stream: Tensor) -> tuple[Tensor, ...]:
    """[T, H, E] as torch's attention has it: [1, H, T, E]."""
    return tuple((x if x.stride(-1) == 1 else x.contiguous()).transpose(0, 1).unsqueeze(0) for x in stream)


def _whole(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if mask is None else torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec) -> tuple[Tensor, Tensor]:
    """out [T, H, E] and lse [T, H], one document at a time."""
    outs, sums = [], []
    for span, mask in spec.documents(q.device):
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            *_heads_first(q[span], k[span], v[span]), 0.0, mask is None, attn_mask=_additive(mask, q.dtype)
        )
        outs.append(out.squeeze(0).transpose(0, 1))
        sums.append(lse.squeeze(0).transpose(0, 1))
    return _whole(outs), _whole(sums)


def _cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: MaskSpec
) -> tuple[Tensor, ...]:
    grads = []
    for span, mask in spec.documents(q.device):
        # torch's 16-bit backward is up to eight times slower than its fp32 one on short documents
        wide = q.element_size() == 2 and span.stop - span.start <= WIDE_BACKWARD
        dtype = torch.float32 if wide else q.dtype
        stream = (x[span].to(dtype) for x in (dout, q, k, v, out))
        parts = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *_heads_first(*stream),
            lse[span].transpose(0, 1).unsqueeze(0),
            0.0,
            mask is None,
            attn_mask=_additive(mask, dtype),
        )
        grads.append([part.squeeze(0).transpose(0, 1).to(q.dtype) for part in parts])
    return tuple(_whole(list(parts)) for parts in zip(*grads, strict=True))


@lru_cache(maxsize=8)  # every layer of a step asks for the same
def _stream_form(spec: MaskSpec, device: torch.device) -> tuple[tuple, dict]:
    """Arguments of CUDA flash attention: bounds and longest of queries and of keys, dropout, causal; the window."""
    bounds = torch.tensor(spec.cu_seqlens, dtype=torch.int32, device=device)
    longest = max(end - start for start, end in pairwise(spec.cu_seqlens))
    causal = spec.window is None
    window = {"window_size_left": -1 if spec.window is None else spec.window - 1, "window_size_right": 0}
    return (bounds, bounds, longest, longest, 0.0, causal), window


def _cuda_forward(q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec) -> tuple[Tensor, Tensor]:
    """out [T, H, E] and lse [H, T], the whole stream at once."""
    form, window = _stream_form(spec, q.device)
    out, lse, *_ = aten._flash_attention_forward(*_side_by_side(q, k, v), *form, False, **window)
    return out, lse


def _cuda_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: MaskSpec
) -> tuple[Tensor, ...]:
    form, window = _stream_form(spec, q.device)
    return aten._flash_attention_backward(
        *_side_by_side(dout, q, k, v, out), lse, *form, *_no_dropout(q.device), **window
    )


@lru_cache
def _no_dropout(device: torch.device) -> tuple[Tensor, Tensor]:
    """The state of a generator that draws nothing."""
    return torch.zeros(2, dtype=torch.uint64, device=device), torch.empty(0, device=device)


def _side_by_side(*stream: Tensor) -> tuple[Tensor, ...]:
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in stream)


def _flash(q: Tensor, k: Tensor, spec: MaskSpec) -> bool:
    """Whether torch's flash attention takes this."""
    if q.device.type in ("cpu", "meta"):  # tensors without data are counted on the CPU's path
        return GROUPED_ON_CPU or q.shape[1] == k.shape[1]
    if not q.is_cuda or torch.version.cuda is None or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    version, size = capability(q.device), q.shape[2]
    wide = size <= 192 or (size <= 256 and version in ((8, 0), (9, 0)))  # other cards lack the room for the backward
    there = torch.backends.cuda.is_flash_attention_available() and torch.backends.cuda.flash_sdp_enabled()
    return there and version >= (8, 0) and wide and size % 8 == 0 and spec.prefix_lens is None


class _Flash(torch.autograd.Function):
    """out and lse are from an earlier forward of the same q, k and v, or None."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec, out: Tensor | None, lse: Tensor | None) -> Tensor:
        saved = out is not None
        if out is None:
            out, lse = (_cuda_forward if q.is_cuda else _cpu_forward)(q, k, v, spec)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.spec = spec
        return out.detach() if saved else out

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        all_three = (_cuda_backward if q.is_cuda else _cpu_backward)(grads[0], q, k, v, out, lse, ctx.spec)
        wanted = (g if needed else None for g, needed in zip(all_three, ctx.needs_input_grad, strict=False))
        return *wanted, None, None, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: list[int],
    window: int | None = None,
    prefix_lens: list[int] | None = None,
    saved: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:
    """Attend within each document of the stream: q [T, H, E], k, v [T, G, E] -> [T, H, E].

    `saved` is the result of attention_forward for the same arguments: its out is returned without computing anything,
    and the backward is that of the plain call to the bit. ValueError for shapes, cu_seqlens, window or prefix_lens that
    do not fit.
    """
    spec = _checked(q, k, v, cu_seqlens, window, prefix_lens)
    if not _flash(q, k, spec):
        return _whole([_sdpa(q[span], k[span], v[span], mask) for span, mask in spec.documents(q.device)])
    out, lse = (None, None) if saved is None else saved
    return _Flash.apply(q, k, v, spec, out, lse)  # pyright: ignore[reportReturnType]


@torch.no_grad()
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: list[int],
    window: int | None = None,
    prefix_lens: list[int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """out [T, H, E] of attention, without a gradient, and its log-sum-exp, or None where torch gives none."""
    spec = _checked(q, k, v, cu_seqlens, window, prefix_lens)
    if not _flash(q, k, spec):
        return attention(q, k, v, cu_seqlens, window, prefix_lens), None
    return (_cuda_forward if q.is_cuda else _cpu_forward)(q, k, v, spec)


def _checked(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], window: int | None, prefix_lens: list[int] | None
) -> MaskSpec:
    check_same("attention", q=q, k=k, v=v)
    if q.dim() != 3 or k.shape != v.shape or k.shape != (q.shape[0], k.shape[1], q.shape[2]) or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"attention: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; "
            "it takes [T, H, E] and twice [T, G, E], H a multiple of G"
        )
    lengths = [end - start for start, end in pairwise(cu_seqlens)]
    if not lengths or cu_seqlens[0] != 0 or cu_seqlens[-1] != q.shape[0] or min(lengths) < 0 or q.shape[0] == 0:
        raise ValueError(f"attention: cu_seqlens {cu_seqlens} must go up from 0 to the {q.shape[0]} tokens")
    if window is not None and (window < 1 or prefix_lens is not None):
        raise ValueError(
            f"attention: window is {window}; it must be positive, and there are no prefix_lens beside a window"
        )
    if prefix_lens is not None and (
        len(prefix_lens) != len(lengths) or not all(0 <= p <= n for p, n in zip(prefix_lens, lengths, strict=True))
    ):
        raise ValueError(f"attention: prefix_lens {prefix_lens} must lie within documents of {lengths} tokens")
    return MaskSpec(tuple(cu_seqlens), window, None if prefix_lens is None else tuple(prefix_lens))


def attention_cached(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """The last T tokens of one document attend to all its L keys so far: q [T, H, E], k, v [L, G, E] -> [T, H, E]."""
    if q.shape[0] > 1:
        return _sdpa(q, k, v, _mask(q.shape[0], k.shape[0], window, 0, q.device))
    if window is not None:
        k, v = k[-window:], v[-window:]
    return _one_query(q, k[None], v[None], None)


def attention_decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, window: int | None = None) -> Tensor:
    """The last token of each of S documents attends to its first lengths[i] keys: q [S, H, E], k, v [S, L, G, E] -> [S, H, E]."""
    key, end = torch.arange(k.shape[1], device=q.device), lengths[:, None]
    seen = key < end
    if window is not None:
        seen &= key >= end - window
    return _one_query(q, k, v, seen[:, None, None])


def _one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The heads of a group are its queries, so no key is repeated."""
    grouped = q.unflatten(1, (k.shape[2], -1))  # [S, G, H / G, E]
    return F.scaled_dot_product_attention(grouped, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask).flatten(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = _heads_first(q, k, v)
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return out.squeeze(0).transpose(0, 1)


def example(
    lengths: list[int], heads: int, groups: int, size: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[tuple, dict]:
    """Arguments of one call, and the flops that a perfect causal forward needs."""
    tokens = sum(lengths)
    q = torch.randn(tokens, heads, size, device=device, dtype=dtype)
    k, v = (torch.randn(tokens, groups, size, device=device, dtype=dtype) for _ in range(2))
    cu_seqlens = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return (q, k, v, cu_seqlens), {"flops": sum(2 * heads * size * n * (n + 1) for n in lengths)}
