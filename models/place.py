"""Where the tokens of a forward pass stand: rotary angles, the documents of the stream, and the keys and values so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minilora.kernels.attention import attention, attention_cached, attention_forward


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
        self.prompts: list[int] = []  # tokens of the first pass, of each document
        self.prefixes: list[int] | None = None  # how many of them see each other, where not all is causal
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
        keys, values = store
        keys[self.length : end] = k
        values[self.length : end] = v
        return keys[:end], values[:end]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Attention of new tokens q [T, H, E] to what `extend` gave -> [T, H, E]."""
        return attention_cached(q, k, v, window)
