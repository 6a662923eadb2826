"""Files of rows: every shape, every encoding, and what a broken row is told."""

import hashlib
import json
import os
import zipfile
from datetime import date
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minilora.config import DataConfig
from minilora.errors import DataError, RowError
from minilora.rows import fill, find_data, json_files, open_rows, read_rows, trainable
from minilora.rows.shapes import to_messages

FUZZ = settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
GOOD = {"prompt": "a", "completion": "b"}


def write(path: Path, *values, raw: bytes | str | None = None) -> Path:
    """jsonl of values, or what raw says."""
    text = "".join(json.dumps(v) + "\n" for v in values) if raw is None else raw
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def only(path: Path) -> tuple[list, str]:
    (row,) = read_rows(path)
    return [tuple(m.values()) for m in row.messages], row.shape


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as error:
        [trainable(row) for row in list(read_rows(path))]
    assert str(path) in error.value.what and error.value.hint
    assert len(str(error.value)) < 600 and str(error.value).count("\n") == 1
    return str(error.value)


S, U, A = (lambda text, role=role: (role, text) for role in ("system", "user", "assistant"))
SHAPES = {
    "alpaca": ({"instruction": "q", "output": "a"}, [U("q"), A("a")], "alpaca"),
    "alpaca input": ({"instruction": "q", "input": "x", "output": "a"}, [U("q\nx"), A("a")], "alpaca"),
    "alpaca empty input": ({"instruction": "q", "input": "", "output": "a"}, [U("q"), A("a")], "alpaca"),
    "alpaca null input": ({"instruction": "q", "input": None, "output": "a"}, [U("q"), A("a")], "alpaca"),
    "alpaca system": ({"instruction": "q", "output": "a", "system": "s"}, [S("s"), U("q"), A("a")], "alpaca"),
    "alpaca history": ({"instruction": "q3", "output": "a3", "system": "s", "history": [["q1", "a1"], ["q2", "a2"]]},
                       [S("s"), U("q1"), A("a1"), U("q2"), A("a2"), U("q3"), A("a3")], "alpaca"),
    "alpaca null history": ({"instruction": "q", "output": "a", "history": None}, [U("q"), A("a")], "alpaca"),
    "alpaca response": ({"instruction": "q", "response": "a"}, [U("q"), A("a")], "alpaca"),
    "sharegpt": ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
                 [S("s"), U("q"), A("a")], "sharegpt"),
    "sharegpt system": ({"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
                        [S("s"), U("q"), A("a")], "sharegpt"),
    "messages": ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, [U("q"), A("a")], "messages"),
    "conversations of roles": ({"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
                               [U("q"), A("a")], "messages"),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]},
                            {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]}, [U("xy"), A("a")], "messages"),
    "loss flags": ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss": False},
                                 {"role": "assistant", "content": "b", "loss": 1}, {"role": "assistant", "content": "c", "loss_mask": 0}]},
                   [U("q"), ("assistant", "a", False), ("assistant", "b", True), ("assistant", "c", False)], "messages"),
    "prompt completion": (GOOD, [U("a"), A("b")], "prompt/completion"),
    "prompt system": (GOOD | {"system": "s"}, [S("s"), U("a"), A("b")], "prompt/completion"),
    "question answer": ({"question": "q", "answer": "a"}, [U("q"), A("a")], "question/answer"),
    "query response": ({"query": "q", "response": "a"}, [U("q"), A("a")], "query/response"),
    "adgen": ({"content": "类型#裙", "summary": "这条裙子"}, [U("类型#裙"), A("这条裙子")], "content/summary"),
    "class": ({"text": "good film", "label": 1}, [U("good film"), A("1")], "text/label"),
    "class by name": ({"text": "good film", "label": "pos"}, [U("good film"), A("pos")], "text/label"),
    "chinese": ({"问题": "q", "答案": "a"}, [U("q"), A("a")], "问题/答案"),
    "history of a pair": ({"prompt": "q2", "response": "a2", "history": [["q1", "a1"]]}, [U("q1"), A("a1"), U("q2"), A("a2")], "prompt/response"),
    "turns": ([{"prompt": "q1", "response": [["a1"]]}, {"prompt": "q2", "response": "a2"}],
              [U("q1"), A("a1"), U("q2"), A("a2")], "turns"),
    "ranked answers": ({"prompt": "q", "response": [["a", "b"][:1]]}, [U("q"), A("a")], "prompt/response"),
    "raw text": ({"text": "a b"}, [("text", "a b")], "text"),
    "raw text of an article": ({"id": 1, "url": "u", "text": "a b"}, [("text", "a b")], "text"),
    "more keys": (GOOD | {"id": 7, "source": None}, [U("a"), A("b")], "prompt/completion"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "messages", "shape"), SHAPES.values(), ids=SHAPES)
