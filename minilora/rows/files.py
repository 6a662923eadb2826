"""A file of rows as a sequence: how many there are, and each one by its number."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from ..config import PLAIN, DataConfig
from ..errors import DataError
from .encodings import BOM, open_text
from .json_files import JsonArray, JsonLines, JsonObjects, TextLines, is_lines, is_spread
from .keys import refuse_unread
from .shapes import Row, to_messages
from .sheets import read_csv
from .workbook import read_xlsx

TRAIN_NAMES = ("train",)
VAL_NAMES = ("dev", "val", "valid", "validation", "eval")
KINDS = (".jsonl", ".json", ".csv", ".tsv", ".xlsx", ".txt")


class Places(Protocol):
    """Rows by number 0, 1, ...: the place of each as a message names it, and its JSON value; RowError if it has none."""

    def where(self, number: int) -> str: ...
    def value(self, number: int) -> Any: ...


class RowFile(Places, Protocol):
    """The rows of a file; `sha256` is of its bytes, `note` says how it was read if that was a choice."""

    path: Path
    sha256: str
    note: str

    def __len__(self) -> int: ...


def open_rows(path: str | Path, settings: DataConfig = PLAIN) -> RowFile:
    """The RowFile of a path, by its ending and its first bytes. DataError for what is no such file, or has no row.

    Of the settings, `columns` helps to find the header of a sheet, and `encoding` is that of the text; "" is UTF-8.
    """
    path = Path(path)
    check_file(path)
    try:
        file = _open(path, settings.columns, settings.encoding)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", "Check the path and the file's permissions.") from None
    if not len(file):
        raise DataError(f"{path}: no rows", "Give a file with at least one conversation.")
    return file


def check_file(path: Path) -> None:
    """DataError unless a path is a regular file; a pipe could not be read twice."""
    if not path.is_file():
        what = "a folder" if path.is_dir() else "not a regular file" if path.exists() else "not there"
        raise DataError(
            f"{path} is {what}", "Give a json, jsonl, csv, xlsx or txt file, or a folder with a train file."
        )


def _open(path: Path, columns: dict[str, str], encoding: str) -> RowFile:
    kind = path.suffix.lower()
    if kind in (".xlsx", ".xlsm"):
        book = read_xlsx(path, columns)
        book.note = "; ".join(filter(None, [book.note, "a workbook needs no --encoding" if encoding else ""]))
        return book
    if kind in (".xls", ".ods", ".parquet", ".arrow", ".safetensors", ".zip", ".gz", ".docx", ".pdf"):
        raise DataError(f"{path} is not a file of rows that can be read", "Save it as jsonl, csv or xlsx.")
    rows = _reader(path, encoding)(path, encoding)
    rows.note = ", ".join(filter(None, [encoding, rows.note]))
    return rows


def _reader(path: Path, encoding: str) -> Callable[[Path, str], RowFile]:
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        return read_csv
    with open_text(path, encoding) as text:
        start = text.read(4096).removeprefix(BOM).lstrip()
        if kind == ".txt" and start[:1] not in (b"[", b"{"):
            return TextLines
        if start.startswith(b"{") and is_spread(text):
            return JsonObjects
        return JsonArray if start.startswith(b"[") and not is_lines(text) else JsonLines


def find_data(path: str | Path) -> tuple[Path, Path | None]:
    """The training file of a path, and the validation file beside it if the path is a folder that has one.

    A folder of ChatGLM3's tools holds train.json and dev.json. Any other path is the training file itself.
    """
    path = Path(path)
    if not path.is_dir():
        return path, None
    found = [[p for n in names for k in KINDS if (p := path / (n + k)).is_file()] for names in (TRAIN_NAMES, VAL_NAMES)]
    for files in found:
        if len(files) > 1:
            both = ", ".join(p.name for p in files[:3])
            raise DataError(f"{path} is a folder with {both}", "Give the file that is meant.")
    train, val = found
    if not train:
        raise DataError(
            f"{path} is a folder without a train file", "Give a file, or name one of its files train.jsonl."
        )
    return train[0], val[0] if val else None


def validation_file(path: str | Path) -> Path:
    """The file of validation rows that a path means: of a folder the one beside its training file, if it has one."""
    found, beside = find_data(path)
    return beside or found


def read_row(file: RowFile, number: int, settings: DataConfig) -> Row:
    """The conversation of a row; RowError if it is none."""
    return to_messages(file.value(number), file.where(number), settings)


def read_rows(
    path: str | Path, settings: DataConfig = PLAIN, say: Callable[[str], None] = lambda note: None
) -> Iterator[Row]:
    """The conversations of a file, one after the other; RowError for the first row that is none, or has a key that is not read.

    `say` is called with how the file was read if that was a choice.
    """
    file = open_rows(path, settings)
    if file.note:
        say(f"{path}: {file.note}")
    for number in range(len(file)):
        row = read_row(file, number, settings)
        refuse_unread(row.unread, row.where)
        yield row
