"""Conversations to examples, and examples to flat streams of tokens.

An example is the ids of one conversation and, at each place, the token to be predicted there, or -100. A batch is several
examples laid end to end, with no padding: `seams` are their bounds, positions restart at each, and `rows` are the places
that have a target. Which examples make a step is a function of (seed, epoch) alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from minilora.models.rotary import positions_of

from .rows.load import Report, load_examples
from .rows.token_store import IGNORE, Example, Examples

__all__ = ["IGNORE", "Batch", "Example", "Examples", "Report", "epoch_order", "load_examples", "make_batch", "pack",
           "step_examples", "steps_per_epoch"]  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """A flat stream: ids int64 [T], positions [T] or [2, T], seams [S + 1], rows and targets int64 [M], M <= T.

    prefixes [S] where the documents start with a bidirectional part.
    """

    ids: Tensor
    positions: Tensor
    seams: list[int]
    rows: Tensor
    targets: Tensor
    where: list[str]
    prefixes: list[int] | None = None

    def to(self, device: torch.device) -> "Batch":
        moved = (x.to(device, non_blocking=True) for x in (self.ids, self.positions, self.rows, self.targets))
        ids, positions, rows, targets = moved
        return Batch(ids, positions, self.seams, rows, targets, self.where, self.prefixes)


def make_batch(examples: Sequence[Example]) -> Batch:
    """Lay examples end to end."""
    lengths = [len(e.ids) for e in examples]
    targets = torch.from_numpy(np.concatenate([e.targets for e in examples]))
    rows = (targets != IGNORE).nonzero().squeeze(1)
    prefixes = [e.prefix for e in examples if e.prefix is not None]
    assert len(prefixes) in (0, len(examples)), "examples of two kinds of models"
    return Batch(
        ids=torch.from_numpy(np.concatenate([e.ids for e in examples])),
        positions=torch.cat([positions_of(0, n, e.prefix) for n, e in zip(lengths, examples, strict=True)], dim=-1),
        seams=[0, *np.cumsum(lengths).tolist()],
        rows=rows,
        targets=targets[rows],
        where=[e.where for e in examples],
        prefixes=prefixes or None,
    )


def pack(examples: Sequence[Example], capacity: int) -> list[Batch]:
    """First-fit: each example goes into the first stream that has room for it, in the order given."""
    examples = list(examples)
    shortest = min(len(e.ids) for e in examples)
    streams: list[list[Example]] = []
    room: dict[int, int] = {}  # stream -> free tokens, of those that some example may still fit in
    for example in examples:
        length = len(example.ids)
        place = next((i for i, free in room.items() if free >= length), len(streams))
        if place == len(streams):
            streams.append([])
            room[place] = capacity
        streams[place].append(example)
        room[place] -= length
        if room[place] < shortest:
            del room[place]
    return [make_batch(stream) for stream in streams]


@lru_cache(maxsize=2)  # a step asks for its epoch's
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's examples: a permutation that follows from (seed, epoch) alone."""
    order = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch]))).permutation(count)
    order.flags.writeable = False
    return order


def step_examples(examples: Sequence[Example], rows_per_step: int, seed: int, step: int) -> list[Example]:
    """The examples of optimizer step 0, 1, 2 ...; the last step of an epoch may have fewer rows."""
    steps = steps_per_epoch(len(examples), rows_per_step)
    epoch, place = divmod(step, steps)
    order = epoch_order(len(examples), seed, epoch)
    return [examples[i] for i in order[place * rows_per_step : (place + 1) * rows_per_step]]


def steps_per_epoch(count: int, rows_per_step: int) -> int:
    return -(-count // rows_per_step)
