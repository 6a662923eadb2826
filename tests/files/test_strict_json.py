"""Every JSON file is read by one strict reader, and every refusal names the place."""

import json
import os
import tracemalloc

import pytest

from minilora.errors import DataError, ModelError
from minilora.files.atomic import MANIFEST, verify_manifest
from minilora.files.model_folder import read_json
from minilora.files.strict_json import DuplicateKey, parse_json, read_json_lines
from minilora.report.record import read_json_file


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ('{"a": 1, "a": 1}', 1, 17),
        ('{"x": "}",\n "b": {"a": 1,\n "a": {}}, "b": 2}', 3, 10),  # the inner object ends first
        ('[{"a": 1}, {"b": {"a": 1}},\n\n  {"c": 1, "c": 2}] and no more JSON', 3, 19),
    ],
)
def test_a_duplicate_key_is_placed_at_the_end_of_its_object(text, line, column):
    with pytest.raises(DuplicateKey, match="duplicate key '[ac]' in one object") as error:
        parse_json(text)
    assert (error.value.lineno, error.value.colno) == (line, column)
    assert text[: error.value.pos].endswith("}")


@pytest.mark.parametrize("text", ['{"a":' * 100_000, "9" * 5000, '{"a": 1} 2', "", b'{"a": "\xff"}', '{"a": 1,}'])
def test_what_is_not_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_a_byte_order_mark_is_skipped():
    assert parse_json(b'\xef\xbb\xbf{"a": "\xe4\xbd\xa0"}') == {"a": "你"}


def test_lines_end_where_a_crash_cut_them(tmp_path):
    path = tmp_path / "x.jsonl"
    assert [*read_json_lines(path)] == []
    values = [{"a": "\u2028\x85"}, {"a": 2}]
    lines = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    path.write_text(lines + '{"a": "你', encoding="utf-8")
    assert [*read_json_lines(path)] == values
    path.write_bytes(path.read_bytes()[:-1])
    assert [*read_json_lines(path)] == values


def test_a_hole_in_a_file_takes_no_memory_of_its_size(tmp_path):
    """Kilobytes on the disk, and in an archive, can be a file of any size."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n')
    os.truncate(path, 1 << 30)
    tracemalloc.start()
    assert [*read_json_lines(path)] == [{"a": 1}]
    assert verify_manifest(tmp_path) == f"{MANIFEST} is missing"
    os.rename(path, tmp_path / MANIFEST)
    assert verify_manifest(tmp_path) == f"{MANIFEST} is damaged"
    with pytest.raises(DataError, match="is larger than"):
        read_json_file(tmp_path / MANIFEST)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20


def test_a_file_of_a_model_with_a_duplicate_key_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": 1,\n "a": 2}')
    with pytest.raises(ModelError, match=r"config\.json is not valid JSON: duplicate key 'a' in one object: line 2"):
        read_json(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ModelError, match="is not a regular file"):
        read_json(tmp_path / "config.json")
