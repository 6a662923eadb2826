"""The sheets of a workbook as texts: the child process of workbook.py, where the memory and time of openpyxl have a bound.

In: the bytes of a workbook on stdin. Out: its sheets as JSON (Page.read in workbook.py), or one line on stderr and an exit code.
python-calamine 0.9 would be faster, but gives cells with an error and formulas without a value as empty texts, and knows no
comments, number formats, hidden rows and hidden columns.
"""

import errno
import io
import json
import os
import re
import sys
import zipfile
from collections import Counter
from datetime import date, datetime, time, timedelta
from typing import Any
from warnings import catch_warnings

import openpyxl

from ..isolated import bound
from .sheet_size import MAX_BOOK, check_size, unpacked

ESCAPED = re.compile(r"_x([0-9A-Fa-f]{4})_")
FORMULA = re.compile(rb"<(?:\w+:)?f[ >/]")
AS_STORED = ("General", "0", "@")  # formats in which Excel shows a number as it is stored
MOST_LETTERS = 1 << 29  # of all cells together: a text that many cells share stands in the file once
TOO_MUCH = "it takes far more memory than a workbook of its size"
# bytes and seconds for any workbook, and more for what it unpacks to: openpyxl takes 20 bytes a byte, and 0.7 s a MiB
MEMORY, SECONDS = 256 << 20, 60
MEMORY_A_BYTE, SECONDS_A_MIB, MOST_MEMORY = 60, 6, 8 << 30


def main() -> None:
    raw = sys.stdin.buffer.read()
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as book:
            size = unpacked(book)
        bound(min(MEMORY + MEMORY_A_BYTE * size, MOST_MEMORY), SECONDS + SECONDS_A_MIB * (size >> 20), MAX_BOOK)
        json.dump(read_cells(raw), sys.stdout)
        sys.stdout.flush()
    except MemoryError:
        sys.exit(TOO_MUCH)
    except OSError as error:  # what was not written yet would be tried again by an orderly end
        full = error.errno != errno.EFBIG
        print(error.strerror if full else TOO_MUCH, file=sys.stderr, flush=True)
        os._exit(6 if full else 1)
    except (zipfile.BadZipFile, ValueError) as error:
        sys.exit(str(error))


def read_cells(raw: bytes) -> dict[str, Any]:
    """The sheets of a workbook and how many pictures it holds, as JSON has it; ValueError if it is none."""
    try:
        return _cells(raw)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 a broken workbook makes the libraries raise almost anything
        raise ValueError(" ".join(str(error).split())) from None


def _cells(raw: bytes) -> dict[str, Any]:
    with zipfile.ZipFile(io.BytesIO(raw)) as book:
        check_size(book)
        pictures = sum(name.startswith("xl/media/") for name in book.namelist())
        parts = (book.read(name) for name in book.namelist() if not name.startswith("xl/media/"))
        computed = any(FORMULA.search(part) for part in parts)
    with catch_warnings(action="ignore"):  # they quote the workbook as it is
        values: Any = openpyxl.load_workbook(io.BytesIO(raw), data_only=True)
        formulas: Any = openpyxl.load_workbook(io.BytesIO(raw)) if computed else values
    texts: dict[str, int] = {}  # each text once: all rows of a sheet may have the same instruction
    pages = [_page(sheet, formulas[sheet.title], texts) for sheet in values.worksheets]
    counts = Counter(number for page in pages for line in page["lines"] for number in line)
    length = sum(len(text) * counts[number] for text, number in texts.items())
    if length > MOST_LETTERS:
        raise ValueError(f"its cells hold {length:,} characters, up to {MOST_LETTERS:,} are read: divide it")
    return {"texts": list(texts), "pages": pages, "pictures": pictures}


def _page(sheet: Any, formulas: Any, texts: dict[str, int]) -> dict[str, Any]:
    """A sheet; its lines hold the numbers of their texts."""
    cells = [cell for row in sheet.iter_rows() for cell in row]
    # a formula whose value is the empty text has the type str
    without = [c for c in cells if c.value is None and c.data_type != "str" and formulas[c.coordinate].data_type == "f"]
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
    return {
        "title": sheet.title,
        "hidden": sheet.sheet_state != "visible",
        "lines": [[texts.setdefault(_text(cell), len(texts)) for cell in row] for row in sheet.iter_rows()],
        "merged": [[a.coord, a.min_row, a.max_row, a.min_col, a.max_col] for a in sheet.merged_cells.ranges],
        "uncomputed": [[cell.row, cell.coordinate] for cell in reversed(without)],
        "notes": notes,
    }


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


if __name__ == "__main__":
    main()
