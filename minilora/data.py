"""Examples to flat streams of tokens.

An example is the ids of one conversation and, at each position, the token to be predicted there, or -100. A batch is several
examples laid end to end, with no padding. Which examples make a step is a function of (seed, step) alone.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from minilora.models.stream import Batch, Documents

from .rows.load import load_examples
from .rows.report import Report
from .rows.token_store import IGNORE, Example, Examples

__all__ = ["IGNORE", "Batch", "Example", "Examples", "Report", "epoch_order", "load_examples", "make_batch", "pack",
           "step_examples", "steps_per_epoch"]  # fmt: skip


def make_batch(examples: Sequence[Example]) -> Batch:
    """Lay examples end to end."""
    targets = torch.from_numpy(np.concatenate([e.targets for e in examples]))
    index = (targets != IGNORE).nonzero().squeeze(1)
    lengths = [n for e in examples for n in e.lengths]
    prefix_lens = [e.prefix for e in examples if e.prefix is not None for _ in e.lengths]
    assert len(prefix_lens) in (0, len(lengths)), "examples of two kinds of models"
    return Batch(
        ids=torch.from_numpy(np.concatenate([e.ids for e in examples])),
        documents=Documents.of(lengths, prefix_lens or None),
        target_index=index,
        targets=targets[index],
        where=[e.where for e in examples],
    )


def pack(examples: Sequence[Example], capacity: int) -> list[Batch]:
    """First-fit: each example goes into the first stream that has room for it, in the order given.

    An example longer than the capacity is a stream of its own.
    """
    if not examples:
        return []
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