def test_shapes(tmp_path, row, messages, shape):
    assert only(write(tmp_path / "x.jsonl", row)) == (messages, shape)
    assert only(write(tmp_path / "x.json", raw=json.dumps([row], indent=1))) == (messages, shape)


def test_places_of_rows(tmp_path):
    jsonl = write(tmp_path / "x.jsonl", raw=f"\n{json.dumps(GOOD)}\n\n \n{json.dumps(GOOD)}")
    array = write(tmp_path / "x.json", raw=json.dumps([GOOD, GOOD]))
    assert [r.where for r in read_rows(jsonl)] == [f"{jsonl}, line 2", f"{jsonl}, line 5"]
    assert [r.where for r in read_rows(array)] == [f"{array}, row 1", f"{array}, row 2"]


@pytest.mark.parametrize("text", [json.dumps(GOOD), json.dumps([GOOD]), f" \n {json.dumps([GOOD])}"])
@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.txt"])
def test_byte_order_mark(tmp_path, name, text):
    assert only(write(tmp_path / name, raw="\ufeff" + text))[0] == [U("a"), A("b")]


def test_line_ends(tmp_path):
    line = json.dumps(GOOD)
    assert len(list(read_rows(write(tmp_path / "x", raw=f"{line}\r\n{line}\r\n\r\n{line}")))) == 3


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
def test_separators_inside_a_text_cut_nothing(tmp_path, mark):
    line = json.dumps({"prompt": f"a{mark}b", "completion": "c"}, ensure_ascii=False)
    assert [r.messages[0]["content"] for r in read_rows(write(tmp_path / "x", raw=f"{line}\n{line}"))] == [
        f"a{mark}b"
    ] * 2


def test_a_broken_line_is_named(tmp_path):
    path = write(tmp_path / "x", raw=f'{json.dumps(GOOD)}\n{json.dumps(GOOD)}\n{{"prompt": "a" "b"}}\n')
    assert f"{path}, line 3, column 16: Expecting ',' delimiter: '\"b\"}}" in refusal(path)


def test_a_broken_array_names_the_line(tmp_path):
    path = write(tmp_path / "x", raw='[\n {"prompt": "a", "completion": "b"},\n {"prompt": "a", "completion" "b"}\n]')
    assert f"{path}, line 3, column 31" in refusal(path)


def test_an_array_cut_short(tmp_path):
    assert "line 2" in refusal(write(tmp_path / "x", raw=f"[{json.dumps(GOOD)},\n"))


@pytest.mark.parametrize("start", ["[", "\n ["])
def test_a_key_twice_in_an_array_is_placed(tmp_path, start):
    twice = '{"prompt":"a","completion":"b, [","completion":"c"}'
    raw = f"{start}{json.dumps(GOOD)},\n[{json.dumps(GOOD)}] ,\n\n{twice}, {{]"  # what comes after it is not looked at
    line = 4 + start.count("\n")
    assert f", row 3, line {line}: duplicate key 'completion'" in refusal(write(tmp_path / "x", raw=raw))


