"""xlsx: the rows of every visible sheet that has a header; anything else in a workbook is reported or refused.

openpyxl reads the cells: python-calamine 0.9 gives cells with an error and formulas without a value as empty texts, and knows
no comments, number formats, hidden rows and hidden columns. Excel keeps the value of a formula beside it; another program that
wrote a formula may have left none.
"""

import hashlib
import io
import re
import zipfile
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from warnings import catch_warnings

from ..errors import DataError, RowError, quote
from ..files.regular import read_file
from .shapes import QUESTIONS, is_header
from .sheets import Record, Sheet, header_of

HEADER_WITHIN = 10  # lines of a sheet that may stand above its header
ESCAPED = re.compile(r"_x([0-9A-Fa-f]{4})_")
FORMULA = re.compile(rb"<(?:\w+:)?f[ >/]")
CELL_ERRORS = {"#REF!", "#N/A", "#VALUE!", "#DIV/0!", "#NAME?", "#NULL!", "#NUM!"}
AS_STORED = ("General", "0", "@")  # formats in which Excel shows a number as it is stored


class Page(NamedTuple):
    """A sheet of a workbook: its cells as texts, and what the texts do not show."""

    title: str
    hidden: bool
    lines: list[list[str]]
    merged: list[Any]  # openpyxl's CellRange: the name as A1:C1, and the rows and columns, from 1
    uncomputed: dict[int, str]  # row -> its first cell with a formula that has no value
    notes: list[str]

    def header_at(self, columns: dict[str, str]) -> int | None:
        return next((i for i, cells in enumerate(self._top()) if is_header(cells, columns)), None)

    def questions_at(self) -> int | None:
        """The header of a test set without answers."""
        return next((i for i, cells in enumerate(self._top()) if cells & set(QUESTIONS)), None)

    def _top(self) -> list[set[str]]:
        return [{c.strip() for c in cells} for cells in self.lines[:HEADER_WITHIN]]


def read_xlsx(path: Path, columns: dict[str, str]) -> Sheet:
    """The rows of a workbook's visible sheets. Lines above a header (a title over merged cells) are skipped and reported."""
    raw = read_file(path, DataError)
    pages, pictures = _pages(path, raw)
    pages = [page for page in pages if any(any(cells) for cells in page.lines)]
    shown = [page for page in pages if not page.hidden]
    headers = {page.title: page.header_at(columns) for page in shown}
    if all(at is None for at in headers.values()):
        headers = {page.title: page.questions_at() for page in shown}
    read = [page for page in shown if headers[page.title] is not None]
    if pages and not shown:
        raise DataError(f"{path}: every sheet that holds something is hidden", "Show the sheet that is meant.")
    if shown and not read:
        over = next((area.coord for page in shown for area in page.merged if area.min_row <= HEADER_WITHIN), None)
        more = f" ({over} is one merged cell)" if over else ""
        what = f"{path}: no header with a question and an answer{more}"
        raise DataError(what, "Name the columns prompt and response, or say --columns prompt=NAME,response=NAME.")
    records: list[Record] = []
    notes = []
    for page in pages:
        sheet = f"sheet {quote(page.title)}"
        at = headers.get(page.title)
        if at is None:
            notes.append(f"{sheet} is {'hidden' if page.hidden else 'without a header'} and not read")
            continue
        name = f"{sheet}, " if len(read) > 1 else ""
        rows = _records(page, at, path, name)
        told = [f"rows: {len(rows):,}"] * (len(read) > 1) + [f"header in row {at + 1}"] * bool(at) + page.notes
        notes += [f"{name}{note}" for note in told]
        records += rows
    notes += [f"pictures, which are not read: {pictures:,}"] * bool(pictures)
    return Sheet(path, hashlib.sha256(raw).hexdigest(), "; ".join(notes), records)


