"""Causal attention over a flat stream of packed documents; no document sees another.

    out[t] = softmax(q[t] K^T / sqrt(E)) V    over the keys of t's own document at or before t

q [T, H, E], k and v [T, G, E] (H a multiple of G: grouped queries), cu_seqlens [S + 1] the bounds of the documents in
the stream. `window` limits a query to the last `window` keys, its own included. `prefix_lens` [S] makes it a prefix LM
(ChatGLM-6B): the first prefix_lens[i] tokens of document i all see each other.

The work is torch's own flash attention (Dao, 2023): on the CPU one call a document, on CUDA one call for the whole
stream, two for a prefix LM (varlen_bounds). The backward needs out and lse, the log-sum-exp of each query's scores. They are explicit here, so that a block
under activation checkpointing can keep them and need not attend again when it is recomputed:

    saved = attention_forward(q, k, v, cu_seqlens)          first pass, nothing recorded
    out = attention(q, k, v, cu_seqlens, saved=saved)        recomputation: saved's out, and the gradients of q, k and v

A mask over the whole stream would cost T^2; where a document needs one (window or prefix, on the CPU) it is that
document's own. CUDA flash attention takes fp16 and bf16; in all other cases F.scaled_dot_product_attention does one
document at a time and gives no lse: attention_forward then returns None for it, and attention attends again.

Proven on the CPU. The CUDA calls follow torch's varlen_attn; their arguments were tested on a stand-in, they have not
run on a GPU. Their backward adds up dq in any order, unless dispatch.deterministic_backward asks for one order.
"""

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache, reduce
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.kernels.dispatch import backward_is_deterministic, capability, check_same, once_differentiable

WIDE_BACKWARD = 256  # tokens of the longest document whose backward is computed in fp32 on a CPU
GROUPED_ON_CPU = torch.__version__ >= "2.9"  # flash attention there with fewer heads in k and v than in q
# by the capability of a card: torch's name of a newer flash attention, the module that brings it, its largest head
NEWER = {(9, 0): ("FA3", "flash_attn_interface", 256), (10, 0): ("FA4", "flash_attn.cute.interface", 128)}
UNKNOWN = ("", "", 0)
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
    bounds: Tensor | None = None  # varlen_bounds of them, on the device of q

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


def _whole(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


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


def varlen_bounds(cu_seqlens: Sequence[int], prefix_lens: Sequence[int] | None = None) -> Tensor:
    """What CUDA flash attention is told of the documents of a stream, int32: [1, S + 1], or [3, 3S + 1] with prefixes.

    Without prefixes the row is cu_seqlens. With them there are two calls, and to both a document is three pieces. The
    rows are the bounds of the queries of both calls, of the keys of the first, and of the keys of the second:

        queries         prefix   -        others
        first keys      prefix   others   -           each query of the prefix sees all of the prefix
        second keys     -        -        document    causal, the last query at the last key

    Queries without keys come out as zeros, and so do the gradients of keys without queries: the calls add up.
    """
    ends = torch.tensor(cu_seqlens, dtype=torch.int32)
    if prefix_lens is None:
        return ends[None]
    start, end = ends[:-1], ends[1:]
    seam = start + torch.tensor(prefix_lens, dtype=torch.int32)
    rows = ((seam, seam, end), (seam, end, end), (start, start, end))
    return F.pad(torch.stack([torch.stack(row, dim=1).flatten() for row in rows]), (1, 0))


@lru_cache(maxsize=8)  # every layer of a step asks for the same
def _calls(spec: MaskSpec, device: torch.device) -> list[tuple[tuple, dict[str, int]]]:
    """Arguments of each call: bounds and longest of queries and of keys, dropout, causal; and the window."""
    # of all pieces, and of those without queries, whose gradients are written too; at 1, FlashAttention 2 would take it
    # for granted that every piece has a query
    longest = max(2, *(end - start for start, end in pairwise(spec.cu_seqlens)))
    left = -1 if spec.window is None else spec.window - 1
    bounds = varlen_bounds(spec.cu_seqlens, spec.prefix_lens).to(device) if spec.bounds is None else spec.bounds
    queries, *keys = bounds.unbind()
    causal = (queries, (keys or [queries])[-1], longest, longest, 0.0, spec.window is None)
    calls = [(causal, {"window_size_left": left, "window_size_right": 0})]
    if keys:
        prefix = (queries, keys[0], longest, longest, 0.0, False)
        calls.insert(0, (prefix, {"window_size_left": -1, "window_size_right": -1}))
    return calls


def _cuda_forward(q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec) -> tuple[Tensor, Tensor]:
    """out [T, H, E] and lse [H, T], or [2 H, T] of two calls; the whole stream at once."""
    q, k, v = _side_by_side(q, k, v)
    found = [
        aten._flash_attention_forward(q, k, v, *form, False, **window)[:2] for form, window in _calls(spec, q.device)
    ]
    outs, sums = zip(*found, strict=True)
    return reduce(Tensor.add_, outs), _whole(sums)


def _cuda_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: MaskSpec
) -> tuple[Tensor, ...]:
    stream, rest = _side_by_side(dout, q, k, v, out), _no_dropout(q.device)
    calls = _calls(spec, q.device)
    grads = [
        aten._flash_attention_backward(*stream, part, *form, *rest, **window)
        for (form, window), part in zip(calls, lse.chunk(len(calls)), strict=True)
    ]
    return tuple(reduce(Tensor.add_, parts) for parts in zip(*grads, strict=True))


