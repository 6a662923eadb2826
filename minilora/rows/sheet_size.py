"""How large the sheets of a workbook are, before a library makes a cell for every place of them: a user is told what to delete.

A file of a few kilobytes can hold one cell in the last corner of a sheet, a million empty rows, or one merge or link over 17 billion
places. What a sheet spans has to be in proportion to what it holds; it is read once, element by element, in a memory that does not grow.
"""

import re
import zipfile
from functools import cache
from xml.parsers import expat

from openpyxl.utils import column_index_from_string, range_boundaries

MAX_BOOK = 256 << 20  # bytes of an unpacked workbook
SHEETS = re.compile(r"xl/(worksheets/|comments).*\.xml")
ROOM, SPARSE = 100_000, 20  # places of any workbook, and of one for each cell that holds something
ROWS, COLUMNS = 1 << 20, 1 << 14  # of a sheet
PLACES = {"c": "r", "mergeCell": "ref", "hyperlink": "ref", "comment": "ref"}  # elements that become cells, and where
CELL = re.compile(r"([A-Z]{1,3})([0-9]{1,7})")
HELD = {"v", "is", "f", "comment"}


def unpacked(book: zipfile.ZipFile) -> int:
    """The bytes of a workbook without its pictures."""
    return sum(part.file_size for part in book.infolist() if not part.filename.startswith("xl/media/"))


def check_size(book: zipfile.ZipFile) -> None:
    """ValueError for a workbook that unpacks to too much, or whose sheets span far more than they hold."""
    size = unpacked(book)
    if size > MAX_BOOK:
        raise ValueError(f"it unpacks to {size >> 20:,} MiB, {MAX_BOOK >> 20} are read: save it as csv")
    spans = held = 0
    for name in filter(SHEETS.fullmatch, book.namelist()):
        extent = _Extent()
        with book.open(name) as file:
            extent.read(file)
        spans, held = spans + extent.spans, held + extent.held
    if spans > ROOM + SPARSE * held:
        raise ValueError(
            f"its sheets span {spans:,} cells, {held:,} hold something: delete what is empty beyond the table"
        )


_column = cache(column_index_from_string)


class _Extent:
    """Counts the places of a sheet, or of its comments, while it is read."""

    def __init__(self) -> None:
        self.held = self._elements = self._covered = 0
        self._row = self._column = self._rows = self._columns = 0

    @property
    def spans(self) -> int:
        """The places between A1 and the last one, or what is written out of them if that is more."""
        return max(self._rows * self._columns, self._elements) + self._covered

    def read(self, file) -> None:
        parser = expat.ParserCreate()
        parser.StartElementHandler = self._start
        parser.StartDoctypeDeclHandler = self._refuse
        try:
            parser.ParseFile(file)
        except expat.ExpatError as error:
            raise ValueError(f"a sheet of it is not XML ({error})") from None

    def _refuse(self, *_) -> None:
        raise ValueError("it declares entities")

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        name = name.rpartition(":")[2]
        self.held += name in HELD
        if name == "row":
            self._elements += 1
            self._row, self._column = int(attributes.get("r", self._row + 1)), 0
            self._rows = max(self._rows, self._row)
        elif name in PLACES:
            self._place(name, attributes.get(PLACES[name]))

    def _place(self, name: str, place: str | None) -> None:
        self._elements += 1
        if place is None:
            first = last = (self._column + 1, self._row)
        elif (cell := CELL.fullmatch(place)) is not None:
            first = last = (_column(cell[1]), int(cell[2]))
        else:
            left, top, right, bottom = range_boundaries(place)
            first, last = (left or 1, top or 1), (right or COLUMNS, bottom or ROWS)
        self._column, row = last
        self._columns, self._rows = max(self._columns, self._column), max(self._rows, row)
        if name != "c":
            self._covered += (last[0] - first[0] + 1) * (last[1] - first[1] + 1)
