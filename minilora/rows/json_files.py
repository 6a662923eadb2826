"""json, jsonl and plain text, read as bytes: a place that is not UTF-8 or no JSON is told by line and column."""

import hashlib
import json
import re
from array import array
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

from .encodings import BOM, decode, open_text, read_text
from .problems import RowError, quote

MAX_LINE = 64 << 20
BETWEEN = re.compile(r"[\s,]*")  # of two rows of an array


class JsonLines:
    """A jsonl file by the byte offsets of its lines: 12 bytes of memory a row, a row is read when it is asked for."""

    note = ""

    def __init__(self, path: Path, encoding: str = ""):
        self.path = path
        self._offsets, self._lines = array("q"), array("L")
        self._file = open_text(path, encoding)  # rows are read from it as long as this object lives
        digest, offset, number = hashlib.sha256(), 0, 0
        # lines end in \n alone: a text may hold other separators
        while raw := self._file.readline(MAX_LINE + 1):
            number += 1
            digest.update(raw)
            if len(raw) > MAX_LINE:
                raise RowError(
                    "line too long",
                    f"{path}, line {number} is longer than {MAX_LINE >> 20} MiB",
                    "A row belongs on a line of its own.",
                )
            if (raw.removeprefix(BOM) if number == 1 else raw).strip():
                self._offsets.append(offset)
                self._lines.append(number)
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
        raw = self._file.readline()
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
        self._values = parse(decode(raw.removeprefix(BOM), str(path)), str(path))
        if len(raw) > MAX_LINE:
            for number, value in enumerate(self._values):
                if len(json.dumps(value, ensure_ascii=False)) > MAX_LINE:
                    raise RowError(
                        "line too long",
                        f"{self.where(number)} is longer than {MAX_LINE >> 20} MiB",
                        "Make several rows of it.",
                    )

    def __len__(self) -> int:
        return len(self._values)

    def where(self, number: int) -> str:
        return f"{self.path}, row {number + 1}"

    def value(self, number: int) -> Any:
        return self._values[number]


class JsonObjects(JsonArray):
    """A file of JSON objects one after the other, each over several lines, held in memory."""

    note = "objects over several lines"

    def __init__(self, path: Path, encoding: str = ""):
        self.path = path
        raw = read_text(path, encoding)
        self.sha256 = hashlib.sha256(raw).hexdigest()
        text = decode(raw.removeprefix(BOM), str(path))
        decoder, at, self._values, self._lines = json.JSONDecoder(object_pairs_hook=_no_duplicates), 0, [], []
        while at < len(text):
            at = BETWEEN.match(text, at).end()  # pyright: ignore[reportOptionalMemberAccess]
            if at == len(text):
                break
            self._lines.append(text.count("\n", 0, at) + 1)
            try:
                value, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                what = f"{path}, line {error.lineno}, column {error.colno}: {error.msg}: {quote(text[error.pos : error.pos + 40])}"
                raise RowError("broken JSON", what, "Correct the JSON there.") from None
            except DuplicateKey as error:
                what = f"{path}, object that begins in line {self._lines[-1]}: {error}"
                raise RowError("a key twice", what, "Take one of the two out.") from None
            self._values.append(value)

    def where(self, number: int) -> str:
        return f"{self.path}, line {self._lines[number]}"


def is_spread(file: BinaryIO) -> bool:
    """Whether the first object of a file goes over several lines: its first line alone is none, and with the next ones it is."""
    file.seek(0)
    start = file.read(MAX_LINE).removeprefix(BOM).lstrip()
    first, _, _ = start.partition(b"\n")
    if first.strip() != b"{" and not first.rstrip().endswith((b",", b"[", b"{")):
        return False
    try:
        json.JSONDecoder().raw_decode(start.decode("utf-8", "ignore"))
    except (ValueError, RecursionError):
        return False
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
        turns = json.loads(first)
    except (ValueError, RecursionError):
        return False
    if any(isinstance(t, dict) and isinstance(t.get("response"), list) for t in turns):
        return True
    return any(line.strip() for line in iter(lambda: file.readline(MAX_LINE), b""))


def parse(text: str, where: str) -> Any:
    """Text as JSON; RowError with line and column."""
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        line = "" if ", line" in where else f", line {error.lineno}"
        what = f"{where}{line}, column {error.colno}: {error.msg}: {quote(text[error.pos : error.pos + 40])}"
        raise RowError("broken JSON", what, "Correct the JSON there.") from None
    except DuplicateKey as error:
        row = "" if ", line" in where else _row_of_duplicate(text)
        raise RowError("a key twice", f"{where}{row}: {error}", "Take one of the two out.") from None
    except (ValueError, RecursionError) as error:
        raise RowError("broken JSON", f"{where}: {error}", "Correct the JSON there.") from None


def _row_of_duplicate(text: str) -> str:
    """Where the first row of an array that has a key twice begins; all before it is known to be JSON."""
    decoder, row, at = json.JSONDecoder(object_pairs_hook=_no_duplicates), 0, len(text) - len(text.lstrip()) + 1
    if text[at - 1] != "[":
        return ""
    while True:
        at, row = BETWEEN.match(text, at).end(), row + 1  # pyright: ignore[reportOptionalMemberAccess]
        try:
            _, at = decoder.raw_decode(text, at)
        except DuplicateKey:
            return f", row {row}, line {text.count(chr(10), 0, at) + 1}"


class DuplicateKey(ValueError):
    """One object has a key twice."""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(k for k, n in Counter(k for k, _ in pairs).items() if n > 1)
        raise DuplicateKey(f"duplicate key {quote(twice)} in one object")
    return result
