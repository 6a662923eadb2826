"""The cache of decoding: keys and values, and the states of layers that have one instead."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from minilora.kernels.attention import attention_cached, attention_decode

from .stream import Documents
from .virtual import Virtual


class Cache:
    """Keys and values of up to `slots` documents, which fill the first slots: for each layer [2, slots, capacity, G, E].

    `start` and `extend` prepare a pass of the model and return its documents.
    """

    def __init__(
        self, layers: int, slots: int = 1, device: torch.device | None = None, virtual: nn.Module | None = None
    ):
        """virtual: the Decoder's, whose rows are the first of every document."""
        self.slots, self.device, self.capacity = slots, device, 0
        self.virtual = cast(Virtual, virtual).count if virtual is not None else 0
        self._counted = self.virtual if virtual is not None and cast(Virtual, virtual).counted else 0
        # by slot: tokens, prompt length, and length of the bidirectional prefix in a prefix LM
        self.lengths: list[int] = []
        self.prompt_lens: list[int] = []
        self.prefix_lens: list[int] = []
        self._stored: list[Tensor | None] = [None] * layers
        self._states: dict[int, tuple[Tensor, ...]] = {}
        self._lengths = self._targets = torch.empty(0)

    def start(self, lengths: list[int], prefix_lens: list[int] | None = None) -> Documents:
        """Prefill: add new documents, and return them for the pass."""
        self.lengths += [n + self.virtual for n in lengths]
        self.prompt_lens += [n + self._counted for n in lengths]
        self.prefix_lens += [n + self._counted for n in prefix_lens or []]
        self._prepare([n + self.virtual for n in lengths])
        return replace(Documents.of(lengths, prefix_lens), cache=self).to(self.device)

    def extend(self, tokens: int = 1) -> Documents:
        """Decode: one more token for every document, or several for the only one."""
        assert tokens == 1 or len(self.lengths) == 1, (tokens, self.lengths)
        new, starts = [tokens] * len(self.lengths), [n - self.virtual + self._counted for n in self.lengths]
        self.lengths = [n + tokens for n in self.lengths]
        self._prepare(new)
        documents = Documents.of(new, self.prefix_lens or None, starts)
        return replace(documents, cache=self, prompt_lens=self.prompt_lens).to(self.device)

    def _prepare(self, new: list[int]) -> None:
        """Grow the capacity, and find where the new tokens of the last documents go; `lengths` counts them already."""
        if max(self.lengths) > self.capacity:
            self.capacity = max(self.lengths) * 5 // 4 + 64
        ends = [slot * self.capacity + n for slot, n in enumerate(self.lengths)][-len(new) :]
        targets = [i for end, n in zip(ends, new, strict=True) for i in range(end - n, end)]
        # where each new token goes, if the slots are laid end to end (vLLM's slot mapping)
        self._targets = torch.tensor(targets, device=self.device)
        self._lengths = torch.tensor(self.lengths, device=self.device)

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keep the k and v [T, G, E] of the new tokens in a layer."""
        stored = self._stored[layer]
        if stored is None or stored.shape[2] < self.capacity:
            # zeros: a masked value has the weight 0, and 0 x garbage could be NaN
            grown = k.new_zeros(2, self.slots, self.capacity, *k.shape[1:])
            if stored is not None:
                grown[:, :, : stored.shape[2]] = stored
            stored = self._stored[layer] = grown
        for kept, fresh in zip(stored.flatten(1, 2), (k, v), strict=True):
            kept.index_copy_(0, self._targets, fresh)

    def attend(self, layer: int, q: Tensor, window: int | None) -> Tensor:
        """Attention of the new tokens q [T, H, E] to all tokens of their documents -> [T, H, E]."""
        stored = self._stored[layer]
        assert stored is not None, layer
        k, v = stored[:, : len(self.lengths), : max(self.lengths)]
        if len(self.lengths) == 1:  # a single document: nothing to mask
            return attention_cached(q, k[0], v[0], window)
        return attention_decode(q, k, v, self._lengths, window)

    def states(self, layer: int) -> tuple[Tensor, ...]:
        """What a layer kept, [documents, ...] each."""
        return tuple(t[: len(self.lengths)] for t in self._states[layer])

    def keep(self, layer: int, *states: Tensor) -> None:
        """Keep states [n, ...] of the last n documents in a layer."""
        if layer not in self._states:
            self._states[layer] = tuple(t.new_zeros(self.slots, *t.shape[1:]) for t in states)
        for kept, fresh in zip(self._states[layer], states, strict=True):
            kept[len(self.lengths) - len(fresh) : len(self.lengths)] = fresh

    def remove(self, slot: int) -> None:
        """Take a document out; the last one moves into its slot."""
        last = len(self.lengths) - 1
        for stored in self._stored:
            if stored is not None and slot != last:
                stored[:, slot] = stored[:, last]
        for kept in (t for of_layer in self._states.values() for t in of_layer):
            kept[slot] = kept[last]
        for of_documents in (self.lengths, self.prompt_lens, self.prefix_lens):
            of_documents[slot : slot + 1] = of_documents[last:]  # prefix_lens may be empty
            del of_documents[last:]
