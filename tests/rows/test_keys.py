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
from minilora.config import DataConfig
from minilora.data import load_examples
from minilora.errors import DataError, quote
from minilora.rows import RowError, to_messages, trainable
from minilora.rows.keys import CONTENT_OF_MESSAGES, LOSSES, NOTES, NOTES_OF_MESSAGES, NOTES_OF_TEXT, THOUGHTS
from minilora.rows.shapes import ANSWERS, CALL_ROLES, CHATS, FUNCTIONS, PAIRS, QUESTIONS

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
TALKS: list[dict[str, Any]] = [
    *({chat: [USER, ASSISTANT]} for chat in CHATS),
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
]
SHAPES: list[dict[str, Any]] = [
    *TALKS,
    *({question: "q", answer: "a"} for question in QUESTIONS for answer in ANSWERS),
    *({question: "q", answer: "a"} for question, answer in PAIRS),
    {"text": "raw"},
]
CONTENT = st.one_of(
    st.text(min_size=1), st.booleans(), st.integers(), st.floats(allow_nan=False), st.lists(st.integers(), min_size=1)
)
READ = {*CHATS, *QUESTIONS, *ANSWERS, *sum(PAIRS, ()), *FUNCTIONS, "system", "history", "text"}
KEYS = st.text(min_size=1, max_size=12).filter(lambda k: k.lower() not in NOTES_OF_MESSAGES and k not in READ)


def rows(folder: Path, *values: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_model(tmp_path_factory.mktemp("model") / "m"))


WHERE = "rows.jsonl, line 3"


def ignoring(key: str) -> DataConfig:
    """Settings that ignore one key, also one that ignore_keys cannot name, as with a comma in it."""
    return type("Ignoring", (DataConfig,), {"ignored": frozenset([key])})()


def refused(row: Any, key: str) -> str:
    """The hint of the error, which names the key, the file and the line."""
    with pytest.raises(RowError) as error:
        trainable(to_messages(row, WHERE))
    assert error.value.what.startswith(WHERE) and quote(key) in error.value.what and "--ignore-keys" in error.value.hint
    return error.value.hint


@given(shape=st.sampled_from(SHAPES), key=KEYS, value=CONTENT)
def test_an_unknown_key_of_a_row_is_refused(shape: dict, key: str, value: Any):
    refused(shape | {key: value}, key)
    plain = trainable(to_messages(shape, WHERE))
    assert trainable(to_messages(shape | {key: value}, WHERE, ignoring(key))) == plain._replace(ignored={key})
    for nothing in (None, "", [], {}):
        assert trainable(to_messages(shape | {key: nothing}, WHERE)) == plain


@given(
    key=KEYS.filter(lambda k: k not in {*LOSSES, *THOUGHTS, "role", "content", "from", "value"}),
    value=CONTENT,
    shape=st.sampled_from(TALKS),
    place=st.sampled_from([0, 1]),
)
def test_an_unknown_key_of_a_message_is_refused(shape: dict, key: str, value: Any, place: int):
    def of(more: dict) -> dict:
        return {chat: [m | more if i == place else m for i, m in enumerate(turns)] for chat, turns in shape.items()}

    refused(of({key: value}), f"message {key}")
    plain = trainable(to_messages(shape, WHERE))
    assert trainable(to_messages(of({key: value}), WHERE, ignoring(key))) == plain._replace(ignored={key})
    for nothing in (None, "", [], {}):
        assert trainable(to_messages(of({key: nothing}), WHERE)) == plain


@given(key=KEYS.filter(lambda k: k not in LOSSES), value=CONTENT)
def test_an_unknown_key_of_a_dialogue_of_turns_is_refused(key: str, value: Any):
    refused([{"prompt": "q", "response": "a", key: value}, {"prompt": "q", "response": "a"}], key)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "/".join(s))
def test_notes_change_no_token(shape: dict, tokenizer):
    plain = to_messages(shape, WHERE)
    harmless = NOTES_OF_TEXT if set(shape) == {"text"} else NOTES
    notes = {k: v for k, v in dict.fromkeys(harmless, "x").items() if k not in shape}
    assert trainable(to_messages(shape | notes, WHERE)) == plain
    for chat in (k for k in shape if k in CHATS):
        turns = [turn | dict.fromkeys(NOTES_OF_MESSAGES, "x") for turn in shape[chat]]
        assert trainable(to_messages(shape | {chat: turns}, WHERE)) == plain


@pytest.mark.parametrize("key", sorted(NOTES - NOTES_OF_TEXT) + ["title"])
def test_a_raw_text_s_class_and_title_are_no_notes(key: str):
    refused({"text": "a b", key: "x"}, key)


