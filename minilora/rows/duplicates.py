"""Rows that are nearly the same, found by MinHash: 64 numbers a text, of which two texts share about as large a part as of
their five-letter pieces (A. Broder, 1997)."""

import re
from collections.abc import Iterator

import numpy as np

HASHES, BANDS = 64, 16
PIECE = 5  # letters
SHORTEST = 20  # letters; shorter texts are similar by chance
ALIKE = 0.8
MOST = 200_000  # texts that are compared; about 2 KB of memory each

_MULTIPLIERS = np.random.Generator(np.random.Philox(1)).integers(0, 2**63, HASHES, dtype=np.uint64) * np.uint64(
    2
) + np.uint64(1)
_POWERS = np.array([pow(0x9E3779B97F4A7C15, k, 2**64) for k in range(PIECE)], dtype=np.uint64)


def signature(text: str) -> np.ndarray | None:
    """The MinHash uint32 [64] of a text without case, blanks and punctuation; None if it is too short to be compared."""
    letters = np.frombuffer(re.sub(r"[\W_]+", "", text.casefold()).encode("utf-32-le"), np.uint32).astype(np.uint64)
    if len(letters) < SHORTEST:
        return None
    pieces = np.lib.stride_tricks.sliding_window_view(letters, PIECE)
    mixed = (pieces * _POWERS).sum(1, dtype=np.uint64)
    mixed = np.unique((mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9))
    least = np.full(HASHES, 2**32 - 1, np.uint32)
    for part in np.array_split(mixed, max(len(mixed) // 65536, 1)):
        hashed = ((part[:, None] * _MULTIPLIERS) >> np.uint64(32)).astype(np.uint32)
        least = np.minimum(least, hashed.min(0))
    return least


class NearDuplicates:
    """The texts so far, and whether a new one is nearly the same as one of them."""

    def __init__(self):
        self._signatures: list[np.ndarray] = []
        self._names: list[str] = []
        self._buckets: dict[tuple[int, bytes], int] = {}

    def like(self, text: str) -> tuple[str, float] | None:
        """(name, estimated share of common pieces) of an earlier text that shares at least 80 % of its pieces with this one."""
        mine = signature(text)
        return None if mine is None else self._like(mine)

    def add(self, text: str, name: str) -> tuple[str, float] | None:
        """As `like`; a text that is like no other is remembered under its name."""
        mine = signature(text)
        if mine is None or len(self._names) >= MOST:
            return None
        found = self._like(mine)
        if found is None:
            for key in _bands(mine):
                self._buckets.setdefault(key, len(self._names))
            self._signatures.append(mine)
            self._names.append(name)
        return found

    def _like(self, mine: np.ndarray) -> tuple[str, float] | None:
        for other in {self._buckets[key] for key in _bands(mine) if key in self._buckets}:
            share = float((self._signatures[other] == mine).mean())
            if share >= ALIKE:
                return self._names[other], share
        return None


def _bands(mine: np.ndarray) -> Iterator[tuple[int, bytes]]:
    return ((i, band.tobytes()) for i, band in enumerate(mine.reshape(BANDS, -1)))
