"""Conversations to examples, and examples to flat streams of tokens.

An example is the ids of one conversation and, at each place, the token to be predicted there, or -100. A batch is several
examples laid end to end, with no padding: `seams` are their bounds, positions restart at each, and `rows` are the places
that have a target. Which examples make a step is a function of (seed, epoch) alone.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minilora.models.layers import positions_of

from .errors import DataError
from .rows import Row, fill, read_rows
from .tokenizer import Tokenizer

IGNORE = -100


@dataclass(frozen=True)
class Example:
    """One conversation: ids and targets int64 [n]; targets[t] is the token that follows t if it is trained, else -100.

    prefix is how many first tokens see each other, None for a model that is causal throughout.
    """

    ids: np.ndarray
    targets: np.ndarray
    where: str
    prefix: int | None = None

    @property
    def trained(self) -> int:
        return int((self.targets != IGNORE).sum())


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


@dataclass
class Report:
    """What became of the rows of a data set."""

    rows: int = 0
    shapes: Counter = field(default_factory=Counter)
    dropped: Counter = field(default_factory=Counter)  # limit -> rows over it
    first_dropped: str = ""
    tokens: int = 0
    trained: int = 0
    longest: int = 0
    defined: Counter = field(default_factory=Counter)  # {{key}} -> times it was filled
    undefined: Counter = field(default_factory=Counter)  # {{key}} -> rows that hold it unfilled

    def __str__(self) -> str:
        kept = self.rows - sum(self.dropped.values())
        shapes = ", ".join(self.shapes)
        share = 100 * self.trained / max(self.tokens, 1)
        text = f"{kept:,} rows ({shapes})  {self.tokens:,} tokens, {self.trained:,} trained ({share:.0f} %)  longest {self.longest:,}"
        if self.dropped:
            counts = ", ".join(f"{n:,} over {limit}" for limit, n in self.dropped.items())
            text += f"\ndropped {self.rows - kept:,} of {self.rows:,} rows: {counts} (first: {self.first_dropped})"
        for key, rows in self.undefined.items():
            text += f"\nnote: {rows:,} rows hold {{{{{key}}}}} as it is; --define {key}=TEXT fills it"
        return text


def load_examples(
    path: str | Path,
    tokenizer: Tokenizer,
    define: dict[str, str] | None = None,
    loss_on: str = "all",
    max_length: int = 2048,
    max_source_length: int | None = None,
    max_target_length: int | None = None,
) -> tuple[list[Example], Report]:
    """The examples of a file of rows, `{{key}}` in their texts replaced by define[key], and the report on them.

    A row longer than max_length tokens, or with more masked tokens than max_source_length or more trained tokens than
    max_target_length (each with the template's own), is left out and counted. Raises DataError if none is left.
    """
    report, examples = Report(), []
    for row in read_rows(Path(path)):
        used, undefined = fill(row, define or {})
        report.defined.update(used)
        report.undefined.update(undefined)
        report.rows += 1
        report.shapes[row.shape] += 1
        example, trained = _example(row, tokenizer, loss_on)
        length = len(example.ids)
        limits = (
            ("max_length", length, max_length),
            ("max_source_length", length - trained, max_source_length),
            ("max_target_length", trained, max_target_length),
        )
        over = next((f"{name} {limit}" for name, size, limit in limits if limit is not None and size > limit), None)
        if over is not None:
            report.dropped[over] += 1
            report.first_dropped = report.first_dropped or f"{row.where}, {length:,} tokens"
            continue
        examples.append(example)
        report.tokens += length
        report.trained += example.trained
        report.longest = max(report.longest, length)
    if not examples:
        raise DataError(f"{path}: all {report.rows:,} rows are too long (first: {report.first_dropped}; {', '.join(report.dropped)})",
                        "Raise the limit, or shorten the rows.")  # fmt: skip
    return examples, report


def _example(row: Row, tokenizer: Tokenizer, loss_on: str) -> tuple[Example, int]:
    ids, trained = tokenizer.render(row.messages, loss_on=loss_on)
    flat, mask = np.array(ids, dtype=np.int64), np.array(trained, dtype=bool)
    targets = np.full_like(flat, IGNORE)
    targets[:-1][mask[1:]] = flat[1:][mask[1:]]
    if not mask.any():
        raise DataError(
            f"{row.where}: there is nothing to learn, no token is trained",
            "Check loss_on and the row's loss keys.",
        )
    return Example(flat, targets, row.where), int(mask.sum())


def make_batch(examples: list[Example]) -> Batch:
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


def pack(examples: list[Example], capacity: int) -> list[Batch]:
    """First-fit: each example goes into the first stream that has room for it, in the order given."""
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


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's examples: a permutation that follows from (seed, epoch) alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch]))).permutation(count)


def step_examples(examples: list[Example], rows_per_step: int, seed: int, step: int) -> list[Example]:
    """The examples of optimizer step 0, 1, 2 ...; the last step of an epoch may have fewer rows."""
    steps = steps_per_epoch(len(examples), rows_per_step)
    epoch, place = divmod(step, steps)
    order = epoch_order(len(examples), seed, epoch)
    return [examples[i] for i in order[place * rows_per_step : (place + 1) * rows_per_step]]


def steps_per_epoch(count: int, rows_per_step: int) -> int:
    return -(-count // rows_per_step)
