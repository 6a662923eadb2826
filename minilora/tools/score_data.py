"""The perplexity of every row under a model: which rows are strange to it, and which it knows already."""

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from minilora.kernels.linear_cross_entropy import linear_cross_entropy
from minilora.models.decoder import Decoder

from ..data import make_batch
from ..errors import not_finite
from ..files.atomic import write_output
from ..rows.token_store import Examples

GROUP = 64  # rows that are laid end to end at most


class RowScore(NamedTuple):
    """A row: the number of its first example, its place, its summed cross-entropy in nats, and its target tokens."""

    number: int
    where: str
    total: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.total / self.tokens, 700.0))


@torch.no_grad()
def score_rows(model: Decoder, examples: Examples, micro_tokens: int) -> Iterator[RowScore]:
    """The score of each row, in order; rows run packed, at most micro_tokens (or one row) at a time."""
    model.eval()
    held: RowScore | None = None
    for score in _examples(model, examples, micro_tokens):
        if held is not None and held.where == score.where:  # another piece of one raw text
            held = held._replace(total=held.total + score.total, tokens=held.tokens + score.tokens)
            continue
        if held is not None:
            yield held
        held = score
    if held is not None:
        yield held


def _examples(model: Decoder, examples: Examples, micro_tokens: int) -> Iterator[RowScore]:
    lengths = examples.column("length")
    start = 0
    while start < len(examples):
        end, tokens = start + 1, int(lengths[start])
        while end < min(len(examples), start + GROUP) and tokens + lengths[end] <= micro_tokens:
            tokens += int(lengths[end])
            end += 1
        yield from _score(model, examples, start, end)
        start = end


def _score(model: Decoder, examples: Examples, start: int, end: int) -> Iterator[RowScore]:
    """The scores of a stretch of examples in one pass; the head runs for each row alone."""
    batch = make_batch([examples[i] for i in range(start, end)]).to(model.head.device)
    hidden = model(batch.ids, batch.documents, batch.target_index)
    bounds = np.searchsorted(batch.target_index.cpu().numpy(), batch.documents.cu_seqlens).tolist()
    for number, (first, last) in enumerate(pairwise(bounds)):
        total = float(linear_cross_entropy(hidden[first:last], model.head, batch.targets[first:last]))
        if not math.isfinite(total):
            raise not_finite(f"{batch.where[number]}: the loss of the row")
        yield RowScore(start + number, batch.where[number], total, last - first)


def score_lines(scores: list[RowScore], examples: Examples) -> Iterator[str]:
    """A line of JSON for each score: place, perplexity, loss, tokens, and the row as its file has it."""
    for score in scores:
        where, value = examples.value(score.number)
        line: dict[str, Any] = {"where": where, "perplexity": score.perplexity, "loss": score.total / score.tokens}
        yield json.dumps(line | {"tokens": score.tokens, "row": value}, ensure_ascii=False) + "\n"


def kept(perplexities: np.ndarray, below: float | None, above: float | None) -> np.ndarray:
    """bool: which rows have a perplexity of at most `below` and at least `above`."""
    high = math.inf if below is None else below
    return (perplexities <= high) & (perplexities >= (above or 0.0))


def write_kept(path: Path, scores: list[RowScore], keep: np.ndarray, examples: Examples) -> None:
    """Write the rows that are kept, as their files have them, one a line, as a whole or not at all."""
    chosen = [examples.value(score.number)[1] for score, good in zip(scores, keep, strict=True) if good]
    write_output(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in chosen))
