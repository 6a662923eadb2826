"""Regular expressions that somebody else may have written: only those are used that give any name of a linear up soon.

Python tries every way in which a pattern could fit before it gives a text up. The ways multiply: a repetition may end after any of
its letters, a group may begin with any of its alternatives; where a group that has several ways is repeated, they grow without bound.
"""

import math
import re
from functools import lru_cache
from re import _constants as op  # pyright: ignore[reportAttributeAccessIssue]
from re import _parser as parser  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any

LONGEST, LETTERS, MOST_WAYS = 200, 100, 10**5  # characters of a pattern, letters of a path, about 10 ms of trying


@lru_cache(None)
def simple(pattern: str) -> re.Pattern[str] | None:
    """The pattern, compiled; None for one that is broken, or that could try for ever."""
    return re.compile(pattern) if ways_of(pattern) <= MOST_WAYS else None


@lru_cache(None)
def ways_of(pattern: str) -> float:
    """In how many ways a pattern could fit a path, at most; infinite for one that is broken or too long."""
    try:
        return _ways(parser.parse(pattern)) if len(pattern) <= LONGEST else math.inf
    except (re.error, RecursionError, OverflowError):
        return math.inf


def _ways(items: Any) -> float:
    """In how many ways a sequence of a parsed pattern could fit a text, at most."""
    return math.prod(map(_ways_of_item, items))


def _ways_of_item(item: Any) -> float:
    kind, value = item
    if kind in (op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT):
        low, high, inside = value
        ways = _ways(inside)
        if ways == 1:
            return min(high, LETTERS) - min(low, LETTERS) + 1
        return ways + 1 if high <= 1 else ways**high if high < LETTERS else math.inf
    if kind is op.BRANCH:
        ways, words = sum(map(_ways, value[1])), [repr(list(alternative)) for alternative in value[1]]
        # of distinct words few begin in one place
        return min(2, ways) if len({*words}) == ways == len(words) and all(map(_is_word, value[1])) else ways
    if kind is op.SUBPATTERN:
        return _ways(value[-1])
    if kind in (op.ASSERT, op.ASSERT_NOT):
        return _ways(value[1])
    if kind is op.ATOMIC_GROUP:
        return _ways(value)
    return math.inf if kind in (op.GROUPREF, op.GROUPREF_EXISTS) else 1


def _is_word(alternative: Any) -> bool:
    return len(alternative) > 0 and all(kind in (op.LITERAL, op.IN) for kind, _ in alternative)
