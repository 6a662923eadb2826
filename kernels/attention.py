"""Causal attention over a flat stream of packed documents; no document sees another.

    out[t] = softmax(q[t] K^T / sqrt(E)) V    over the keys of t's own document at or before t

q [T, H, E], k and v [T, G, E] (H a multiple of G: grouped queries), seams [S + 1] the documents' bounds in the stream
(cu_seqlens). `window` limits a query to the last `window` keys, itself included. With prefixes, the first prefixes[i] tokens
of document i see each other (prefix LM). The work is torch's fused scaled dot product, one call a document: a block mask over
the whole stream would cost T^2.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_ref(
    q: Tensor, k: Tensor, v: Tensor, seams: list[int], window: int | None = None, prefixes: list[int] | None = None
) -> Tensor:
    """The specification: one [T, T] mask, softmax in fp32 or wider."""
    tokens, heads, size = q.shape
    k, v = (x.repeat_interleave(heads // k.shape[1], dim=1) for x in (k, v))
    place = torch.arange(tokens, device=q.device)
    document = torch.bucketize(place, torch.tensor(seams[1:], device=q.device), right=True)
    seen = (document[:, None] == document) & (place[:, None] >= place)
    if window is not None:
        seen &= place[:, None] - place < window
    if prefixes is not None:
        ends = torch.tensor([start + n for start, n in zip(seams, prefixes, strict=False)], device=q.device)[document]
        seen |= (document[:, None] == document) & (place < ends)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("qhe,khe->hqk", q.to(wide), k.to(wide)) * size**-0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khe->qhe", weights, v.to(wide)).to(q.dtype)


def attention(
    q: Tensor, k: Tensor, v: Tensor, seams: list[int], window: int | None = None, prefixes: list[int] | None = None
) -> Tensor:
    """Attend within each document of the stream: q [T, H, E], k, v [T, G, E] -> [T, H, E]."""
    assert seams[0] == 0 and seams[-1] == q.shape[0], (seams, q.shape)
    lengths = [end - start for start, end in pairwise(seams)]
    bounds = [0] * len(lengths) if prefixes is None else prefixes
    if len(lengths) == 1:
        return _one_document(q, k, v, window, bounds[0])
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), bounds, strict=True)
    return torch.cat([_one_document(*part[:3], window, part[3]) for part in parts])


def attention_cached(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """The last T tokens of one document attend to all its L keys so far: q [T, H, E], k, v [L, G, E] -> [T, H, E]."""
    if k.shape[0] == q.shape[0]:
        return _one_document(q, k, v, window, 0)
    if q.shape[0] == 1:
        return _one_query(q, *((k, v) if window is None else (k[-window:], v[-window:])))
    return _sdpa(q, k, v, mask=_causal_mask(q.shape[0], k.shape[0], window, q.device))


def _one_document(q: Tensor, k: Tensor, v: Tensor, window: int | None, prefix: int) -> Tensor:
    if prefix:
        place = torch.arange(q.shape[0], device=q.device)
        return _sdpa(q, k, v, mask=(place <= place[:, None]) | (place < prefix))
    if window is not None and window < q.shape[0]:
        return _sdpa(q, k, v, mask=_causal_mask(q.shape[0], q.shape[0], window, q.device))
    return _sdpa(q, k, v, mask=None)


def _one_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One token looks at every key: q [1, H, E] -> [1, H, E]. The heads of a group stand as its queries: no mask, no repeats."""
    grouped = q.view(k.shape[1], -1, q.shape[2]).unsqueeze(0)  # [1, G, H / G, E]
    k, v = (x.transpose(0, 1).unsqueeze(0) for x in (k, v))
    return F.scaled_dot_product_attention(grouped, k, v).view(q.shape)


def _causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, keys], true where a query may look; the queries are the last of the keys."""
    place = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)
    seen = key <= place
    return seen if window is None else seen & (place - key < window)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, heads, tokens, E]
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
    seams = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return (q, k, v, seams), {"flops": sum(2 * heads * size * n * (n + 1) for n in lengths)}
