"""No key of a row or a message is lost: each is read, a note, or named in an error; generated from the tables and by hypothesis."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_model

from minilora import load_tokenizer
from minilora.__main__ import main
from minilora.data import load_examples
from minilora.errors import DataError
from minilora.rows import RowError, to_messages
from minilora.rows.keys import LOSSES, NOTES, NOTES_OF_MESSAGES, THOUGHTS
from minilora.rows.load import DataConfig
from minilora.rows.shapes import ANSWERS, CHATS, PAIRS, QUESTIONS

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SHAPES: list[dict[str, Any]] = [
    *({chat: [USER, ASSISTANT]} for chat in CHATS),
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    *({question: "q", answer: "a"} for question in QUESTIONS for answer in ANSWERS),
    *({question: "q", answer: "a"} for question, answer in PAIRS),
    {"text": "raw"},
]
CONTENT = st.one_of(
    st.text(min_size=1), st.booleans(), st.integers(), st.floats(allow_nan=False), st.lists(st.integers(), min_size=1)
)
READ = {*CHATS, *QUESTIONS, *ANSWERS, *sum(PAIRS, ()), "system", "history", "text"}
KEYS = st.text(min_size=1, max_size=12).filter(lambda k: k.lower() not in NOTES_OF_MESSAGES and k not in READ)


def rows(folder: Path, *values: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_model(tmp_path_factory.mktemp("model") / "m"))


@given(shape=st.sampled_from(SHAPES), key=KEYS, value=CONTENT)
def test_an_unknown_key_of_a_row_is_named(shape: dict, key: str, value: Any):
    assert to_messages(shape | {key: value}, "here").unread == (key,)
    assert to_messages(shape | {key: value}, "here", ignored=frozenset([key])).unread == ()


@given(key=KEYS.filter(lambda k: k not in {*LOSSES, *THOUGHTS, "role", "content", "from", "value"}), value=CONTENT)
def test_an_unknown_key_of_a_message_is_named(key: str, value: Any):
    row = {"messages": [USER, ASSISTANT | {key: value}]}
    assert to_messages(row, "here").unread == (f"message {key}",)
    assert to_messages(row, "here", ignored=frozenset([key])).unread == ()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "/".join(s))
def test_notes_and_empty_keys_are_no_loss(shape: dict):
    plain = to_messages(shape, "here")
    notes = {k: v for k, v in dict.fromkeys(NOTES, "x").items() if k not in shape}
    empty = {"tools": [], "images": None, "extra": "", "meta-extra": {}}
    assert to_messages(shape | notes | empty, "here") == plain._replace(shape=plain.shape)


@pytest.mark.parametrize(
    "row",
    [
        {"指令": "one", "输入": "two", "输出": "a"}, {"prompt": "one", "input": "two", "output": "a"},
        {"query": "one", "input": "two", "response": "a"}, {"instruction": "one", "query": "two", "response": "a"},
        {"input": "two", "instruction": "one", "output": "a"}, [{"prompt": "one", "input": "two", "response": "a"}],
    ],
    ids=str,
)  # fmt: skip
def test_two_question_keys_are_joined(row: Any):
    found = to_messages(row, "here")
    assert found.messages[0]["content"] == "one\ntwo" and found.unread == ()


@pytest.mark.parametrize("key", LOSSES)
@pytest.mark.parametrize(
    ("value", "loss"), [(0, False), (False, False), (0.0, False), (1, True), (True, True), (None, None)]
)
def test_what_a_message_says_of_its_loss(key: str, value: Any, loss: bool | None):
    row = {"messages": [USER, ASSISTANT | {key: value}, USER, ASSISTANT]}
    assert to_messages(row, "here").messages[1].get("loss") is loss


@pytest.mark.parametrize(
    "turn", [{"weight": 0.5}, {"loss": "false"}, {"weight": 2}, {"loss": True, "weight": 0}, {"train": [1]}], ids=str
)
def test_a_loss_that_is_none_is_refused(turn: dict):
    with pytest.raises(RowError):
        to_messages({"messages": [USER, ASSISTANT | turn]}, "here")


@pytest.mark.parametrize("key", THOUGHTS)
def test_a_thought_stands_where_the_template_of_a_thinker_reads_it(key: str):
    row = {"messages": [USER, ASSISTANT | {key: "because"}]}
    assert to_messages(row, "here").messages[1]["content"] == "<think>\nbecause\n</think>\n\na"
    assert to_messages(row, "here", ignored=frozenset([key])).messages[1]["content"] == "a"
    with pytest.raises(RowError, match="its own key and in the content"):
        to_messages({"messages": [USER, {"role": "assistant", "content": "<think>x</think>a", key: "because"}]}, "here")


def test_a_thought_that_the_format_cannot_say_is_refused(tmp_path: Path, tokenizer):
    path = rows(tmp_path, {"messages": [USER, ASSISTANT | {"reasoning_content": "because"}]})
    with pytest.raises(DataError, match=r"line 1: a message has a thought, and the chat format chatml has no place"):
        load_examples(path, tokenizer)
    assert len(load_examples(path, tokenizer, DataConfig(ignore_keys="reasoning_content"))[0]) == 1


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "q", "response": "a", "label": False}, "'label' holds something"),
        ({"messages": [USER, ASSISTANT], "tools": [{"name": "f"}]}, "Tool calls cannot be trained yet"),
        ({"messages": [USER, ASSISTANT | {"tool_calls": [1]}]}, "'message tool_calls'"),
        ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [1]}]}, "'message tool_calls'"),
        ({"prompt": "q", "response": "a", "images": ["x.png"]}, "Only text can be trained"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "response": "a"}, "'chosen' holds something"),
        ({"question": "q", "context": "c", "answer": "a"}, "--columns input=context"),
        ({"prompt": "q", "response": "a", "output": "b"}, "'output' holds something"),
    ],
    ids=lambda v: str(v)[:60],
)
def test_training_stops_with_the_key_and_the_ways_out(tmp_path: Path, tokenizer, row: dict, told: str):
    with pytest.raises(DataError) as error:
        load_examples(rows(tmp_path, row, row), tokenizer)
    text = f"{error.value.what}\n{error.value.hint}"
    assert told in text and "line 1" in text and "--ignore-keys" in text and "1 more rows" in text


def test_ways_out_through_the_command_line(tmp_path: Path, capsys):
    model = make_model(tmp_path / "m")
    path = rows(tmp_path, *[{"question": "q", "context": "c", "answer": "a", "label": 1}] * 3)
    words = ["eval", "--model", str(model), "--data", str(path)]
    assert main(words) == 3 and "'context' holds something and is not read (and 'label')" in capsys.readouterr().err
    assert main([*words, "--columns", "input=context", "--ignore-keys", "label"]) == 0
    assert main([*words, "--ignore-keys", "label,context"]) == 0
    told = "keys that are ignored on request: 'context' (3), 'label' (3)", "no row has a key 'lable', which --ignore-keys names"
    given = [*words[1:], "--ignore-keys", "label,context,lable"]
    for command in (
        ["inspect", "data"], ["eval"], ["data", "score"], ["train", "--max-steps", "1", "--output", str(tmp_path / "run")],
        ["predict", "--max-tokens", "1", "--output", str(tmp_path / "out")],
    ):  # fmt: skip
        capsys.readouterr()
        assert main([*command, *given]) == 0
        out = capsys.readouterr().out
        assert all(line in out for line in told)


def test_a_key_of_a_message_that_is_left_out_is_counted():
    row = {"messages": [USER, ASSISTANT | {"extra": "x"}]}
    for value in (row, {"messages": json.dumps(row["messages"])}, [{"prompt": "q", "response": "a", "extra": "x"}]):
        assert to_messages(value, "here", ignored=frozenset(["extra", "extar"])).ignored == ("extra",)
