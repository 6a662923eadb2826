"""json, jsonl and plain text, read as bytes: an error names the line and the column."""

import hashlib
import json
import re
from array import array
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

from ..errors import DataError, RowError, quote
from ..files.strict_json import DuplicateKey, StrictDecoder, parse_json
from .encodings import BOM, decode, open_text, read_text

MAX_LINE = 64 << 20
BETWEEN = re.compile(r"[\s,]*")  # of two rows


class JsonLines:
    """A jsonl file by the byte offsets of its lines: 20 bytes of memory a row, a row is read when it is asked for.

    DataError if a line is another one then.
    """

    note = ""

    def __init__(self, path: Path, encoding: str = ""):
        self.path = path
        self._offsets, self._lines, self._sums = array("q"), array("L"), array("L")
        self._file = open_text(path, encoding)  # rows are read from it as long as this object lives
        digest, offset, number = hashlib.sha256(), 0, 0
        # lines end in \n alone: a text may hold other separators
        while raw := self._file.readline(MAX_LINE + 1):
            number += 1
            digest.update(raw)
            if len(raw) > MAX_LINE:
                raise _too_long(f"{path}, line {number}", "Write each row on a line of its own.")
            if (raw.removeprefix(BOM) if number == 1 else raw).strip():
                self._offsets.append(offset)
                self._lines.append(number)
                self._sums.append(crc32(raw))
            offset += len(raw)
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._offsets)

    def __del__(self):
        if hasattr(self, "_file"):
            self._file.close()

    def where(self, number: int) -> str:
        return f"{self.path}, line {self._lines[number]}"

    def value(self, number: int) -> Any:
        return parse(self.text(number).rstrip("\r\n"), self.where(number))

    def text(self, number: int) -> str:
        self._file.seek(self._offsets[number])
        raw = self._file.readline(MAX_LINE + 1)
        if crc32(raw) != self._sums[number]:
            raise DataError(f"{self.where(number)} was changed while the file was in use", "Start again.")
        return decode(raw.removeprefix(BOM) if self._lines[number] == 1 else raw, self.where(number))


class TextLines(JsonLines):
    """A text file: each line that is not blank is a document."""

    def value(self, number: int) -> Any:
        return {"text": self.text(number).removesuffix("\n").removesuffix("\r")}


class JsonArray:
    """A file that is one JSON array, held in memory."""

    note = ""

    def __init__(self, path: Path, encoding: str = ""):
        self.path = path
        raw = read_text(path, encoding)
        self.sha256 = hashlib.sha256(raw).hexdigest()
        self._values = self._read(decode(raw.removeprefix(BOM), str(path)))
        if len(raw) > MAX_LINE:
            for number, value in enumerate(self._values):
                if len(json.dumps(value, ensure_ascii=False)) > MAX_LINE:
                    raise _too_long(self.where(number), "Make several rows of it.")

    def _read(self, text: str) -> list[Any]:
        return parse(text, str(self.path))

    def __len__(self) -> int:
        return len(self._values)

    def where(self, number: int) -> str:
        return f"{self.path}, row {number + 1}"

    def value(self, number: int) -> Any:
        return self._values[number]


class JsonObjects(JsonArray):
    """A file of JSON objects one after the other, each over several lines, held in memory."""

    note = "objects over several lines"

    def _read(self, text: str) -> list[Any]:
        self._lines, values, line, last = [], [], 1, 0
        try:
            for start, value in _values(text, 0):
                line, last = line + text.count("\n", last, start), start
                self._lines.append(line)
                values.append(value)
        except ValueError as error:
            raise _refusal(error, str(self.path)) from None
        return values

    def where(self, number: int) -> str:
        return f"{self.path}, line {self._lines[number]}"


def _values(text: str, at: int) -> Iterator[tuple[int, Any]]:
    """The JSON values of a text from `at` on, each with the place at which it starts."""
    decoder = StrictDecoder()
    while (at := BETWEEN.match(text, at).end()) < len(text):  # pyright: ignore[reportOptionalMemberAccess]
        value, end = decoder.raw_decode(text, at)
        yield at, value
        at = end


def is_spread(file: BinaryIO) -> bool:
    """Whether the first object of a file spans several lines: its first line alone is not JSON, together with the next ones it is."""
    file.seek(0)
    start = file.read(MAX_LINE).removeprefix(BOM).lstrip()
    first, _, _ = start.partition(b"\n")
    if first.strip() != b"{" and not first.rstrip().endswith((b",", b"[", b"{")):
        return False
    try:
        StrictDecoder().raw_decode(start.decode("utf-8", "ignore"))
    except ValueError as error:
        return isinstance(error, DuplicateKey)
    return True


def is_lines(file: BinaryIO) -> bool:
    """Whether a file that starts with [ has an array on each line (a dialogue of turns), and is not one array itself."""
    file.seek(0)
    first = b""
    while not first.strip():
        first = file.readline(MAX_LINE).removeprefix(BOM)
    if not first.rstrip().endswith(b"]"):
        return False
    try:
        turns = parse_json(first)
    except DuplicateKey:
        turns = []
    except ValueError:
        return False
    if any(isinstance(t, dict) and isinstance(t.get("response"), list) for t in turns):
        return True
    return any(line.strip() for line in iter(lambda: file.readline(MAX_LINE), b""))


def parse(text: str, where: str) -> Any:
    """The value of a JSON text; RowError with line and column."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise _refusal(error, where) from None


def _refusal(error: ValueError, where: str) -> RowError:
    if not isinstance(error, json.JSONDecodeError):  # a number of more digits than Python reads
        return RowError("broken JSON", f"{where}: {error}", "Correct the JSON there.")
    line = "" if ", line" in where else f", line {error.lineno}"
    if isinstance(error, DuplicateKey):
        row = "" if ", line" in where else _row_of(error)
        return RowError("a key twice", f"{where}{row}{line}: {error.msg}", "Take one of the two out.")
    near = quote(error.doc[error.pos : error.pos + 40])
    what = f"{where}{line}, column {error.colno}: {error.msg}: {near}"
    return RowError("broken JSON", what, "Correct the JSON there.")


def _row_of(error: DuplicateKey) -> str:
    """The row of an array that has a key twice."""
    text, row = error.doc.lstrip(), 1
    if not text.startswith("["):
        return ""
    with suppress(DuplicateKey):
        for _ in _values(text, 1):
            row += 1
    return f", row {row}"


def _too_long(where: str, hint: str) -> RowError:
    return RowError("line too long", f"{where} is longer than {MAX_LINE >> 20} MiB", hint)
