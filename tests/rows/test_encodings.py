"""Text in other encodings: read as the user names it, refused with those that fit, never garbled without a word."""

import json
from pathlib import Path

import pytest
from tiny import make_model

from minilora.__main__ import main
from minilora.config import DataConfig
from minilora.errors import DataError, UsageError
from minilora.rows import open_rows, read_rows
from minilora.rows.encodings import check_encoding
from minilora.settings import read_yaml

TEXTS = {
    "big5": "您好嗎，臺灣的首都在哪裡", "shift_jis": "こんにちは、元気ですか", "euc_kr": "안녕하세요 반갑습니다",
    "cp1252": "Très élégant, déjà vu, Jürgen – größer", "gb18030": "你好吗，我们都很好", "utf-16": "你好，世界",
}  # fmt: skip
KINDS = {
    "x.csv": lambda text: f"question,answer\n{text},{text}\n".replace("，", "、"),
    "x.jsonl": lambda text: json.dumps({"question": text, "answer": text}, ensure_ascii=False) + "\n",
    "x.json": lambda text: json.dumps([{"question": text, "answer": text}], ensure_ascii=False, indent=1),
    "pretty.jsonl": lambda text: json.dumps({"question": text, "answer": text}, ensure_ascii=False, indent=1) * 2,
    "x.txt": lambda text: f"{text}\n",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoding", TEXTS)
def test_every_kind_of_file_is_read_in_the_encoding_that_is_named(tmp_path: Path, encoding: str, kind: str):
    text = TEXTS[encoding].replace(",", "") if kind == "x.csv" else TEXTS[encoding]
    for name, code in (("same", "utf-8"), ("other", encoding)):
        (tmp_path / name).mkdir()
        (tmp_path / name / kind).write_bytes(KINDS[kind](text).encode(code))
    wanted = [row.messages for row in read_rows(tmp_path / "same" / kind)]
    found = list(read_rows(tmp_path / "other" / kind, DataConfig(encoding=encoding)))
    assert [row.messages for row in found] == wanted and found[0].where.startswith(str(tmp_path / "other" / kind))
    assert open_rows(tmp_path / "other" / kind, DataConfig(encoding=encoding)).note.startswith(encoding)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoding", [name for name in TEXTS if name != "utf-16"])
def test_without_a_name_they_are_refused_with_the_ones_that_fit(tmp_path: Path, encoding: str, kind: str):
    path = tmp_path / kind
    path.write_bytes(KINDS[kind](TEXTS[encoding]).encode(encoding))
    if encoding == "gb18030" and kind == "x.csv":
        assert open_rows(path).note == "gb18030"
        return
    with pytest.raises(DataError) as error:
        list(read_rows(path))
    assert f"it could be {encoding}" in error.value.what and f"--encoding {encoding}" in error.value.hint


def test_a_file_that_the_name_does_not_fit_is_refused(tmp_path: Path):
    path = tmp_path / "x.csv"
    path.write_bytes("question,answer\na,b\n안녕하세요,반갑습니다\n".encode("euc_kr"))
    with pytest.raises(DataError, match=r"line 3: byte 0xbe is not ascii"):
        open_rows(path, DataConfig(encoding="ascii"))
    path.write_bytes("question,answer\nWie geht’s?,Schön\n".encode())
    with pytest.raises(DataError, match="is UTF-8, and --encoding says cp1252"):
        open_rows(path, DataConfig(encoding="cp1252"))
    assert [row.messages[1]["content"] for row in read_rows(path, DataConfig(encoding="UTF8"))] == ["Schön"]


def test_a_file_of_two_encodings_is_refused(tmp_path: Path):
    path = tmp_path / "x.csv"
    path.write_bytes(
        "question,answer\n你好,很好\n".encode() + "再见,慢走不送，请慢走，我们明天再见\n".encode("gb18030") * 9
    )
    for encoding in ("", "gb18030"):
        with pytest.raises(DataError, match="line 2 is UTF-8, and other lines are not"):
            open_rows(path, DataConfig(encoding=encoding))


@pytest.mark.parametrize("name", ["klingon", "hex", "base64", "rot13", "undefined", "../x", "big5\0", "é"])
def test_what_is_no_encoding_of_text(name: str):
    with pytest.raises(UsageError, match="is not a text encoding"):
        check_encoding(name)


def test_every_command_that_reads_rows_takes_an_encoding(tmp_path: Path, capsys):
    rows = [{"question": f"臺灣{i}在哪裡", "answer": "您好嗎"} for i in range(8)]
    data, model = tmp_path / "rows.jsonl", str(make_model(tmp_path / "m"))
    data.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("big5"))
    given, run = ["--model", model, "--data", str(data)], tmp_path / "run"
    commands = [
        ["plan", *given], ["inspect", "data", *given], ["eval", *given], ["data", "score", *given],
        ["predict", *given, "--max-tokens", "1", "--output", str(tmp_path / "p")],
        ["data", "split", *given[2:], "--val", "2", "--output", str(tmp_path / "split")],
        ["train", *given, "--max-steps", "1", "--val", "2", "--output", str(run)],
    ]  # fmt: skip
    told = ""
    for words in commands:
        assert main([*words, "--encoding", "hex"]) == 2 and "'hex' is not a text encoding" in capsys.readouterr().err
        assert main(words) == 3 and "it could be big5" in "".join(capsys.readouterr())
        assert main([*words, "--encoding", "big5"]) == 0
        told = capsys.readouterr().out
        assert f"{data}: big5" in told
    assert read_yaml(run / "config.yaml")["encoding"] == "big5"
    assert f"--data {run}/data/val.jsonl" in told and "--encoding" not in told.partition("minilora eval")[2]
    split_off = [row.messages for row in read_rows(run / "data" / "val.jsonl")]
    assert len(split_off) == 2 and all("臺灣" in messages[0]["content"] for messages in split_off)


def test_a_line_that_changes_while_its_file_is_in_use_is_told(tmp_path):
    path = tmp_path / "rows.jsonl"
    first = json.dumps({"a": "long" * 10_000})
    path.write_text(first + '\n{"a": 2}\n')
    rows = open_rows(path)
    with path.open("a") as file:
        file.write('{"a": 3}\n')
    assert [rows.value(i) for i in range(len(rows))] == [
        json.loads(first),
        {"a": 2},
    ]  # rows that come after them do no harm
    path.write_text(first + '\n{"b": 2}\n')
    assert rows.value(0) == json.loads(first)
    with pytest.raises(DataError, match="line 2 was changed while"):
        rows.value(1)