def test_a_row_of_an_array_has_the_limit_of_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "MAX_LINE", 100)
    rows = [GOOD | {"prompt": "x" * n} for n in (5, 20, 200)]
    path = write(tmp_path / "x", raw=json.dumps(rows[:2] * 3))
    assert len(list(read_rows(path))) == 6
    assert ", row 3 is longer than" in refusal(write(tmp_path / "y", raw=json.dumps(rows)))


@pytest.mark.parametrize("array", [False, True])
def test_gb18030_is_recognised(tmp_path, array):
    lines = [json.dumps({"prompt": p, "completion": "好"}, ensure_ascii=False) for p in ("a", "b", "你好")]
    text = "[" + ",\n".join(lines) + "]" if array else "\n".join(lines)
    raw = text.replace("好", "x", 2).encode("gb18030")
    message = refusal(write(tmp_path / "x", raw=raw))
    assert (
        ", line 3: byte 0xc4 is not UTF-8" in message
        and "could be gb18030" in message
        and "--encoding gb18030" in message
    )


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_other_encodings(tmp_path, encoding):
    assert "line 1" in refusal(write(tmp_path / "x", raw=json.dumps(GOOD).encode(encoding)))


BROKEN = {
    "key twice": ('{"prompt":"a","prompt":"b","completion":"c"}', "duplicate key 'prompt'"),
    "key twice inside": ('{"messages":[{"role":"user","role":"user","content":"c"}]}', "duplicate key 'role'"),
    "half a surrogate pair": ('{"prompt":"\\ud800","completion":"c"}', "prompt holds half a surrogate pair"),
    "half a pair in the answer": ('{"prompt":"a","completion":"c\\udfff"}', "completion holds half a surrogate pair"),
    "half a pair in the history": ('{"instruction":"a","output":"b","history":[["a","\\ud800"]]}', "history holds half"),
    "half a pair in a part": ('{"messages":[{"role":"user","content":[{"type":"text","text":"\\ud800"}]}]}', "content holds half"),
    "half a pair in a key": ('{"\\ud800":1}', "of no known shape"),
    "empty answer": ('{"prompt":"a","completion":""}', "the answer is empty"),
    "blank answer": ('{"prompt":"a","completion":" \\n"}', "the answer is empty"),
    "no trained answer": ('{"messages":[{"role":"assistant","content":"x","loss":false}]}', "nothing to learn"),
    "no assistant": ('{"messages":[{"role":"user","content":"x"}]}', "no message is the assistant's"),
    "wrong role": ('{"messages":[{"role":"bot","content":"x"}]}', "a message has role 'bot'"),
    "no role": ('{"messages":[{"content":"x"}]}', "a message has the keys 'content'"),
    "role is a list": ('{"messages":[{"role":["user"],"content":"x"}]}', "a message has role"),
    "wrong from": ('{"conversations":[{"from":"bot","value":"x"}]}', "a message has from 'bot'"),
    "no messages": ('{"messages":[]}', "messages is not a list"),
    "messages of text": ('{"messages":["x"]}', "messages is not a list"),
    "messages is text": ('{"messages":"x"}', "messages is not a list"),
    "no answer": ('{"prompt":"a"}', "no message is the assistant"),
    "text beside who knows what": ('{"text":"a","verdict":"b"}', "is not read"),
    "an empty answer before a good one": ('[{"prompt":"a","response":""},{"prompt":"a","response":"b"}]', "the answer is empty"),
    "a turn without answer": ('[{"prompt":"a"},{"prompt":"a","response":"b"}]', "a turn has the keys 'prompt'"),
    "two answers of one rank": ('{"prompt":"a","response":["b","c"]}', "response is"),
    "a class that is none": ('{"text":"a","label":true}', "label is 'true'"),
    "no keys": ("{}", "of no known shape"),
    "history is nought": ('{"prompt":"a","response":"b","history":0}', "history is not a list"),
    "a zero-width answer": ('{"prompt":"a","response":" \\u200b\\ufeff"}', "the answer is empty"),
    "ranked answers": ('{"prompt":"a","response":[["b"],["worse"]]}', "response is a list of 2 answers"),
    "a question to train": ('{"messages":[{"role":"user","content":"a","train":true},{"role":"assistant","content":"b"}]}', "not the assistant's has train True"),
    "a part with more": ('{"messages":[{"role":"user","content":[{"type":"text","text":"a","image_url":"b"}]},{"role":"assistant","content":"b"}]}', "content is"),
    "a tool's turn": ('{"messages":[{"role":"user","content":"a"},{"role":"tool","content":"b"}]}', "nothing to learn"),
    "answer is null": ('{"prompt":"a","completion":null}', "the answer is empty"),
    "answer is a number": ('{"prompt":"a","completion":4}', "completion is '4'"),
    "question is a list": ('{"prompt":["a"],"completion":"b"}', "prompt is"),
    "a picture": ('{"messages":[{"role":"user","content":[{"type":"image","url":"x"}]}]}', "content is"),
    "a part without text": ('{"messages":[{"role":"user","content":[{"type":"text"}]}]}', "content is"),
    "a part of null": ('{"messages":[{"role":"user","content":[{"type":"text","text":null}]}]}', "content is"),
    "history of text": ('{"instruction":"a","output":"b","history":["x"]}', "history is not a list"),
    "history is an object": ('{"instruction":"a","output":"b","history":{"a":"b"}}', "history is not a list"),
    "history is a number": ('{"instruction":"a","output":"b","history":5}', "history is not a list"),
    "history of three": ('{"instruction":"a","output":"b","history":[["a","b","c"]]}', "history is not a list"),
    "a number": ("5", "a row is a JSON object"),
    "null": ("null", "a row is a JSON object"),
    "5000 digits": ("9" * 5000, "digits"),
    "deep": ('{"a":' * 100_000, "recursion"),
    "control character": ('{"prompt":"a\tb","completion":"c"}', "Invalid control character"),
    "single quotes": ("{'prompt':'a'}", "column 2"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "part"), BROKEN.values(), ids=BROKEN)
