"""Workbooks as people keep them: several sheets, hidden ones, formulas, dates: each is read, told, or refused."""

import json
import zipfile
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from openpyxl.comments import Comment

from minilora.errors import DataError, DiskError
from minilora.rows import open_rows, read_rows, sheet_size, trainable, workbook, workbook_cells
from minilora.rows.workbook import cells_of, read_xlsx
from minilora.rows.workbook_cells import read_cells

HEAD = ("question", "answer")


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Cells are read in this process, which starts none; the last tests have it as it is."""
    monkeypatch.setattr(workbook, "cells_of", read_cells)


def sheets(path: Path, **pages: list) -> tuple[Path, Any]:
    """A workbook with a sheet for each list of lines; to be saved to the path when it was changed."""
    book: Any = openpyxl.Workbook()
    book.remove(book.active)
    for title, lines in pages.items():
        sheet = book.create_sheet(title)
        for line in lines:
            sheet.append(line)
    return path, book


def texts(path: Path) -> list[list[str]]:
    return [[m["content"] for m in trainable(row).messages] for row in read_rows(path)]


def test_every_sheet_with_a_header_is_read_and_the_others_are_told(tmp_path: Path):
    path, book = sheets(
        tmp_path / "x.xlsx",
        说明=[["made by Li"]],
        一月=[HEAD, ["a", "b"]],
        二月=[["title"], HEAD, ["c", "d"]],
        old=[HEAD, ["e", "f"]],
        empty=[],
    )
    book["old"].sheet_state = "hidden"
    book.save(path)
    assert texts(path) == [["a", "b"], ["c", "d"]]
    assert [row.where for row in read_rows(path)] == [f"{path}, sheet '一月', row 2", f"{path}, sheet '二月', row 3"]
    note = open_rows(path).note
    assert "sheet '说明' is without a header and not read" in note and "sheet 'old' is hidden and not read" in note
    assert "sheet '二月', header in row 2" in note and "empty" not in note
    for sheet in book.worksheets[1:]:
        sheet.sheet_state = "hidden"
    book.save(path)
    with pytest.raises(DataError, match="no header with a question and an answer"):
        open_rows(path)


def test_a_workbook_of_hidden_sheets(tmp_path: Path):
    path, book = sheets(tmp_path / "x.xlsx", empty=[], old=[HEAD, ["a", "b"]])
    book["old"].sheet_state = "veryHidden"
    book.save(path)
    with pytest.raises(DataError, match="every sheet that holds something is hidden"):
        open_rows(path)


def test_hidden_rows_and_comments_are_told(tmp_path: Path):
    path, book = sheets(tmp_path / "x.xlsx", s=[HEAD, ["a", "b"], ["c", "d"]])
    book["s"].row_dimensions[3].hidden = book["s"].column_dimensions["B"].hidden = True
    book["s"]["B2"].comment = Comment("wrong", "me")
    book.save(path)
    with zipfile.ZipFile(path, "a") as parts:
        parts.writestr("xl/media/image1.png", b"")
    assert texts(path) == [["a", "b"], ["c", "d"]]
    assert (
        open_rows(path).note
        == "hidden rows, which are read: 1 (first: row 3); hidden columns, which are read: B; comments, which are not read: 1 (first: B2); pictures, which are not read: 1"
    )


@pytest.mark.parametrize("cell", ["A2", "B2"])
def test_a_formula_without_a_value_is_refused(tmp_path: Path, cell: str):
    path, book = sheets(tmp_path / "x.xlsx", s=[("question", "input", "answer"), ["a", "i", "b"]])
    book["s"][cell] = '=C1&"x"'
    book.save(path)
    with pytest.raises(DataError, match=f"row 2: the formula in {cell} has no value"):
        texts(path)


def test_a_column_without_a_name_is_not_lost(tmp_path: Path):
    path, book = sheets(tmp_path / "x.xlsx", s=[(*HEAD, None, None), ["a", "b", "more", None]])
    book["s"].merge_cells("B1:C1")
    book.save(path)
    with pytest.raises(DataError, match="row 2: 'column 3' holds something and is not read"):
        texts(path)
    (tmp_path / "x.csv").write_text("question,answer,,\na,b,more,\n")
    with pytest.raises(DataError, match="line 2: 'column 3' holds something and is not read") as error:
        texts(tmp_path / "x.csv")
    assert "--ignore-keys 'column 3'" in error.value.hint


def test_cells_are_the_texts_that_excel_writes_to_a_csv(tmp_path: Path):
    cells = {
        date(2024, 5, 1): "2024-05-01", datetime(2024, 5, 1, 12, 30): "2024-05-01 12:30:00", time(8, 5): "08:05:00", timedelta(hours=30): "30:00:00",
        True: "TRUE", False: "FALSE", 7: "7", 8.0: "8", 0.1 + 0.2: "0.3",
    }  # fmt: skip
    path, book = sheets(tmp_path / "x.xlsx", s=[HEAD, *(["q", value] for value in cells)])
    book.save(path)
    assert [answer for _, answer in texts(path)] == list(cells.values()) and not open_rows(path).note
    book["s"]["B8"].number_format = "00000"
    book["s"]["B10"].number_format = "0%"
    book.save(path)
    assert open_rows(path).note == "numbers read as they are stored, not as they are shown: 2 (first: B8)"


def test_a_test_set_without_answers(tmp_path: Path):
    path, book = sheets(tmp_path / "x.xlsx", s=[["test set"], ["id", "question"], [1, "a"]])
    book.save(path)
    (row,) = read_rows(path)
    assert [m["content"] for m in row.messages] == ["a"]
    with pytest.raises(DataError, match="no message is the assistant's"):
        texts(path)


# ---- sheets out of proportion


def spoiled(path: Path, edit: Callable[[str], str], **parts: bytes) -> Path:
    """A workbook of two rows whose sheet is edited as text."""
    book: Any = openpyxl.Workbook()
    for row in (["instruction", "output"], ["q", "a"], ["r", "b"]):
        book.active.append(row)
    book.save(path)
    with zipfile.ZipFile(path) as old:
        content = {name: old.read(name) for name in old.namelist()}
    sheet = "xl/worksheets/sheet1.xml"
    content[sheet] = edit(content[sheet].decode()).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, raw in (content | parts).items():
            new.writestr(name, raw)
    return path


def after(end: str, more: str) -> Callable[[str], str]:
    """An edit that puts text before the end of the rows, or with end "" behind it."""
    rows = "</sheetData>"
    return lambda sheet: sheet.replace(rows, more + rows if end else rows + more)


TEXT = "<is><t>x</t></is></c></row>"
SPANS = {
    "a cell in the last corner": after("</sheetData>", f'<row r="1048576"><c r="XFD1048576" t="inlineStr">{TEXT}'),
    "a cell in the last row": after("</sheetData>", f'<row r="1048576"><c r="A1048576" t="inlineStr">{TEXT}'),
    "a cell without a place in a far row": after("</sheetData>", f'<row r="1048576"><c/><c t="inlineStr">{TEXT}'),
    "a merge over the whole sheet": after("", '<mergeCells><mergeCell ref="A5:XFD1048576"/></mergeCells>'),
    "a merge of whole columns": after("", '<mergeCells><mergeCell ref="A:XFD"/></mergeCells>'),
    "many merges": after("", '<mergeCells>' + '<mergeCell ref="A9:J900"/>' * 90 + '</mergeCells>'),
    "a link over the whole sheet": after("", '<hyperlinks><hyperlink ref="A1:XFD1048576" location="x"/></hyperlinks>'),
    "empty rows": after("</sheetData>", '<row ht="5"/>' * 200_000),
    "empty cells": after("</sheetData>", f"<row>{'<c/>' * 200_000}</row>"),
    "entities": lambda sheet: '<!DOCTYPE x [<!ENTITY a "b">]>' + sheet[sheet.find("<worksheet") :],
    "no XML": lambda sheet: sheet[:-20],
}  # fmt: skip


@pytest.mark.parametrize("name", SPANS)
def test_a_sheet_that_spans_more_than_it_holds_is_refused(tmp_path, name):
    """Before openpyxl makes a cell of it."""
    with pytest.raises(DataError, match="cells, |entities|not XML"):
        read_xlsx(spoiled(tmp_path / "x.xlsx", SPANS[name]), {})


def test_a_comment_far_away_and_a_book_that_unpacks_to_too_much(tmp_path, monkeypatch):
    comment = b'<comments><commentList><comment ref="XFD1048576"/></commentList></comments>'
    with pytest.raises(DataError, match="17,179,869,[0-9]+ cells"):
        read_xlsx(spoiled(tmp_path / "x.xlsx", str, **{"xl/comments1.xml": comment}), {})
    monkeypatch.setattr(sheet_size, "MAX_BOOK", 1 << 20)
    with pytest.raises(DataError, match="unpacks to"):
        read_xlsx(spoiled(tmp_path / "x.xlsx", str, **{"xl/sharedStrings.xml": b" " * (2 << 20)}), {})
    assert (
        len(read_xlsx(spoiled(tmp_path / "x.xlsx", str, **{"xl/media/a.png": b" " * (2 << 20)}), {})) == 2
    )  # a picture


def test_other_parts_may_hold_anything(tmp_path):
    settings = {"xl/printerSettings/printerSettings1.bin": b"\0\1<\2"}
    assert len(read_xlsx(spoiled(tmp_path / "x.xlsx", str, **settings), {})) == 2


def test_what_the_library_warns_of_is_not_printed(tmp_path, recwarn):
    """It quotes names of the workbook with their control codes."""
    merged = after("", '<mergeCells><mergeCell ref="A2:B2"/></mergeCells>')
    commented = b'<comments><authors><author>x</author></authors><commentList><comment ref="B2" authorId="0"/></commentList></comments>'
    read_xlsx(spoiled(tmp_path / "x.xlsx", merged, **{"xl/comments1.xml": commented}), {})
    assert not recwarn.list


# ---- the process that reads the cells


def test_the_process_finds_what_is_found_here(tmp_path):
    merged = after("", '<mergeCells><mergeCell ref="A2:B2"/></mergeCells>')
    raw = spoiled(tmp_path / "x.xlsx", merged).read_bytes()
    assert cells_of(raw) == read_cells(raw) and read_cells(raw)["pages"][0]["merged"] == [["A2:B2", 2, 2, 1, 2]]


def test_a_sheet_that_the_measure_does_not_see_takes_no_more_than_the_bound(tmp_path, monkeypatch):
    """The library goes by what workbook.xml.rels names, which can be a part of any name."""
    monkeypatch.setattr(workbook, "cells_of", cells_of)
    path = spoiled(tmp_path / "x.xlsx", SPANS["a merge over the whole sheet"])
    with zipfile.ZipFile(path) as old:
        content = {name.replace("worksheets/", "media/"): old.read(name) for name in old.namelist()}
    content = {name: raw.replace(b"worksheets/sheet1", b"media/sheet1") for name, raw in content.items()}
    with zipfile.ZipFile(path, "w") as new:
        for name, raw in content.items():
            new.writestr(name, raw)
    with pytest.raises(DataError, match="far more memory than a workbook of its size"):
        read_xlsx(path, {})


def test_a_text_that_all_rows_share_is_handed_over_once(tmp_path, monkeypatch):
    path, book = sheets(tmp_path / "x.xlsx", one=[HEAD, *(["say" * 1000, str(i)] for i in range(50))])
    book.save(path)
    raw = path.read_bytes()
    assert len(json.dumps(cells_of(raw))) < 10_000
    assert [len(question) for question, _ in texts(path)] == [3000] * 50
    monkeypatch.setattr(workbook_cells, "MOST_LETTERS", 100_000)
    with pytest.raises(DataError, match="its cells hold 150,[0-9]+ characters"):
        read_xlsx(path, {})


def test_no_workbook_is_told_in_one_line():
    with pytest.raises(ValueError, match="^File is not a zip file$"):
        cells_of(b"x")


def test_a_full_temporary_disk_is_told_as_one(tmp_path, monkeypatch):
    raw = spoiled(tmp_path / "x.xlsx", str).read_bytes()
    monkeypatch.setattr(workbook.tempfile, "TemporaryFile", lambda: open("/dev/full", "w+b"))  # noqa: SIM115
    with pytest.raises(DiskError, match="No space left on device"):
        cells_of(raw)
