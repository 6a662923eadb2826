"""What of a row is cut, which tokens of a raw text are trained, and which rows count as the same."""

from dataclasses import replace

import pytest
from tiny import make_model

from minilora.config import DataConfig
from minilora.errors import RowError
from minilora.rows.render import check_thoughts, hashes, keep_tail, render_row, render_sides, render_within
from minilora.rows.shapes import to_messages
from minilora.text.tokenizer import Tokenizer, load_tokenizer

SETTINGS = DataConfig()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """One token is a byte."""
    return load_tokenizer(make_model(tmp_path_factory.mktemp("model") / "m"))


def chat(*texts: str, **more):
    roles = ("user", "assistant") * len(texts)
    return to_messages(
        {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]} | more, "x"
    )


@pytest.mark.parametrize(
    ("question", "most", "tail"),
    [("abcdef", 4, "cdef"), ("abcdef", 1, "f"), ("abcdef", 6, None), ("abcdef", 0, None), ("abcdef", None, None),
     ("ab中", 4, "b中"), ("ab中c", 3, "c")],
)  # fmt: skip
def test_the_last_question_keeps_its_tail(tokenizer, question, most, tail):
    row = chat("first one", "1", question, "2")
    assert keep_tail(row, tokenizer, most) == (tail is not None)
    assert [m["content"] for m in row.messages] == ["first one", "1", tail or question, "2"]


def test_a_text_has_no_question(tokenizer):
    assert not keep_tail(to_messages({"text": "abcdef"}, "x"), tokenizer, 2)


def test_rows_are_the_same_by_their_question_and_by_all_that_they_say():
    one, (question, whole) = chat("a", "b"), hashes(chat("a", "b"))
    assert hashes(one) == (question, whole) and question != whole
    assert hashes(chat("a", "c"))[0] == question and hashes(chat("a", "c"))[1] != whole
    assert hashes(chat("c", "b"))[0] != question
    longer = hashes(chat("a", "b", "c", "d"))
    assert longer[0] not in (question, whole) and longer[0] == hashes(chat("a", "b", "c", "e"))[0]
    assert hashes(chat("a"))[0] == hashes(chat("a"))[1] == question
    pair = hashes(one, chat("a", "c"))
    assert pair[0] == question and pair[1] != whole and pair == hashes(one, chat("x", "c"))
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    calls = [to_messages({"messages": [{"role": "user", "content": "a"},
                                       {"role": "assistant", "content": "b", "tool_calls": [c]}]}, "x")
             for c in (call, call | {"function": {"name": "f", "arguments": {"x": 2}}})]  # fmt: skip
    assert len({whole, *(hashes(row)[1] for row in calls)}) == 3
    assert all(0 <= h < 2**64 for h in pair)


@pytest.mark.parametrize(("longest", "lengths"), [(4, [4, 4]), (5, [5, 4]), (100, [9])])
def test_a_raw_text_is_trained_but_for_the_first_token_of_a_piece(tokenizer, longest, lengths):
    """A last piece of one token has nothing to learn."""
    row = to_messages({"text": "abcdefgh"}, "x")
    pieces, over = render_within(row, tokenizer, replace(SETTINGS, max_length=longest))
    tokens = [*tokenizer.encode("abcdefgh"), 256]
    assert over is None and [i for ids, _ in pieces for i in ids.tolist()] == tokens[: sum(lengths)]
    assert [len(ids) for ids, _ in pieces] == lengths
    assert all(trained.tolist() == [False] + [True] * (len(ids) - 1) for ids, trained in pieces)


def test_a_pair_is_one_piece_or_none(tokenizer):
    rows = [chat("a", "b"), chat("a", "cd")]
    ((ids, trained, second),), over = render_sides(rows, tokenizer, SETTINGS)
    one, two = (render_row(row, tokenizer, SETTINGS) for row in rows)
    assert over is None and second == len(one[0])
    assert ids.tolist() == [*one[0].tolist(), *two[0].tolist()] and trained.tolist() == [*one[1], *two[1]]
    short = replace(SETTINGS, max_target_length=int(one[1].sum()))
    assert render_sides(rows, tokenizer, short) == ([], f"max_target_length {short.max_target_length}")
    ((_, _, alone),), over = render_sides(rows[:1], tokenizer, short)
    assert alone == 0 and over is None


def test_the_end_of_an_answer_may_be_left_out(tokenizer):
    (ids, trained), (same, fewer) = (
        render_row(chat("a", "b"), tokenizer, replace(SETTINGS, train_end=end)) for end in (True, False)
    )
    assert ids.tolist() == same.tolist() and tokenizer.decode(ids[fewer].tolist()) == "b"
    assert tokenizer.decode(ids[trained].tolist(), specials=True).startswith("b<|im_end|>")


def test_a_thought_needs_a_place(tokenizer):
    row = to_messages({"messages": [{"role": "user", "content": "a"},
                                    {"role": "assistant", "content": "b", "reasoning_content": "c"}]}, "x")  # fmt: skip
    assert not tokenizer.template.thinks
    with pytest.raises(RowError, match="has a thought"):
        check_thoughts(row, tokenizer)
    check_thoughts(chat("a", "b"), tokenizer)