def test_a_broken_row_is_named(tmp_path, line, part):
    path = write(tmp_path / "x", raw=json.dumps(GOOD) + "\n" + line + "\n")
    message = refusal(path)
    assert part in message and f"{path}, line 2" in message


def test_a_strangers_text_cannot_steer_the_terminal(tmp_path):
    message = refusal(write(tmp_path / "x", {"messages": [{"role": "\x1b[2J\u202e\n", "content": "x"}]}))
    assert "\x1b" not in message and "\u202e" not in message


@pytest.mark.parametrize("raw", ["", "\n\n", "\ufeff", "[]", " [ ] \n", "\ufeff[]"])
def test_no_rows(tmp_path, raw):
    assert "no rows" in refusal(write(tmp_path / "x", raw=raw))


def test_a_giant_line(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "MAX_LINE", 100)
    path = write(tmp_path / "x", GOOD, {"prompt": "a" * 100, "completion": "b"}, GOOD)
    assert "line 2 is longer than" in refusal(path)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is a folder" in refusal(tmp_path)
    assert "is not a regular file" in refusal(tmp_path / "pipe")
    assert "is not there" in refusal(tmp_path / "absent")


def test_little_to_fill_in_does_not_become_a_text_of_any_size(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "{{a}}" * 1000, "output": "x"}))
    with pytest.raises(RowError, match="line 1: --define would add 1,000,000 characters"):
        fill(next(iter(read_rows(tmp_path / "rows.jsonl"))), {"a": "x" * 1000})


