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
from .json_files import BOM
from .problems import RowError, quote
from .shapes import is_header

HEADER_WITHIN = 10  # lines of a sheet that may stand above its header
MAX_BOOK = 2 << 30  # bytes of an unpacked workbook
ESCAPED = re.compile(r"_x([0-9A-Fa-f]{4})_")
# some of the most frequent characters of Chinese texts; of 1,000 rows of instructions none had fewer than a fifth of these
COMMON = frozenset(
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方多经么去法学如都同现"
    "当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日军者意无力它与长把机十民第公此已工使情明性知全三又关点正业外将两高间由问很最重"
    "并物手应战向头文体政美相见被利什二等产或新己制身果加西斯月话合回特代内信表化老给世位次度门任常先海通教儿原东声提立及比员解水名真论处走义各入"
    "几口认条平系气题活尔更别打女变四神总何电数安少报才结反受目太量再感建务做接必场件计管期市直德资命山金指克许统区保至队形社便空决治展马科司五基"
    "眼书非则听白却界达光放强即像难且权思王象完设式色路记南品住告类求据程北边死张该交规万取拉格望觉术领共确传师观清今切院让识候带导争运请吗您"
)
COMMON_SHARE = 0.15  # at least so many of its Chinese characters are among them in a text that is Chinese
OTHERS = ("big5", "shift_jis", "euc_kr", "cp1252")
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


def read_csv(path: Path) -> Sheet:
    """A csv or tsv file: UTF-8 with or without byte order mark, UTF-16 with one, or GB18030, as Excel saves it."""
    raw = path.read_bytes()
    text, encoding = _decode_csv(raw, path)
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
    notes = [encoding] * (encoding != "utf-8") + [f"cells cut at {mark!r}"] * (mark != ",")
    return Sheet(path, hashlib.sha256(raw).hexdigest(), ", ".join(notes), "line", records)


def _header(cells: list[str], where: str) -> list[str]:
    header = [c.strip() for c in cells]
    twice = next((c for c in header if c and header.count(c) > 1), None)
    if twice is not None:
        raise DataError(f"{where}: two columns are named {quote(twice)}", "Give each column a name of its own.")
    return header


def _decode_csv(raw: bytes, path: Path) -> tuple[str, str]:
    """The text and its encoding. A UTF-8 file with a broken byte is not taken for GB18030, in which most bytes are a text."""
    for mark, name in ((BOM, "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        if raw.startswith(mark):
            try:
                return raw[len(mark) :].decode(name), f"{name} with byte order mark"
            except UnicodeDecodeError as error:
                line = raw[: error.start].count(10) + 1
                raise DataError(f"{path}, line {line}: a byte there is not {name}", "Save the file again.") from None
    try:
        return raw.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        read = raw.decode("utf-8", errors="replace")
    broken = read.count("\ufffd")
    if broken > sum(ord(c) > 127 for c in read) - broken:  # more of it fails as UTF-8 than passes
        try:
            text = raw.decode("gb18030")
        except UnicodeDecodeError:
            text = ""
        if _is_chinese(text):
            return text, "gb18030"
        fitting = [name for name in OTHERS if _decodes(raw, name)]
        told = f"it could be {', '.join(fitting)}" if fitting else "no encoding that is known here fits"
        hint = f"Convert it: iconv -f {fitting[0] if fitting else 'ENCODING'} -t utf-8 {path.name} > new.csv"
        raise DataError(f"{path} is neither UTF-8 nor plausible Chinese in GB18030; {told}", hint)
    json_files.decode(raw, str(path))
    raise AssertionError(path)


def _is_chinese(text: str) -> bool:
    """Whether enough of the Chinese characters of a text are frequent ones: what was read in the wrong encoding has few."""
    characters = [c for c in text if "\u3400" <= c <= "\u9fff"]
    return bool(characters) and sum(c in COMMON for c in characters) >= COMMON_SHARE * len(characters)


def _decodes(raw: bytes, encoding: str) -> bool:
    try:
        raw.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


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