def _records(page: Page, at: int, path: Path, sheet: str) -> list[Record]:
    """The rows under the header in line `at`."""
    header = header_of(page.lines[at], f"{path}, {sheet}row {at + 1}")
    used = [column for column, name in enumerate(page.lines[at], 1) if name.strip()]
    records: list[Record] = []
    merged: dict[int, list[Any]] = {}
    for area in page.merged:
        for row in range(area.min_row, area.max_row + 1):
            merged.setdefault(row, []).append(area)
    for number, cells in enumerate(page.lines[at + 1 :], at + 2):
        if not any(cells) and number not in page.uncomputed:
            continue
        place = f"{sheet}row {number}"
        part = next(
            (a.coord for a in merged.get(number, []) if any(a.min_col <= column <= a.max_col for column in used)), None
        )
        bad = next((text for text in cells if text in CELL_ERRORS), None)
        record = dict(zip(header, cells, strict=False))
        if part is not None:
            what = f"{path}, {place}: the cells {part} are merged"
            record = RowError("merged cells", what, "Unmerge them and fill each one.")
        elif number in page.uncomputed:
            what = f"{path}, {place}: the formula in {page.uncomputed[number]} has no value"
            hint = "Open the file in Excel or LibreOffice and save it there."
            record = RowError("a formula without a value", what, hint)
        elif bad is not None:
            record = RowError("a cell with an error", f"{path}, {place} holds {bad}", "Correct its formula.")
        records.append((place, record))
    return records


def _pages(path: Path, raw: bytes) -> tuple[list[Page], int]:
    """The sheets of a workbook, and how many pictures it holds."""
    try:
        import openpyxl

        from .sheet_size import check_size
    except ImportError:
        hint = "pip install 'minilora[report]', or save it as csv."
        raise DataError(f"{path}: openpyxl is not installed", hint) from None
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as book:
            check_size(book)
            pictures = sum(name.startswith("xl/media/") for name in book.namelist())
            parts = [book.read(name) for name in book.namelist() if name.startswith("xl/worksheets/")]
        computed = any(FORMULA.search(part) for part in parts)
        with catch_warnings(action="ignore"):  # they quote the workbook as it is
            values: Any = openpyxl.load_workbook(io.BytesIO(raw), data_only=True)
            formulas: Any = openpyxl.load_workbook(io.BytesIO(raw)) if computed else values
        return [_page(sheet, formulas[sheet.title]) for sheet in values.worksheets], pictures
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 a broken workbook makes the libraries raise almost anything
        what = f"{path} is not a workbook that can be read: {' '.join(str(error).split())[:160]}"
        raise DataError(what, "Save it as xlsx again, or as csv.") from None


def _page(sheet: Any, formulas: Any) -> Page:
    cells = [cell for row in sheet.iter_rows() for cell in row]
    # a formula whose value is the empty text has the type str
    without = [c for c in cells if c.value is None and c.data_type != "str" and formulas[c.coordinate].data_type == "f"]
    uncomputed = {cell.row: cell.coordinate for cell in reversed(without)}
    comments = [cell.coordinate for cell in cells if cell.comment]
    other = [c.coordinate for c in cells if _is_number(c.value) and c.number_format not in AS_STORED]
    hidden = [n for n, row in sheet.row_dimensions.items() if row.hidden and n <= sheet.max_row]
    columns = sorted(letter for letter, column in sheet.column_dimensions.items() if column.hidden)
    notes = []
    if hidden:
        notes.append(f"hidden rows, which are read: {len(hidden):,} (first: row {min(hidden)})")
    if columns:
        notes.append(f"hidden columns, which are read: {', '.join(columns)}")
    if comments:
        notes.append(f"comments, which are not read: {len(comments):,} (first: {comments[0]})")
    if other:
        notes.append(f"numbers read as they are stored, not as they are shown: {len(other):,} (first: {other[0]})")
    lines = [[_text(cell) for cell in row] for row in sheet.iter_rows()]
    merged = list(sheet.merged_cells.ranges)
    return Page(sheet.title, sheet.sheet_state != "visible", lines, merged, uncomputed, notes)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(cell: Any) -> str:
    """A cell as text, as Excel writes it to a csv: TRUE, whole numbers without a point, 15 digits, dates as ISO, empty as ""."""
    value = cell.value
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else f"{value:.15g}"
    if isinstance(value, datetime):
        is_day = value.time() == time() and "h" not in cell.number_format.lower()
        return value.date().isoformat() if is_day else value.isoformat(" ")
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, timedelta):
        minutes, seconds = divmod(round(value.total_seconds()), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
    text = ESCAPED.sub(lambda m: chr(int(m[1], 16)), str(value))  # Excel writes control characters so, as _x000D_
    return text.replace("\r\n", "\n").replace("\r", "\n")
