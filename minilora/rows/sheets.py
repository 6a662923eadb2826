"""A header that names the columns, and a row of texts under it on each line; and csv, which is written so."""

import csv
import hashlib
import io
from collections import Counter
from pathlib import Path
from typing import Any

from ..errors import DataError, RowError, quote
from . import json_files
from .encodings import decode_csv, read_text

Record = tuple[str, dict[str, str] | RowError]  # its place in the file


class Sheet:
    """Records by number; a record that cannot be used is a RowError, raised when it is asked for."""

    def __init__(self, path: Path, sha256: str, note: str, records: list[Record]):
        self.path, self.sha256, self.note, self._records = path, sha256, note, records

    def __len__(self) -> int:
        return len(self._records)

    def where(self, number: int) -> str:
        return f"{self.path}, {self._records[number][0]}"

    def value(self, number: int) -> Any:
        record = self._records[number][1]
        if isinstance(record, RowError):
            raise record
        return record


def read_csv(path: Path, encoding: str) -> Sheet:
    """A csv or tsv file: UTF-8 with or without byte order mark, UTF-16 with one, GB18030 as Excel saves it, or what is named."""
    raw = read_text(path, encoding)
    text, found = decode_csv(raw, path)
    head = text[: text.find("\n") + 1 or None]
    mark = max(",\t;", key=head.count)
    csv.field_size_limit(json_files.MAX_LINE)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    records: list[Record] = []
    header, line = None, 1
    try:
        for cells in reader:
            start, line = line, reader.line_num + 1
            if not any(c.strip() for c in cells):
                continue
            if header is None:
                header = header_of(cells, f"{path}, line {start}")
            elif len(cells) != len(header):
                what = f"{path}, line {start} has {len(cells)} cells, the header {len(header)}"
                hint = "Put a text that holds a comma or a line end in quotes."
                records.append((f"line {start}", RowError("other number of cells", what, hint)))
            else:
                records.append((f"line {start}", dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise DataError(f"{path}, line {line}: {error}", "Close the quote that is open there.") from None
    notes = [found] * (found != "utf-8") + [f"cells cut at {mark!r}"] * (mark != ",")
    return Sheet(path, hashlib.sha256(raw).hexdigest(), ", ".join(notes), records)


def header_of(cells: list[str], where: str) -> list[str]:
    """The names of the columns, one without a name being "column 3"; DataError if two have one name."""
    header = [c.strip() or f"column {number}" for number, c in enumerate(cells, 1)]
    twice = next((c for c, count in Counter(header).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"{where}: two columns are named {quote(twice)}", "Give each column a name of its own.")
    return header
