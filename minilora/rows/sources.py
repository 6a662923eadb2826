"""Which rows of which files: `path#n@rate`, several of them, and a share of general rows mixed in.

rows.jsonl#500        500 rows, drawn by the seed, in the file's order
rows.jsonl#:500       the first 500
rows.jsonl@0.2        a fifth of them          rows.jsonl@2.5   each twice, and half of them once more
rows.jsonl#500@0.2    a fifth of 500
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..config import TrainConfig
from ..errors import DataError, UsageError
from .files import validation_file
from .token_store import Examples

SPEC = re.compile(r"(?P<path>.+?)(?:#(?P<first>:?)(?P<count>\d{1,15}))?(?:@(?P<rate>[0-9.]+))?", re.DOTALL)
LOWEST, HIGHEST = 0.01, 10.0


class Source(NamedTuple):
    """A file and how much of it is wanted; first: the first `count` rows, not a draw of so many."""

    path: str
    count: int | None = None
    first: bool = False
    rate: float = 1.0


def parse_sources(text: str | Path) -> list[Source]:
    """The sources of `a.jsonl#500@0.2,b.csv`; a text that is the path of a file or folder is that path."""
    if Path(text).exists():
        return [Source(str(text))]
    return [_parse(part.strip()) for part in str(text).split(",") if part.strip()] or [Source(str(text))]


def _parse(text: str) -> Source:
    match = SPEC.fullmatch(text)
    if match is None or Path(text).exists():
        return Source(text)
    count = None if match["count"] is None else int(match["count"])
    try:
        rate = 1.0 if match["rate"] is None else float(match["rate"])
    except ValueError:
        rate = 0.0
    if not LOWEST <= rate <= HIGHEST:
        raise UsageError(
            f"{text}: the rate {match['rate']} is not between {LOWEST:g} and {HIGHEST:g}", "Write path@0.5."
        )
    if count == 0:
        raise UsageError(f"{text}: no row is wanted", "Write path#500.")
    return Source(match["path"], count, match["first"] == ":", rate)


def validation_rows(config: TrainConfig, run: Path) -> Path:
    """The rows that a run is measured on: those of its validation, else those that it was trained on, of several files the first."""
    if config.val and Path(config.val).exists():
        return validation_file(config.val)
    split_off = run / "data" / "val.jsonl"
    if split_off.is_file():
        return split_off
    return validation_file(parse_sources(config.data)[0].path)


def draw(source: Source, rows: int, seed: int) -> np.ndarray:
    """The numbers int64, ascending, of the rows wanted of a file that has so many. A rate above 1 is not applied here."""
    numbers = np.arange(rows)
    if source.count is not None:
        if source.count > rows:
            what = f"{source.path} has {rows:,} rows, {source.count:,} are wanted"
            raise DataError(what, "Ask for fewer; a rate such as @2 repeats rows.")
        numbers = numbers[: source.count] if source.first else _some(numbers, source.count, seed)
    if source.rate < 1:
        numbers = _some(numbers, max(1, round(len(numbers) * source.rate)), seed + 1)
    return numbers


def _some(numbers: np.ndarray, count: int, seed: int) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 7])))
    return np.sort(generator.choice(numbers, count, replace=False))


def repeated(examples: Examples, seed: int) -> Examples:
    """Examples with each one as often as the rate of its store says: whole times, and the rest of the rate by draw."""
    starts = np.cumsum([0, *map(len, examples.stores)])
    parts = []
    for store, start in zip(examples.stores, starts, strict=False):
        mine = examples.order[(examples.order >= start) & (examples.order < start + len(store))]
        parts.append(times(mine, max(store.rate, 1.0), seed))
    return Examples(examples.stores, np.concatenate(parts))


def times(index: np.ndarray, rate: float, seed: int) -> np.ndarray:
    """index repeated `rate` times: round(len * rate) entries, none of them twice more often than another plus one."""
    whole, rest = divmod(round(len(index) * rate), max(len(index), 1))
    return np.concatenate([np.tile(index, whole), _some(index, rest, seed + 2)])


def parse_ratio(text: str) -> float:
    """General rows for each own row of `1:5` (own : general)."""
    number = r"(\d{1,15}(?:\.\d{1,15})?)"
    match = re.fullmatch(rf"\s*{number}\s*:\s*{number}\s*", text)
    if match is None or not float(match[1]) or not float(match[2]):
        raise UsageError(f"mix_ratio is {text!r}", "It is own rows : general rows, such as 1:5.")
    return float(match[2]) / float(match[1])


def mixed(own: Examples, general: Examples, ratio: float, seed: int) -> Examples:
    """Own examples with `ratio` general ones for each; DataError if that would repeat a general row more than 10 times."""
    wanted = max(1, round(len(own) * ratio))
    rate = wanted / len(general)
    if rate > HIGHEST:
        what = f"mix_ratio asks for {wanted:,} general rows, there are {len(general):,}"
        raise DataError(what, "Give more general rows, or a smaller ratio.")
    index = times(general.order, rate, seed) if rate > 1 else _some(general.order, wanted, seed + 3)
    return own.joined(Examples(general.stores, index))
