"""Where tokens stand: positions and rotary angles, the documents of a stream, and the keys and values so far."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minilora.kernels.attention import attention, attention_cached, attention_forward

from .config import Config


def inverse_frequencies(c: Config, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Rotary frequencies [P/2] in fp32 (fp64 if dtype is) and the factor on cos and sin, YaRN applied; P is c.rotary."""
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, c.rotary, 2, device=device, dtype=torch.int64).to(wide) / c.rotary
    frequencies = 1.0 / c.rope_theta**exponents / c.rope_scale
    yarn = c.yarn
    if yarn is None:
        return frequencies, 1.0

    def dimension(rotations: float) -> float:  # the dimension that turns so often over the original length
        return c.rotary * math.log(yarn.original_length / (rotations * 2 * math.pi)) / (2 * math.log(c.rope_theta))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, c.rotary - 1)
    ramp = (torch.arange(c.rotary // 2, device=device, dtype=wide) - low) / max(high - low, 0.001)
    slow = ramp.clamp(0, 1)
    return frequencies / yarn.factor * slow + frequencies * (1 - slow), yarn.attention_factor


def positions_of(start: int, end: int, prefix: int | None = None, device: torch.device | None = None) -> Tensor:
    """Positions int64 [n] of the tokens from start to end of a document; [2, n] where it has a bidirectional prefix.

    Then the first row counts the prefix and stands still at its last token, and the second row counts what follows from 1
    (the 2-D positions of GLM; Du et al., 2022).
    """
    place = torch.arange(start, end, device=device)
    if prefix is None:
        return place
    return torch.stack((place.clamp(max=prefix - 1), (place - prefix + 1).clamp(min=0)))


@dataclass
class Place:
    """Where the tokens of a forward pass stand: rotary angles, the documents' bounds, and the key/value cache if there is one."""

    cos: Tensor  # [T, P/2]; [T, 2, P/2] for two rows of positions
    sin: Tensor
    seams: list[int]
    prefixes: list[int] | None = None  # of each document, how many first tokens see each other; None: causal throughout
    cache: Cache | None = None
    stretch: Tensor | None = None  # [T, 1, 1], factors on the queries of long documents (Qwen-1)
    kept: list[tuple[Tensor, Tensor | None]] | None = (
        None  # of a block that is recomputed: what attention gave, if it has
    )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        """Attention of a layer: q [T, H, E], k and v [T, G, E] of the new tokens -> [T, H, E]."""
        if self.cache is not None:
            k, v = self.cache.extend(layer, k, v)
            if self.cache.length:
                return self.cache.attend(q, k, v, window)
        if self.kept is None:
            return attention(q, k, v, self.seams, window, self.prefixes)
        if torch.is_grad_enabled():
            return attention(q, k, v, self.seams, window, self.prefixes, self.kept[0])
        self.kept.append(attention_forward(q, k, v, self.seams, window, self.prefixes))
        return self.kept[0][0]


class Cache:
    """Keys and values of one document so far, for each layer [length, G, E]; grows by doubling."""

    def __init__(self, layers: int):
        self.length = 0
        self.prompt = 0  # tokens of the first pass
        self.prefix: int | None = None  # how many of them see each other, where not all is causal
        self._store: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new tokens' k and v [T, G, E] of a layer; return all of that layer's."""
        end = self.length + k.shape[0]
        store = self._store[layer]
        if store is None or store[0].shape[0] < end:
            bigger = (
                k.new_empty(max(2 * end, 64), *k.shape[1:]),
                v.new_empty(max(2 * end, 64), *v.shape[1:]),
            )
            if store is not None:
                for new, old in zip(bigger, store, strict=True):
                    new[: self.length] = old[: self.length]
            store = self._store[layer] = bigger
        for kept, new in zip(store, (k, v), strict=True):
            kept[self.length : end] = new
        return store[0][:end], store[1][:end]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Attention of new tokens q [T, H, E] to what `extend` gave -> [T, H, E]."""
        return attention_cached(q, k, v, window)
