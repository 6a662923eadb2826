"""xlsx: the rows of every visible sheet that has a header; anything else in a workbook is reported or refused.

The cells are read in a process of its own (workbook_cells.py). Excel keeps the value of a formula beside it; another program
that wrote a formula may have left none.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Self

from ..errors import DataError, DiskError, RowError, quote
from ..files.regular import read_file
from ..isolated import environment
from .shapes import QUESTIONS, is_header
from .sheets import Record, Sheet, header_of

HEADER_WITHIN = 10  # lines of a sheet that may stand above its header
CELL_ERRORS = {"#REF!", "#N/A", "#VALUE!", "#DIV/0!", "#NAME?", "#NULL!", "#NUM!"}


class Area(NamedTuple):
    """Merged cells: their name as A1:C1, and the rows and columns, from 1."""

    name: str
    first_row: int
    last_row: int
    first_column: int
    last_column: int


class Page(NamedTuple):
    """A sheet of a workbook: its cells as texts, and what the texts do not show."""

    title: str
    hidden: bool
    lines: list[list[str]]
    merged: list[Area]
    uncomputed: dict[int, str]  # row -> its first cell with a formula that has no value
    notes: list[str]

    @classmethod
    def read(cls, j: dict[str, Any], texts: list[str]) -> Self:
        """A sheet as workbook_cells.py writes it, with the texts of all sheets."""
        lines = [[texts[number] for number in line] for line in j["lines"]]
        merged = [Area(*area) for area in j["merged"]]
        return cls(**j | {"lines": lines, "merged": merged, "uncomputed": dict(j["uncomputed"])})

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
        over = next((area.name for page in shown for area in page.merged if area.first_row <= HEADER_WITHIN), None)
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
    merged: dict[int, list[Area]] = {}
    for area in page.merged:
        for row in range(area.first_row, area.last_row + 1):
            merged.setdefault(row, []).append(area)
    for number, cells in enumerate(page.lines[at + 1 :], at + 2):
        if not any(cells) and number not in page.uncomputed:
            continue
        place = f"{sheet}row {number}"
        part = next(
            (a.name for a in merged.get(number, []) if any(a.first_column <= c <= a.last_column for c in used)), None
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
    if find_spec("openpyxl") is None:
        hint = "pip install 'minilora[report]', or save it as csv."
        raise DataError(f"{path}: openpyxl is not installed", hint)
    try:
        found = cells_of(raw)
    except ValueError as error:
        what = f"{path} is not a workbook that can be read: {str(error)[:160]}"
        raise DataError(what, "Save it as xlsx again, or as csv.") from None
    return [Page.read(page, found["texts"]) for page in found["pages"]], found["pictures"]


def cells_of(raw: bytes) -> dict[str, Any]:
    """What workbook_cells.py finds, in a process of its own; ValueError with what it says if that is no workbook."""
    command = [sys.executable, "-m", "minilora.rows.workbook_cells"]
    with tempfile.TemporaryFile() as out:  # whose size has a bound, as no pipe has
        child = subprocess.run(command, input=raw, stdout=out, stderr=subprocess.PIPE, env=environment(), check=False)
        if child.returncode:
            lines = child.stderr.decode("utf-8", "replace").splitlines()
            said = (
                lines[-1]
                if lines and child.returncode > 0
                else "it takes far more time or memory than a workbook of its size"
            )
            if child.returncode == 6:
                raise DiskError(f"{tempfile.gettempdir()}: {said}", "Free some space there, or set TMPDIR.")
            raise ValueError(said)
        out.seek(0)
        return json.load(out)
