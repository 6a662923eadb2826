"""Rows for validation and test, chosen by what they ask and a seed.

A row's side follows from a hash of its question and the seed: rows with the same question are always on the same side, the
order of the file does not matter, and rows that are added later move few of the others.
"""

import math

import numpy as np

from ..errors import DataError, UsageError


def split(questions: np.ndarray, wanted: list[int], seed: int) -> list[np.ndarray]:
    """Places of the rows of each side: the rest first, then one array for each number of rows wanted.

    questions uint64 [n]: hashes. Rows are taken by question, so a side may get a few more rows than wanted, if questions
    stand several times. DataError if the first side would be empty.
    """
    keys = _mix(questions, seed)
    unique, group, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    before = np.concatenate([[0], np.cumsum(sizes)])  # rows of smaller keys
    side_of_group, start = np.zeros(len(unique), np.int64), 0
    for number, count in enumerate(wanted, 1):
        end = int(np.searchsorted(before, before[start] + count))
        side_of_group[start:end] = number
        start = min(end, len(unique))
    sides = side_of_group[group]
    parts = [np.flatnonzero(sides == number) for number in range(len(wanted) + 1)]
    if not len(parts[0]):  # as wherever a later side is empty
        what = f"a split of {' + '.join(f'{n:,}' for n in wanted)} rows leaves a side without rows ({len(unique):,} questions)"
        raise DataError(what, "Leave rows on every side.")
    return parts


def _mix(questions: np.ndarray, seed: int) -> np.ndarray:
    """A permutation of 64-bit values that the seed chooses (the finalizer of splitmix64)."""
    x = questions + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def counts_of(wanted: dict[str, str], rows: int) -> list[int]:
    """How many rows each wanted side takes, read as by `count_of`; DataError if no row is left to train on."""
    counts = [count_of(name, text, rows) for name, text in wanted.items()]
    if sum(counts) >= rows:
        raise DataError(f"val and test would take {sum(counts):,} of {rows:,} rows", "Leave rows to train on.")
    return counts


def count_of(name: str, text: str, rows: int) -> int:
    """The number of rows that `0.05` or `200` means of so many; UsageError if it is neither, DataError if none would be left."""
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share < 1e15:
        raise UsageError(f"{name} is {text!r}", "It is a file that exists, a number of rows, or a share such as 0.05.")
    count = round(share * rows) if share < 1 else int(share)
    if not 0 < count < rows:
        raise DataError(f"{name} {text} would take {count:,} of {rows:,} rows", "Leave rows on both sides.")
    return count
