"""A workbook: the bytes of one, or a JSON object of its parts, which are packed."""

import io
import json
import zipfile
from functools import cache

from minilora.config import PLAIN
from minilora.errors import RowError
from minilora.rows import workbook
from minilora.rows.files import open_rows, read_row

from ..room import fresh

WORDS = ["<c r=\"A1\" t=\"inlineStr\"><is><t>prompt</t></is></c>", "<row r=\"3\">", "</row>", "<f>1+1</f>", "<v>1</v>", "t=\"s\"", "t=\"e\"", "t=\"b\"", "t=\"d\"", "s=\"99\"",
         "r=\"XFD1048576\"", "r=\"A0\"", "r=\"$A$1\"", "<mergeCell ref=\"A1:XFD1048576\"/>", "<!DOCTYPE x [<!ENTITY a \"aaaa\">]>", "&a;", "_x000D_", "_x001B_", "xmlns=\"x\"",
         "<hyperlink ref=\"A1:Z9\"/>", "<dimension ref=\"A1:B2\"/>", "date1904=\"1\"", "Target=\"../../x\"", "TargetMode=\"External\"", "xl/worksheets/sheet1.xml",
         "xl/sharedStrings.xml", "xl/styles.xml", "[Content_Types].xml", "hidden=\"1\"", "state=\"hidden\"", "1e999", "-1"]  # fmt: skip
SEEDS: list[bytes] = []


@cache
def _book() -> bytes:
    import openpyxl

    book = openpyxl.Workbook()
    sheet = book.worksheets[0]
    for row in (("prompt", "response"), ("q", "a_x000D_b"), (1.5, True), ("=1+1", "x")):
        sheet.append(row)
    sheet.merge_cells("A6:B7")
    book.create_sheet("other").append(("x",))
    raw = io.BytesIO()
    book.save(raw)
    return raw.getvalue()


def prepare() -> None:
    from minilora.rows.workbook_cells import read_cells

    workbook.cells_of = read_cells  # in this process, where the fuzzer sees what is covered
    with zipfile.ZipFile(io.BytesIO(_book())) as book:
        parts = {name: book.read(name).decode() for name in book.namelist()}
    parts = {name: text for name, text in parts.items() if "theme" not in name and "docProps" not in name}
    inline = (
        '<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData><row r="1"><c r="A1" t="inlineStr"><is><t>prompt</t></is></c>'
        '<c r="B1" t="inlineStr"><is><t>response</t></is></c></row><row><c t="inlineStr"><is><t>q</t></is></c><c><v>1</v></c></row></sheetData></worksheet>'
    )
    sheet = next(name for name in parts if "worksheets/sheet1" in name)
    SEEDS[:] = [json.dumps(parts).encode(), json.dumps(parts | {sheet: inline}).encode(), _book()]


def target(data: bytes) -> None:
    path = fresh("xlsx") / "x.xlsx"
    try:
        parts = json.loads(data)
    except ValueError:
        parts = None
    if isinstance(parts, dict):
        with zipfile.ZipFile(path, "w") as book:
            for name, text in parts.items():
                text = text if isinstance(text, str) else json.dumps(text)
                book.writestr(
                    name.encode("utf-8", "replace").decode().partition("\0")[0] or "x", text.encode("utf-8", "replace")
                )
    else:
        path.write_bytes(data)
    rows = open_rows(path)
    for number in range(len(rows)):
        try:
            read_row(rows, number, PLAIN)
        except RowError as error:
            assert error.code == 3