@lru_cache
def _no_dropout(device: torch.device) -> tuple[Tensor, Tensor]:
    """The state of a generator that draws nothing."""
    return torch.zeros(2, dtype=torch.uint64, device=device), torch.empty(0, device=device)


def _side_by_side(*stream: Tensor) -> tuple[Tensor, ...]:
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in stream)


@contextmanager
def _in_one_order() -> Iterator[None]:
    """Flash attention asks torch's switch for all operations whether it must add in one order."""
    switches: Any = torch.utils.deterministic
    mode, fill = torch.get_deterministic_debug_mode(), switches.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("error")
    switches.fill_uninitialized_memory = False  # all of it is written
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        switches.fill_uninitialized_memory = fill


def use_newest_flash(device: torch.device, size: int) -> None:
    """Let torch's flash attention be FlashAttention 3 on Hopper and 4 on Blackwell, for the whole process, where its
    package is installed and takes heads of that size."""
    name, module, largest = NEWER.get(capability(device), UNKNOWN) if device.type == "cuda" else UNKNOWN
    if size > largest or _active() == name or not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
        return
    try:
        importlib.import_module(module)
        torch.nn.attention.activate_flash_attention_impl(name)
    except (ImportError, OSError, RuntimeError):  # not installed, or built for another torch: attention_path says so
        return


def in_one_call(q: Tensor) -> bool:
    """Whether q [T, H, E] attends in calls for the whole stream on a GPU, whatever its documents are: a CUDA graph can hold them."""
    return q.is_cuda and _flash(q, q)


def attention_path(q: Tensor) -> str:
    """What attends for q [T, H, E] on a GPU, for the header of a run."""
    if not _flash(q, q):
        return f"PyTorch, a document at a time (no flash attention for heads of {q.shape[2]} in {str(q.dtype)[6:]})"
    name, module, largest = NEWER.get(capability(q.device), UNKNOWN)
    newer = q.shape[2] <= largest and name != _active()
    order = ", its backward in one order" if backward_is_deterministic() else ""
    return f"FlashAttention {_active()[2:]}{order}" + (
        f" (no {name[2:]}: {module} cannot be imported)" if newer else ""
    )


def _active() -> str:
    """torch's name of the flash attention that its operators run."""
    return getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)() or "FA2"


def _flash(q: Tensor, k: Tensor) -> bool:
    """Whether torch's flash attention takes this."""
    if q.device.type in ("cpu", "meta"):  # tensors without data are counted on the CPU's path
        return GROUPED_ON_CPU or q.shape[1] == k.shape[1]
    if not q.is_cuda or torch.version.cuda is None or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    version, size = capability(q.device), q.shape[2]
    wide = size <= 192 or (size <= 256 and version in ((8, 0), (9, 0)))  # other cards lack the room for the backward
    there = torch.backends.cuda.is_flash_attention_available() and torch.backends.cuda.flash_sdp_enabled()
    return there and version >= (8, 0) and wide and size % 8 == 0


class _Flash(torch.autograd.Function):
    """out and lse are from an earlier forward of the same q, k and v, or None."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec, out: Tensor | None, lse: Tensor | None) -> Tensor:
        saved = out is not None
        if out is None:
            out, lse = (_cuda_forward if q.is_cuda else _cpu_forward)(q, k, v, spec)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.spec, ctx.one_order = spec, backward_is_deterministic()
        return out.detach() if saved else out

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        with _in_one_order() if ctx.one_order else nullcontext():
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
    bounds: Tensor | None = None,
) -> Tensor:
    """Attend within each document of the stream: q [T, H, E], k, v [T, G, E] -> [T, H, E].

    `saved` is the result of attention_forward for the same arguments: its out is returned without computing anything,
    and the backward is that of the plain call to the bit. `bounds` are varlen_bounds of cu_seqlens and prefix_lens on the
    device of q; without them they are made here. ValueError for shapes, cu_seqlens, window or
    prefix_lens that do not fit.
    """
    spec = _checked(q, k, v, cu_seqlens, window, prefix_lens, bounds)
    if not _flash(q, k):
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
    bounds: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """out [T, H, E] of attention, without a gradient, and its log-sum-exp, or None where torch gives none."""
    spec = _checked(q, k, v, cu_seqlens, window, prefix_lens, bounds)
    if not _flash(q, k):
        return attention(q, k, v, cu_seqlens, window, prefix_lens), None
    return (_cuda_forward if q.is_cuda else _cpu_forward)(q, k, v, spec)


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: list[int],
    window: int | None,
    prefix_lens: list[int] | None,
    bounds: Tensor | None,
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
    return MaskSpec(tuple(cu_seqlens), window, None if prefix_lens is None else tuple(prefix_lens), bounds)


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
