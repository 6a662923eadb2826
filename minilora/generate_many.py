"""Answers to many prompts at once: prompts are packed into one stream, then every pass adds a token to each open answer.

A pass computes the new tokens of the open documents and nothing else; a document that ends makes room for the next prompt at
once. Keys and values lie in slots of one length, so that one attention call serves all; the empty ends of slots are masked.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.models.decoder import Decoder
from minilora.models.stream import Cache, Documents

from .generate import GREEDY, Sampling, choose

PREFILL_TOKENS = 8192  # most prompt tokens of one pass


class Slots(Cache):
    """Keys and values of several documents, for each layer [slots, capacity, G, E]; documents lie in the first slots.

    `length` is 0 in a pass of new documents, which come after those that are there, and not in a pass of one token each.
    """

    def __init__(self, layers: int, slots: int):
        super().__init__(layers)
        self.slots = slots
        self.lengths: list[int] = []  # of the documents before this pass
        self.prompt_of: list[int] = []  # of each of them the tokens of its first pass, and its bidirectional prefix
        self.prefix_of: list[int] = []
        self.new: list[int] = []  # tokens of each new document of this pass
        self.place = self.ends = torch.empty(0)

    def begin(self, new: list[int], device: torch.device) -> None:
        """Get ready for a pass of new documents of these lengths or, if there are none, of a token for each document."""
        self.new, self.length = new, 0 if new else 1
        if not new:
            self.prompt_lens, self.prefix_lens = self.prompt_of, self.prefix_of or None
        self.ends = torch.tensor(self.lengths, device=device)
        self.place = torch.arange(len(self.lengths), device=device)

    def finish(self) -> None:
        """The pass is through all layers."""
        if self.new:
            self.lengths = [*self.lengths, *self.new]
            self.prompt_of, self.prefix_of = [*self.prompt_of, *self.new], [*self.prefix_of, *(self.prefix_lens or ())]
        else:
            self.lengths = [n + 1 for n in self.lengths]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v [T, G, E]; returns them for new documents, else all of the documents' [n, longest, G, E]."""
        longest = max(self.new, default=0) if self.new else max(self.lengths) + 1
        store = self._room(layer, longest, k, v)
        if self.new:
            for kept, fresh in zip(store, (k, v), strict=True):
                for slot, part in enumerate(fresh.split(self.new), len(self.lengths)):
                    kept[slot, : len(part)] = part
            return k, v
        for kept, fresh in zip(store, (k, v), strict=True):
            kept[self.place, self.ends] = fresh
        return store[0][: len(self.lengths), :longest], store[1][: len(self.lengths), :longest]

    def _room(self, layer: int, longest: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        store = self._store[layer]
        if store is None or store[0].shape[1] < longest:
            capacity = longest + longest // 4 + 64
            # zeros: 0 x garbage could be NaN where the mask is
            bigger = tuple(x.new_zeros(self.slots, capacity, *x.shape[1:]) for x in (k, v))
            for new, old in zip(bigger, store or (), strict=False):
                new[:, : old.shape[1]] = old
            store = self._store[layer] = (bigger[0], bigger[1])
        return store

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """One token q [n, H, E] of each document looks at its own keys k, v [n, longest, G, E] -> [n, H, E]."""
        key = torch.arange(k.shape[1], device=q.device)
        seen = key <= self.ends[:, None]
        if window is not None:
            seen &= key > self.ends[:, None] - window
        grouped = q.unflatten(1, (k.shape[2], -1))  # the heads of a group stand as its queries
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=seen[:, None, None]).flatten(1, 2)

    def remove(self, slot: int) -> None:
        """Take a document out; the last one moves into its slot."""
        last = len(self.lengths) - 1
        for store in self._store:
            for kept in store or ():
                kept[slot, : self.lengths[last]] = kept[last, : self.lengths[last]]
        for of_documents in (self.lengths, self.prompt_of, self.prefix_of):
            of_documents[slot : slot + 1] = of_documents[last:]  # nothing where there are no prefixes
            del of_documents[last:]


class Answer(NamedTuple):
    """What followed prompt `number`: ids without the stop token, and whether max_tokens ended it."""

    number: int
    ids: list[int]
    cut: bool


@dataclass
class _Open:
    """An answer that is being written."""

    number: int
    prompt: list[int]
    generator: torch.Generator
    ids: list[int] = field(default_factory=list)


@torch.inference_mode()
def generate_many(
    model: Decoder,
    prompts: list[list[int]],
    stop: set[int],
    max_tokens: int,
    slots: int = 16,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    numbers: list[int] | None = None,
    halt: Callable[[], bool] | None = None,
) -> Iterator[Answer]:
    """The answers to prompts in the order in which they end, `slots` at a time, the longest prompts first.

    `numbers` are the names of the prompts, by default 0, 1, ...; a prompt's draws follow from (seed, number) alone. Greedy answers are those of one prompt alone
    up to the rounding of the model's dtype. `halt` is asked before every pass: True ends everything, open answers are lost.
    """
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    cache = Slots(model.config.layers, slots)
    running: list[_Open] = []
    while (waiting or running) and not (halt and halt()):
        new: list[_Open] = []
        while waiting and len(running) + len(new) < slots:
            tokens = sum(len(o.prompt) for o in new) + len(prompts[waiting[-1]])
            if new and tokens > PREFILL_TOKENS:
                break
            place = waiting.pop()
            number = numbers[place] if numbers else place
            new.append(_Open(number, prompts[place], random_of(seed, number)))
        logits = _pass(model, cache, [o.prompt for o in new] or [o.ids[-1:] for o in running], bool(new))
        first = len(running) if new else 0
        running += new
        tokens = _choose(logits, running[first:], sampling)
        for slot in reversed(range(first, len(running))):
            answer, token = running[slot], tokens[slot - first]
            if token not in stop:
                answer.ids.append(token)
            if token in stop or len(answer.ids) == max_tokens:
                yield Answer(answer.number, answer.ids, token not in stop)
                cache.remove(slot)
                running[slot] = running[-1]
                running.pop()


def random_of(seed: int, number: int) -> torch.Generator:
    """The generator of the draws of prompt `number`."""
    # torch's CPU generator takes 32 bits of its seed: a sum or a shift would lose one of the two
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))


def _pass(model: Decoder, cache: Slots, documents: list[list[int]], new: bool) -> Tensor:
    """Logits [documents, V] after the last token of each."""
    device = model.head.device
    lengths = [len(d) for d in documents]
    starts = None if new else list(cache.lengths)
    cache.begin(lengths if new else [], device)
    ids = torch.tensor([i for d in documents for i in d], device=device)
    if new:
        prefix_lens = [n for d in documents for n in model.prefix_lens(torch.tensor(d)) or ()] or None
    else:
        prefix_lens = cache.prefix_lens
    stream = Documents.of(lengths, prefix_lens, starts)
    last = torch.tensor(stream.cu_seqlens[1:], device=device) - 1
    x = model(ids, stream.to(device), last, cache)
    cache.finish()
    return model.to_logits(x)


def _choose(logits: Tensor, answers: list[_Open], sampling: Sampling) -> list[int]:
    if sampling == GREEDY:
        return logits.argmax(-1).tolist()
    seen = [torch.tensor(a.prompt + a.ids, device=logits.device) for a in answers]
    return [choose(row, s, sampling, a.generator) for row, s, a in zip(logits, seen, answers, strict=True)]
