"""csv and xlsx: a header that names the columns, and a row of texts under it on each line."""

import csv
import hashlib
import io
import re
import zipfile
from datetime import date, time
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError
from . import json_files
from .encodings import decode_csv, read_text
from .problems import RowError, quote
from .shapes import is_header

HEADER_WITHIN = 10  # lines of a sheet that may stand above its header
MAX_BOOK = 2 << 30  # bytes of an unpacked workbook
ESCAPED = re.compile(r"_x([0-9A-Fa-f]{4})_")
CELL_ERRORS = {"#REF!", "#N/A", "#VALUE!", "#DIV/0!", "#NAME?", "#NULL!", "#NUM!"}


class Sheet:
    """Records by number; a record that cannot be used is a RowError, raised when it is asked for."""

    def __init__(self, path: Path, sha256: str, note: str, unit: str, records: list[tuple[int, dict | RowError]]):
        self.path, self.sha256, self.note, self._unit, self._records = path, sha256, note, unit, records

    def __len__(self) -> int:
        return len(self._records)

    def where(self, number: int) -> str:
        return f"{self.path}, {self._unit} {self._records[number][0]}"

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
    records: list[tuple[int, dict | RowError]] = []
    header, line = None, 1
    try:
        for cells in reader:
            start, line = line, reader.line_num + 1
            if not any(c.strip() for c in cells):
                continue
            if header is None:
                header = _header(cells, f"{path}, line {start}")
            elif len(cells) != len(header):
                what = f"{path}, line {start} has {len(cells)} cells, the header {len(header)}"
                records.append((start, RowError("other number of cells", what, "Put a text that holds a comma or a line end in quotes.")))  # fmt: skip
            else:
                records.append((start, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise DataError(f"{path}, line {line}: {error}", "Close the quote that is open there.") from None
    notes = [found] * (found != "utf-8") + [f"cells cut at {mark!r}"] * (mark != ",")
    return Sheet(path, hashlib.sha256(raw).hexdigest(), ", ".join(notes), "line", records)


def _header(cells: list[str], where: str) -> list[str]:
    header = [c.strip() for c in cells]
    twice = next((c for c in header if c and header.count(c) > 1), None)
    if twice is not None:
        raise DataError(f"{where}: two columns are named {quote(twice)}", "Give each column a name of its own.")
    return header


def read_xlsx(path: Path, columns: dict[str, str]) -> Sheet:
    """The first sheet of a workbook. Lines above the header (a title over merged cells) are skipped and told."""
    raw = path.read_bytes()
    lines, merged = _first_sheet(path, raw)
    at = next(
        (i for i, cells in enumerate(lines[:HEADER_WITHIN]) if is_header({c.strip() for c in cells}, columns)), None
    )
    if at is None:
        if not any(any(cells) for cells in lines):
            return Sheet(path, "", "", "row", [])
        over = next((area.name for area in merged if area.top <= HEADER_WITHIN), None)
        more = f" ({over} is one merged cell)" if over else ""
        what = f"{path}: no header with a question and an answer in the first sheet{more}"
        raise DataError(what, "Name the columns prompt and response, or say --columns prompt=NAME,response=NAME.")
    header = _header(lines[at], f"{path}, row {at + 1}")
    named = [column for column, name in enumerate(header, 1) if name]
    records: list[tuple[int, dict | RowError]] = []
    for number, cells in enumerate(lines[at + 1 :], at + 2):
        if not any(cells):
            continue
        where = f"{path}, row {number}"
        part = next((area.name for area in merged if any(area.holds(number, column) for column in named)), None)
        bad = next((text for text in cells if text in CELL_ERRORS), None)
        if part is not None:
            what = f"{where}: the cells {part} are merged"
            records.append((number, RowError("merged cells", what, "Unmerge them and fill each one.")))
        elif bad is not None:
            records.append((number, RowError("a cell with an error", f"{where} holds {bad}", "Correct its formula.")))
        else:
            records.append((number, {k: v for k, v in zip(header, cells, strict=False) if k}))
    note = f"header in row {at + 1}" if at else ""
    return Sheet(path, hashlib.sha256(raw).hexdigest(), note, "row", records)


class Area(NamedTuple):
    """Cells that are merged into one: their name as A1:C1, and the rows and columns, from 1."""

    name: str
    left: int
    top: int
    right: int
    bottom: int

    def holds(self, row: int, column: int) -> bool:
        return self.top <= row <= self.bottom and self.left <= column <= self.right


def _first_sheet(path: Path, raw: bytes) -> tuple[list[list[str]], list[Area]]:
    """The cells of the first sheet as texts, and its merged areas."""
    try:
        import openpyxl
    except ImportError:
        raise DataError(
            f"{path}: openpyxl is not there", "pip install 'minilora[report]', or save it as csv."
        ) from None
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as book:
            size = sum(part.file_size for part in book.infolist())
        if size > MAX_BOOK:
            raise ValueError(f"it unpacks to {size >> 20:,} MiB")
        sheet: Any = openpyxl.load_workbook(io.BytesIO(raw), data_only=True).worksheets[0]
        return [[_cell(c) for c in row] for row in sheet.iter_rows()], [
            Area(str(r), *r.bounds) for r in sheet.merged_cells.ranges
        ]
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 a broken workbook makes the libraries raise almost anything
        what = f"{path} is no workbook: {' '.join(str(error).split())[:80]}"
        raise DataError(what, "Save it as xlsx again, or as csv.") from None


def _cell(cell: Any) -> str:
    """A cell as text: whole numbers without a point, dates as ISO, an empty one as ""."""
    value = cell.value
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    if isinstance(value, (date, time)):
        return value.isoformat()
    text = ESCAPED.sub(lambda m: chr(int(m[1], 16)), str(value))  # Excel writes control characters so, as _x000D_
    return text.replace("\r\n", "\n").replace("\r", "\n")