@pytest.mark.parametrize("shape", [s for s in SHAPES if "text" not in s or "label" in s], ids=lambda s: "/".join(s))
def test_every_key_that_is_read_changes_the_tokens(shape: dict, tokenizer):
    """Questions, answers, system and history change the ids; a loss changes what is trained; each by itself."""

    def rendered(row: dict) -> tuple:
        ids, trained = tokenizer.render(trainable(to_messages(row, WHERE)).messages)
        return tuple(ids), tuple(trained)

    plain, chat = rendered(shape), next((k for k in shape if k in CHATS), None)
    more: list[dict] = [{"system": "s"}, *({k: v + "!"} for k, v in shape.items() if isinstance(v, str))]
    if chat is None:
        more.append({"history": [["q", "a"]]})
        asked = [k for k in shape if k in QUESTIONS]
        more += [{k: "more"} for k in QUESTIONS if asked and k not in shape]
    else:
        first, last = shape[chat]
        more += [
            {chat: [turn | {k: v + "!"} if turn is changed else turn for turn in shape[chat]]}
            for changed in shape[chat]
            for k, v in changed.items()
            if k in ("content", "value")
        ]
        twice = {chat: [first, last, first, last]}
        plain_twice = rendered(twice)
        for key in LOSSES:
            ids, trained = rendered({chat: [first, last | {key: 0}, first, last]})
            assert ids == plain_twice[0] and sum(trained) < sum(plain_twice[1])
    found = [rendered(shape | change)[0] for change in more]
    assert plain[0] not in found and len(set(found)) >= 2


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "q", "response": "a", "label": False}, "Preferences"), ({"prompt": "q", "response": "a", "label": 0}, "Preferences"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "--objective dpo"),
        ({"instruction": "q", "output": "a", "chosen": "a"}, "--objective dpo"), ({"question": "q", "answer": "a", "rejected": "b"}, "--objective dpo"),
        *(({"prompt": "q", "response": "a", key: 0}, f"--ignore-keys {key}") for key in LOSSES),
        *(({"messages": [USER, ASSISTANT], key: False}, f"--ignore-keys {key}") for key in LOSSES),
        ({"messages": [USER, ASSISTANT], "label": False}, "Preferences"), ({"messages": [USER, ASSISTANT], "images": ["x"]}, "Only text"),
        ({"messages": [USER | {"images": ["x"]}, ASSISTANT]}, "Only text"), ({"messages": [USER, ASSISTANT], "tools": "[{}]"}, "as OpenAI does"),
        ({"messages": [USER, ASSISTANT | {"tool_call_id": "1"}]}, "Tools stand"), ({"messages": [USER | {"tool_calls": [1]}, ASSISTANT]}, "Tools stand"), ({"messages": [USER | {"name": "Bo"}, ASSISTANT]}, "--ignore-keys name"),
        *(({"messages": [USER, ASSISTANT | {key: "get_weather"}]}, f"--ignore-keys {key}") for key in sorted(CONTENT_OF_MESSAGES)),
        ({"messages": [USER, ASSISTANT | {"function_call": {"name": 1}}]}, "A call is"), ({"text": "a", "tools": [{"name": "f"}]}, "Tools stand"),
        *(({"messages": [USER, {"role": role, "content": "x"}, ASSISTANT]}, "Known are") for role in ("ipython", "developer")),
        *(({"conversations": [{"from": "human", "value": "q"}, {"from": role, "value": "x"}]}, "A call is") for role in CALL_ROLES),
    ],
    ids=lambda v: json.dumps(v)[:90],
)  # fmt: skip
def test_columns_that_are_not_understood_yet_are_refused(row: dict, told: str):
    with pytest.raises(RowError) as error:
        trainable(to_messages(row, WHERE))
    assert error.value.what.startswith(WHERE) and told in error.value.hint


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
    assert to_messages(row, "here", DataConfig(ignore_keys=key)).messages[1]["content"] == "a"
    pair = {"question": "q", "answer": "a", key: "because"}
    assert to_messages(pair, "here") == to_messages(row, "here")._replace(shape="question/answer")
    with pytest.raises(RowError, match="a thought, and its answer is empty"):
        to_messages({"messages": [USER, {"role": "assistant", "content": " ", key: "because"}]}, "here")
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
        ({"messages": [USER, ASSISTANT], "tools": [{"title": "f"}]}, 'tools: \'{"title": "f"}\' is not a function'),
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
    told = (
        "keys that are ignored on request: 'context' (3), 'label' (3)",
        "no row has a key 'lable', which --ignore-keys names",
    )
    given = [*words[1:], "--ignore-keys", "label,context,lable"]
    for command in (
        ["inspect", "data"],
        ["eval"],
        ["data", "score"],
        ["train", "--max-steps", "1", "--output", str(tmp_path / "run")],
        ["predict", "--max-tokens", "1", "--output", str(tmp_path / "out")],
    ):
        capsys.readouterr()
        assert main([*command, *given]) == 0
        out = capsys.readouterr().out
        assert all(line in out for line in told)


def test_rows_of_several_shapes_in_one_table():
    """Each has null for the keys of the others, as a table that was joined has."""
    keys = dict.fromkeys(k for shape in SHAPES for k in shape if k != "label")
    for shape in SHAPES:
        assert trainable(to_messages(keys | shape, WHERE)).messages == to_messages(shape, WHERE).messages


def test_a_text_without_its_label_is_no_raw_text():
    with pytest.raises(RowError, match="the answer is empty"):
        trainable(to_messages({"text": "q", "label": None}, WHERE))


def test_a_message_that_only_calls_a_tool_says_nothing_without_the_call():
    row = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [1]}]}
    with pytest.raises(RowError, match="content is 'null'"):
        to_messages(row, "here", DataConfig(ignore_keys="tool_calls"))


def test_a_key_of_a_message_that_is_left_out_is_counted():
    row = {"messages": [USER, ASSISTANT | {"extra": "x"}]}
    for value in (row, {"messages": json.dumps(row["messages"])}, [{"prompt": "q", "response": "a", "extra": "x"}]):
        assert to_messages(value, "here", DataConfig(ignore_keys="extra,extar")).ignored == {"extra"}
