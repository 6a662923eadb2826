"""Rows as questions with reference answers, for what a model itself says."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..config import PLAIN, DataConfig
from ..errors import DataError
from ..text.template import has_thought
from ..text.tokenizer import Tokenizer
from .files import read_rows
from .keys import ignored_notes
from .render import check_thoughts, hashes, keep_tail
from .shapes import TEXT, fill


class Question(NamedTuple):
    """A row of a test set: the prompt's ids, the question alone as text, the reference answer, and the row's place."""

    ids: list[int]
    text: str
    label: str  # "" where there is none
    label_tokens: int  # with the token that ends it, as training counts them
    where: str
    hashes: tuple[int, int]  # of the question with all before it, and of the whole row


def read_questions(
    path: str | Path, tokenizer: Tokenizer, settings: DataConfig = PLAIN, say: Callable[[str], None] = lambda note: None
) -> list[Question]:
    """The questions of a file of rows; DataError for a row that ends with neither a question nor an answer.

    `say` is called with notes on the file and on the keys that are ignored on request.
    """
    questions, ignored, cut = [], Counter(dict.fromkeys(settings.ignored, 0)), 0
    for row in read_rows(path, settings, say):
        ignored.update(row.ignored)
        fill(row, settings.define)
        check_thoughts(row, tokenizer)
        if row.messages[-1]["role"] in ("user", "tool"):
            row.messages.append({"role": "assistant", "content": ""})
        row_hashes = hashes(row)
        cut += keep_tail(row, tokenizer, settings.source_tail)
        *before, last = row.messages
        if last["role"] != "assistant":
            hint = "--columns prompt=text makes a question of it." if row.shape == TEXT else "A question belongs there."
            raise DataError(f"{row.where}: the last message is the {last['role']}'s", hint)
        written, label, count = tokenizer.template.written(last), "", 0
        thinking = has_thought(row.messages)
        if written.strip():
            ids, trained = tokenizer.render([*before, {**last, "loss": True}], loss_on="last")
            own = _last_run(ids, trained)
            # where a prompt opens the thought, an answer begins within it
            label = tokenizer.answer(own) if thinking or tokenizer.template.opens_thoughts else written
            count = len(own)
        text = next((m["content"] for m in reversed(before) if m["role"] == "user"), "")
        ids, _ = tokenizer.render(before, prompt=True, thinking=thinking)
        questions.append(Question(ids, text, label, count, row.where, row_hashes))
    for note in ignored_notes(ignored):
        say(note)
    if cut:
        say(f"{cut:,} of {len(questions):,} questions are read from their last {settings.source_tail:,} tokens on")
    return questions


def _last_run(ids: list[int], trained: list[bool]) -> list[int]:
    """The ids of the last answer: other answers may be trained too."""
    end = len(trained) - trained[::-1].index(True)
    start = next((i for i in range(end, 0, -1) if not trained[i - 1]), 0)
    return ids[start:end]