ASKS = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("value", "reason"),
    [([], "no object"), ([3], "no object"), ([ASKS, 3], "no object"), ({"messages": [ASKS, 3]}, "no messages"),
     ([ASKS, {"from": "gpt", "value": "b"}], "unknown shape"), ({"messages": [ASKS, {"from": "x", "value": "b"}]}, "unknown role")],
)  # fmt: skip
def test_a_list_is_of_messages_or_of_turns(value, reason):
    with pytest.raises(RowError) as caught:
        to_messages(value, "x")
    assert caught.value.reason == reason


def test_define(tmp_path):
    (row,) = read_rows(
        write(tmp_path / "x", {"prompt": "{{a}} {{b}} {{ a }}", "completion": "{{a}}{{a}}", "system": "{{c}}"})
    )
    used, left = fill(row, {"a": "{{b}}", "z": "y"})
    assert [m["content"] for m in row.messages] == ["{{c}}", "{{b}} {{b}} {{ a }}", "{{b}}{{b}}"]
    assert used == {"a": 3} and left == {"b", "c"}


KEYS = ["messages", "conversations", "role", "content", "from", "value", "instruction", "input", "output", "history", "system",
        "prompt", "completion", "loss", "type", "text"]  # fmt: skip
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.text(max_size=5)
    | st.sampled_from(["user", "assistant", "text"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


@FUZZ
@given(row=st.dictionaries(st.sampled_from(KEYS), json_values, max_size=6), array=st.booleans())
def test_fuzzed_rows_are_read_or_refused(tmp_path, row, array):
    path = write(tmp_path / "x", raw=json.dumps([row] if array else row))
    try:
        (found,) = read_rows(path)
    except DataError as error:
        assert f"{path}, {'row' if array else 'line'} 1" in error.what
        return
    assert all(
        m["role"] in ("system", "user", "assistant", "text") and m["content"].encode() is not None
        for m in found.messages
    )


@FUZZ
@given(places=st.dictionaries(st.integers(0, 150), st.integers(0, 255), max_size=4), cut=st.integers(0, 150))
def test_fuzzed_bytes_are_read_or_refused(tmp_path, places, cut):
    raw = bytearray(
        json.dumps([{"prompt": "你好", "completion": "a"}, SHAPES["messages"][0]], ensure_ascii=False).encode()
    )
    for place, value in places.items():
        raw[place % len(raw)] = value
    path = write(tmp_path / "x", raw=bytes(raw[: len(raw) - cut]))
    try:
        assert list(read_rows(path))
    except DataError as error:
        assert str(path) in error.what


# sheets

HEAD = "问题,答案\r\n"
CSV = {
    "utf-8": (HEAD + '你好,"世界,\r\n二"\r\n\r\nc,d\r\n', "utf-8", "", ["line 2", "line 5"]),
    "with mark": (HEAD + '你好,"世界,\r\n二"\r\nc,d\r\n', "utf-8-sig", "utf-8 with byte order mark", ["line 2", "line 4"]),
    "excel": (HEAD + '你好,"世界,\r\n二"\r\nc,d\r\n', "gb18030", "gb18030", ["line 2", "line 4"]),
    "unicode text": (HEAD + '你好,"世界,\r\n二"\r\nc,d\r\n', "utf-16", "utf-16-le with byte order mark", ["line 2", "line 4"]),
    "semicolons": (HEAD.replace(",", ";") + '你好;"世界,\r\n二"\r\nc;d', "utf-8", "cells cut at ';'", ["line 2", "line 4"]),
}  # fmt: skip


@pytest.mark.parametrize(("text", "encoding", "note", "places"), CSV.values(), ids=CSV)
def test_csv(tmp_path, text, encoding, note, places):
    path = write(tmp_path / "x.csv", raw=text.encode(encoding))
    found = list(read_rows(path))
    assert [[m["content"] for m in r.messages] for r in found] == [["你好", "世界,\r\n二"], ["c", "d"]]
    assert [r.where for r in found] == [f"{path}, {place}" for place in places]
    assert open_rows(path).note == note and found[0].shape == "问题/答案"


BAD_CSV = {
    "one broken byte": ((HEAD + "你好,世界\n" * 9).encode() + b"a\xff,b\n", "line 11: byte 0xff is not UTF-8"),
    "cells": (b"prompt,response\na,b\nc,d,e\n", "line 3 has 3 cells, the header 2"),
    "an open quote": (b'prompt,response\na,b\nc,"d\ne,f\n', "line 3: unexpected end of data"),
    "an empty answer": (b"prompt,response\na,b\nc,\n", "line 3: there is nothing to learn, the answer is empty"),
    "a column twice": (b"prompt,response,prompt\na,b,c\n", "line 1: two columns are named 'prompt'"),
    "no header": ("你好,世界\n".encode() * 2, "keys '你好, 世界' are of no known shape"),
    "nothing": (b"prompt,response\n\n", "no rows"),
}


@pytest.mark.parametrize(("raw", "part"), BAD_CSV.values(), ids=BAD_CSV)
def test_a_broken_csv_is_named(tmp_path, raw, part):
    assert part in refusal(write(tmp_path / "x.csv", raw=raw))


def workbook(path: Path, *lines, merged: tuple[str, ...] = ()) -> Path:
    book = openpyxl.Workbook()
    sheet: Any = book.active
    for line in lines:
        sheet.append(line)
    for area in merged:
        sheet.merge_cells(area)
    book.save(path)
    return path


def test_xlsx_with_a_merged_title(tmp_path):
    lines = [("客服数据 2024", None), (), ("问题", "答案"), ("你好", 7), (None, None), ("何时", date(2024, 5, 1))]
    path = workbook(tmp_path / "x.xlsx", *lines, merged=("A1:B1",))
    found = list(read_rows(path))
    assert [[m["content"] for m in r.messages] for r in found] == [["你好", "7"], ["何时", "2024-05-01"]]
    assert [r.where for r in found] == [f"{path}, row 4", f"{path}, row 6"]
    assert open_rows(path).note == "header in row 3"


def test_xlsx_without_a_header_says_what_is_merged(tmp_path):
    path = workbook(tmp_path / "x.xlsx", ("客服数据", None), ("你好", "世界"), merged=("A1:B1",))
    assert "(A1:B1 is one merged cell)" in refusal(path) and "--columns" in refusal(path)
    named = workbook(tmp_path / "y.xlsx", ("title", None), ("甲", "乙"), ("a", "b"), merged=("A1:B1",))
    (row,) = read_rows(named, DataConfig(columns={"prompt": "甲", "response": "乙"}))
    assert [m["content"] for m in row.messages] == ["a", "b"]


def test_merged_cells_among_the_rows_are_refused(tmp_path):
    path = workbook(tmp_path / "x.xlsx", ("prompt", "response"), ("a", "b"), ("c", "d"), (None, "e"), merged=("A3:A4",))
    assert "row 3: the cells A3:A4 are merged" in refusal(path)


def test_an_error_in_a_cell_is_refused(tmp_path):
    assert "row 2 holds #REF!" in refusal(workbook(tmp_path / "x.xlsx", ("prompt", "response"), ("a", "#REF!")))


@pytest.mark.parametrize("raw", [b"", b"PK\x03\x04", b"prompt,response\na,b\n"])
def test_no_workbook(tmp_path, raw):
    assert "is not a workbook" in refusal(write(tmp_path / "x.xlsx", raw=raw))


# files


def test_a_row_is_read_when_it_is_asked_for(tmp_path):
    values = [{"prompt": "你" * i, "completion": str(i)} for i in range(50)]
    path = write(tmp_path / "x.jsonl", raw="\ufeff" + "\n\n".join(json.dumps(v, ensure_ascii=False) for v in values))
    file = open_rows(path)
    assert [file.value(i) for i in (49, 0, 7, 7)] == [values[i] for i in (49, 0, 7, 7)]
    assert file.where(7) == f"{path}, line 15" and len(file) == 50
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_dialogues_of_turns_a_line(tmp_path):
    line = json.dumps([{"prompt": "q", "response": [["a"]]}])
    assert [r.shape for r in read_rows(write(tmp_path / "x.jsonl", raw=f"{line}\n{line}\n"))] == ["turns", "turns"]


def test_raw_text(tmp_path):
    path = write(tmp_path / "x.txt", raw="eins\u2028zwei\r\n\n drei\n")
    found = list(read_rows(path))
    assert [(r.messages[0]["content"], r.where) for r in found] == [
        ("eins\u2028zwei", f"{path}, line 1"),
        (" drei", f"{path}, line 3"),
    ]


def test_columns(tmp_path):
    path = write(tmp_path / "x.jsonl", {"q": "a", "a": "b", "prompt": "other"})
    with pytest.raises(DataError, match="a key 'prompt' of its own beside --columns prompt=q"):
        list(read_rows(path, DataConfig(columns={"prompt": "q", "response": "a"})))
    (row,) = read_rows(path, DataConfig(columns={"prompt": "q", "response": "a"}, ignore_keys="prompt"))
    assert [m["content"] for m in row.messages] == ["a", "b"]
    with pytest.raises(DataError, match="no column 'x' .there are 'q, a, prompt'"):
        list(read_rows(path, DataConfig(columns={"prompt": "x", "response": "a"})))


def test_folders(tmp_path):
    (tmp_path / "f").mkdir()
    with pytest.raises(DataError, match="without a train file"):
        find_data(tmp_path / "f")
    train = write(tmp_path / "f" / "train.json", GOOD)
    assert find_data(tmp_path / "f") == (train, None) and find_data(train) == (train, None)
    dev = write(tmp_path / "f" / "dev.json", GOOD)
    assert find_data(tmp_path / "f") == (train, dev)
    write(tmp_path / "f" / "train.jsonl", GOOD)
    with pytest.raises(DataError, match=r"train.jsonl, train.json"):
        find_data(tmp_path / "f")


@FUZZ
@given(
    places=st.dictionaries(st.integers(0, 60), st.integers(0, 255), max_size=4),
    encoding=st.sampled_from(["utf-8", "gb18030", "utf-16"]),
)
def test_fuzzed_csv_is_read_or_refused(tmp_path, places, encoding):
    raw = bytearray((HEAD + '你好,"世界,\r\n二"\r\nc,d\r\n').encode(encoding))
    for place, value in places.items():
        raw[place % len(raw)] = value
    path = write(tmp_path / "x.csv", raw=bytes(raw))
    try:
        assert list(read_rows(path))
    except DataError as error:
        assert str(path) in error.what


@settings(FUZZ, max_examples=150)
@given(places=st.dictionaries(st.integers(0, 5000), st.integers(0, 255), min_size=1, max_size=4), inside=st.booleans())
def test_fuzzed_xlsx_is_read_or_refused(tmp_path, places, inside):
    """Bytes of the zip, or of the sheet inside it."""
    path = workbook(tmp_path / "x.xlsx", ("prompt", "response"), ("a", "b"), merged=("A4:B4",))
    with zipfile.ZipFile(path) as book:
        parts = {name: bytearray(book.read(name)) for name in book.namelist()}
    raw = parts["xl/worksheets/sheet1.xml"] if inside else bytearray(path.read_bytes())
    for place, value in places.items():
        raw[place % len(raw)] = value
    if inside:
        with zipfile.ZipFile(path, "w") as book:
            for name, part in parts.items():
                book.writestr(name, bytes(part))
    else:
        path.write_bytes(bytes(raw))
    try:
        assert list(read_rows(path))
    except DataError as error:
        assert str(path) in error.what
