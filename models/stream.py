"""A flat stream of tokens: its documents, the batch that a step learns from, and what blocks need beside x."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minilora.kernels.attention import attention, attention_forward, varlen_bounds
from minilora.kernels.dispatch import to_device

from .config import Config

if TYPE_CHECKING:
    from .cache import Cache
    from .virtual import Past


@dataclass(frozen=True)
class Documents:
    """The documents of a stream of T tokens, laid end to end without padding.

    cu_seqlens [S + 1] are their bounds, from 0 to T (FlashAttention's name). positions int64 [T] restart at each document. In a
    prefix LM the first prefix_lens[i] tokens of document i all see each other, and positions are [2, T]; None: all is causal.
    A cache keeps their keys and values, if there is one; prompt_lens are the lengths of the prompts, set where documents
    continue from the cache. past is a prefix of trained keys and values before each document. bounds are varlen_bounds (attention.py), which the layers of a GPU share.
    """

    cu_seqlens: list[int]
    positions: Tensor
    prefix_lens: list[int] | None = None
    cache: Cache | None = None
    prompt_lens: list[int] | None = None
    bounds: Tensor | None = None
    past: Past | None = None

    @staticmethod
    def of(
        lengths: Sequence[int], prefix_lens: list[int] | None = None, starts: Sequence[int] | None = None
    ) -> Documents:
        """Documents of these lengths; with starts, document i continues after starts[i] tokens that a cache holds."""
        cu_seqlens, parts = [0], []
        for i, length in enumerate(lengths):
            start = starts[i] if starts else 0
            cu_seqlens.append(cu_seqlens[-1] + length)
            parts.append(_positions(start, start + length, prefix_lens[i] if prefix_lens else None))
        return Documents(cu_seqlens, torch.cat(parts, dim=-1), prefix_lens)

    @property
    def lengths(self) -> list[int]:
        return [end - start for start, end in pairwise(self.cu_seqlens)]

    def to(self, device: torch.device | None) -> Documents:
        bounds = to_device(varlen_bounds(self.cu_seqlens, self.prefix_lens), device)
        return replace(self, positions=to_device(self.positions, device), bounds=bounds)


def _positions(start: int, end: int, prefix_len: int | None) -> Tensor:
    """Positions [n] of the tokens from start to end of a document; [2, n] where it begins with a bidirectional prefix.

    Then the first row counts the prefix and stays at its last token, and the second row counts from 1 what follows it
    (the 2-D positions of GLM; Du et al., 2022).
    """
    position = torch.arange(start, end)
    if prefix_len is None:
        return position
    return torch.stack((position.clamp(max=prefix_len - 1), (position - prefix_len + 1).clamp(min=0)))


@dataclass(frozen=True)
class Batch:
    """A stream to learn from: ids int64 [T]; targets[i] is the token to predict at position target_index[i], both int64 [M].

    where names the row that each document came from.
    """

    ids: Tensor
    documents: Documents
    target_index: Tensor
    targets: Tensor
    where: list[str]

    def to(self, device: torch.device) -> Batch:
        if self.ids.device == device:
            return self
        ids, index, targets = (to_device(x, device) for x in (self.ids, self.target_index, self.targets))
        return Batch(ids, self.documents.to(device), index, targets, self.where)


def inverse_frequencies(c: Config, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Rotary frequencies [P/2] in fp32 (fp64 if dtype is) and the factor on cos and sin, P = c.rotary.

    Positions rotate by them (Su et al., 2021); YaRN slows the slow ones down (Peng et al., 2023).
    """
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, c.rotary, 2, device=device, dtype=torch.int64).to(wide) / c.rotary
    frequencies = 1.0 / c.rope_theta**exponents / c.rope_scale
    yarn = c.yarn
    if yarn is None:
        return frequencies, 1.0

    def dimension(rotations: float) -> float:  # the dimension index with this many rotations over original_length
        return c.rotary * math.log(yarn.original_length / (rotations * 2 * math.pi)) / (2 * math.log(c.rope_theta))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, c.rotary - 1)
    ramp = (torch.arange(c.rotary // 2, device=device, dtype=wide) - low) / max(high - low, 0.001)
    slow = ramp.clamp(0, 1)
    return frequencies / yarn.factor * slow + frequencies * (1 - slow), yarn.attention_factor


@dataclass
class Context:
    """What the blocks of a forward pass read beside x: rotary angles and the documents."""

    cos: Tensor  # [T, P/2]; [T, 2, P/2] for two rows of positions
    sin: Tensor
    documents: Documents
    logn_scale: Tensor | None = None  # [T, 1, 1], on the queries of long documents (Qwen-1)
    # of a block that is recomputed: attention's output and log-sum-exp, which the first pass leaves here
    saved_attention: list[tuple[Tensor, Tensor | None]] | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        """Attention of a layer: q [T, H, E], k and v [T, G, E] of the new tokens -> [T, H, E]."""
        if self.documents.past is not None:
            return self.documents.past.attend(self, layer, q, k, v, window)
        if self.documents.cache is not None:
            self.documents.cache.store(layer, k, v)
            if self.documents.prompt_lens is not None:  # decoding: attend to the cache
                return self.documents.cache.attend(layer, q, window)
        d = self.documents
        form = {"window": window, "prefix_lens": d.prefix_lens, "bounds": d.bounds}
        if self.saved_attention is None:
            return attention(q, k, v, d.cu_seqlens, **form)
        if torch.is_grad_enabled():
            return attention(q, k, v, d.cu_seqlens, **form, saved=self.saved_attention[0])
        self.saved_attention.append(attention_forward(q, k, v, d.cu_seqlens, **form))
        return self.saved_attention[0][0]
