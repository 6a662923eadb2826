"""Strict JSON: one value, no key twice in an object, and a place for everything that is wrong."""

import json
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import DataError, quote
from .regular import open_file

MAX_LINE = 16 << 20


class DuplicateKey(json.JSONDecodeError):
    """An object, which ends at `pos`, has a key twice."""


def parse_json(text: str | bytes, **hooks: Any) -> Any:
    """The value of a JSON text; bytes are UTF-8. hooks: parse_int and others of json.loads.

    Raises json.JSONDecodeError with line and column, or ValueError for bytes and numbers that cannot be decoded.
    """
    return StrictDecoder(**hooks).decode(text.decode("utf-8-sig") if isinstance(text, bytes) else text)


def read_json_lines(path: Path) -> Iterator[Any]:
    """Each value of a jsonl file up to the first broken line, which a crash may have cut; none if there is no file, DataError if it is no regular one."""
    with suppress(FileNotFoundError, ValueError), open_file(path, DataError) as file:
        while line := file.readline(MAX_LINE):  # a hole in a file may be one line of any size
            yield parse_json(line)


class StrictDecoder(json.JSONDecoder):
    """A decoder that raises DuplicateKey instead of keeping the last of two values."""

    def __init__(self, **hooks: Any):
        super().__init__(object_pairs_hook=_without_duplicates, **hooks)

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        try:
            return super().raw_decode(s, idx)
        except RecursionError:
            raise json.JSONDecodeError("nested beyond the recursion limit", s, idx) from None
        except _Duplicate as error:
            # the hook is not told where it is: the shortest text that fails alike ends with the object
            ends = [brace.end() for brace in re.compile("}").finditer(s, idx)]
            end = ends[bisect_left(ends, True, key=lambda end: self._fails_alike(s[:end], idx))]
            raise DuplicateKey(str(error), s, end) from None

    def _fails_alike(self, s: str, idx: int) -> bool:
        try:
            super().raw_decode(s, idx)
        except _Duplicate:
            return True
        except ValueError:
            pass
        return False


class _Duplicate(Exception):
    pass


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _Duplicate(f"duplicate key {quote(twice)} in one object")
    return result
