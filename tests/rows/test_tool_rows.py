"""Rows with functions, calls and results: the shapes they come in, what is refused by name, and what else is done with rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from minilora.config import PLAIN, DataConfig
from minilora.data import load_examples
from minilora.errors import DataError
from minilora.report.token_view import tokens_of
from minilora.rows import RowError, fill, to_messages, trainable
from minilora.rows.preferences import to_pair
from minilora.rows.questions import read_questions
from minilora.rows.render import hashes, render_row, render_within
from minilora.rows.shapes import LONGEST_ROW
from minilora.text.tokenizer import Tokenizer, load_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizers"
F = {"name": "f", "parameters": {"type": "object", "properties": {"k": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": F}]
CALL = {"name": "f", "arguments": {"k": "v"}}
USER, DONE = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
RESULT = {"role": "tool", "content": "r"}


def rows(folder: Path, *values: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values), encoding="utf-8")
    return path


def calling(**more: Any) -> dict:
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": CALL | more}],
    }


ROW = {"tools": TOOLS, "messages": [USER, calling(), RESULT | {"tool_call_id": "1", "name": "f"}, DONE]}
MESSAGES = [
    {"role": "tools", "content": json.dumps(TOOLS)},
    USER,
    {"role": "assistant", "content": "", "calls": [CALL]},
    RESULT,
    DONE,
]
TURNS = [{"from": "human", "value": "q"}, {"from": "function_call", "value": json.dumps(CALL)}, {"from": "observation", "value": "r"},
         {"from": "gpt", "value": "a"}]  # fmt: skip
SHAPES: dict[str, Any] = {
    "OpenAI": ROW | {"parallel_tool_calls": False},
    "arguments as text": ROW | {"messages": [USER, calling(arguments='{"k": "v"}'), RESULT, DONE]},
    "as JSON texts, as a sheet has them": {key: json.dumps(value) for key, value in ROW.items()},
    "OpenAI before tools": {"functions": [F], "messages": [USER, {"role": "assistant", "content": "", "function_call": CALL}, RESULT | {"role": "function", "name": "f"}, DONE]},
    "LLaMA-Factory": {"conversations": TURNS, "tools": json.dumps([F])},
    "a list of calls": {"conversations": [TURNS[0], TURNS[1] | {"value": json.dumps([CALL])}, *TURNS[2:]], "tools": [F]},
    "ms-swift": {"messages": [USER, {"role": "tool_call", "content": json.dumps(CALL)}, RESULT | {"role": "tool_response"}, DONE], "tools": TOOLS},
}  # fmt: skip


@pytest.fixture(scope="module")
def qwen3() -> Tokenizer:
    return load_tokenizer(GOLDEN / "qwen3")


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_the_same_conversation(shape: str):
    found = trainable(to_messages(SHAPES[shape], "here"))
    assert found.messages == MESSAGES and not found.unread


def test_functions_stand_beside_any_question():
    for row in ({"instruction": "q", "output": "a"}, {"question": "q", "answer": "a"}, {"messages": [USER, DONE]}):
        assert to_messages(row | {"tools": TOOLS}, "here").messages == [MESSAGES[0], USER, DONE]
        for none in ([], "[]", "", None):
            assert trainable(to_messages(row | {"tools": none}, "here")).messages == [USER, DONE]
        assert to_messages(row | {"tools": TOOLS}, "here", DataConfig(ignore_keys="tools")).messages == [USER, DONE]


def test_calls_in_a_row_are_one_turn_and_keep_text_and_thought():
    one, two = ({"role": "tool_call", "content": json.dumps(CALL | {"arguments": {"k": n}})} for n in (1, 2))
    said = {"role": "assistant", "content": "Let me see."}
    (turn,) = to_messages({"messages": [said, one, two]}, "here").messages
    assert turn == said | {"calls": [{"name": "f", "arguments": {"k": n}} for n in (1, 2)]}
    thought = {"from": "function_call", "value": f"<think>\nhm\n</think>\n\n{json.dumps(CALL)}"}
    (turn,) = to_messages({"conversations": [thought]}, "here").messages
    told = {"role": "assistant", "content": "<think>\nhm\n</think>\n\n", "thought": True, "calls": [CALL]}
    assert turn == told
    assert to_messages({"messages": [calling() | {"reasoning_content": "hm"}]}, "here").messages == [told]
    masked = to_messages({"messages": [said | {"loss": False}, one]}, "here").messages
    assert len(masked) == 2  # what is not trained is no part of what is


REFUSED = {
    "no JSON": (calling(arguments="{"), "tool_calls: Expecting"), "a key twice": (calling(arguments='{"a": 1, "a": 2}'), "duplicate key 'a'"),
    "arguments that are a list": (calling(arguments=[1]), "the arguments of a call are '[1]'"),
    "no name": (calling(name=None), "a function's name is 'null'"), "a name that closes a mark": (calling(name="f>"), "'\"f>\"'"),
    "not finite": (calling(arguments='{"k": NaN}'), "not finite"), "half a character": (calling(arguments='{"k": "\\ud800"}'), "half a surrogate"),
    "too deep": (calling(arguments={"k": json.loads("[" * 950 + "]" * 950)}), "too deep lists"),
    "an unknown key": (calling(thought="x"), "a call has 'thought', which is not read"),
    "another kind of call": ({"role": "assistant", "tool_calls": [{"type": "custom", "function": CALL}]}, "a call has 'type'"),
    "a call that is a number": ({"role": "assistant", "tool_calls": [1]}, "'1' is not a call"),
    "a text that is no call": ({"role": "tool_call", "content": "f(x)"}, "content: Expecting"),
    "a picture as a result": (RESULT | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "a part of type 'image_url'"),
    "an object as a result": (RESULT | {"content": {"r": 1}}, "content is '{\"r\": 1}'"),
    "two ways at once": (calling() | {"function_call": CALL}, "'message function_call' holds something"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(case: str):
    message, told = REFUSED[case]
    with pytest.raises(RowError) as error:
        trainable(to_messages({"messages": [USER, message, DONE]}, "rows.jsonl, line 3"))
    assert error.value.what.startswith("rows.jsonl, line 3: ") and told in error.value.what and error.value.hint


def test_functions_in_two_keys_are_refused():
    with pytest.raises(RowError, match="tools and functions"):
        to_messages(ROW | {"functions": [F]}, "here")


def test_rows_that_are_left_out_are_counted_by_reason(tmp_path: Path, qwen3):
    bad = [{"messages": [USER, REFUSED[case][0], DONE]} for case in ("no JSON", "a picture as a result")]
    path = rows(tmp_path, ROW, *bad, ROW | {"tools": [{"type": "web_search"}]}, ROW | {"images": ["x"]})
    _, report = load_examples(path, qwen3, DataConfig(skip_bad=True))
    assert report.kept == 1 and report.broken == {
        "broken call": 1, "a part of type 'image_url'": 1, "broken tools": 1, "key 'images' is not read": 1,
    }  # fmt: skip
    with pytest.raises(DataError, match=r"line 2: tool_calls: .* 3 more rows cannot be used: 1 a part of type"):
        load_examples(path, qwen3)


def test_a_format_without_tools_leaves_such_rows_out(tmp_path: Path):
    tokenizer = load_tokenizer(GOLDEN / "chatglm3")
    path = rows(tmp_path, ROW, {"messages": [USER, DONE]})
    with pytest.raises(DataError, match="line 1: tools cannot be written here in the chat format chatglm3"):
        load_examples(path, tokenizer)
    _, report = load_examples(path, tokenizer, DataConfig(skip_bad=True))
    assert report.kept == 1 and report.broken == {"not for this chat format": 1}


def test_names_are_filled_in_functions_and_calls():
    row = to_messages(json.loads(json.dumps(ROW).replace('"v"', '"{{who}}"').replace('"f"', '"f_{{what}}"')), "here")
    used, _ = fill(row, {"who": 'A "b"\n', "what": "é"})
    assert used == {"who": 1, "what": 2} and row.messages[2]["calls"] == [
        {"name": "f_é", "arguments": {"k": 'A "b"\n'}}
    ]
    assert json.loads(row.messages[0]["content"])[0]["function"]["name"] == "f_é"


def test_rows_that_differ_in_a_call_or_a_function_are_two():
    def of(row: dict) -> tuple[int, int]:
        return hashes(to_messages(row, "here"))

    other = ROW | {"messages": [USER, calling(arguments={"k": "w"}), RESULT, DONE]}
    assert of(ROW) == of(SHAPES["LLaMA-Factory"]) and len({of(ROW), of(other), of({**ROW, "tools": []})}) == 3


def test_an_answer_with_a_call_is_not_cut(qwen3):
    row = to_messages({"messages": [USER, calling(arguments={"k": "word " * 30})]}, "here")
    settings = DataConfig(max_length=30, truncate="cut")
    assert render_within(row, qwen3, settings) == ([], "max_length 30")


def test_a_pair_may_differ_in_its_calls():
    row = {"messages": [USER], "tools": TOOLS, "chosen": calling(), "rejected": calling(arguments={})}
    chosen, rejected = to_pair(row, "here")
    assert chosen.messages[:2] == rejected.messages[:2] == MESSAGES[:2]
    with pytest.raises(RowError, match="the same"):
        to_pair(row | {"rejected": calling()}, "here")


def test_the_reference_of_a_question_is_what_a_model_would_write(tmp_path: Path, qwen3):
    path = rows(tmp_path, {"messages": [USER, calling()], "tools": TOOLS}, {"messages": [USER, calling(), RESULT]})
    called, asked = read_questions(path, qwen3)
    assert called.label == '<tool_call>\n{"name": "f", "arguments": {"k": "v"}}\n</tool_call>' and called.label_tokens
    assert asked.label == "" and "</tool_response><|im_end|>" in qwen3.decode(asked.ids, specials=True)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
def test_a_view_of_tokens_tells_calls_and_results_apart(name: str):
    tokenizer = load_tokenizer(GOLDEN / name)
    row = to_messages(ROW, "here")
    tokens = tokens_of(row, *render_row(row, tokenizer, PLAIN), tokenizer)
    said = {role: "".join(t.text for t in tokens if t.role == role) for role in ("user", "assistant", "tool")}
    assert said == {
        "user": "q",
        "assistant": '<tool_call>\n{"name": "f", "arguments": {"k": "v"}}\n</tool_call>a',
        "tool": "r",
    }
    assert all(t.trained for t in tokens if t.role == "assistant")


def test_the_length_of_a_row_counts_its_calls():
    long = calling(arguments={"k": "v" * LONGEST_ROW})
    with pytest.raises(RowError, match="characters; up to"):
        to_messages({"messages": [USER, long, RESULT, DONE], "tools": TOOLS}, "here")
