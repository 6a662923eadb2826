"""One row to tokens: ids and mask, within the limits; and the hashes by which rows are compared."""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..config import DataConfig
from ..errors import DataError, RowError
from ..text.template import Message
from ..text.template_glm import CHATGLM
from ..text.tokenizer import Tokenizer
from .shapes import TEXT, Row

# marks of chat formats; those of thoughts and tool calls may be part of an answer
MARKS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>",
         "[gMASK]", "<sop>", "<eop>", "[INST]", "[/INST]", "<<SYS>>", "### Instruction:", "### Response:", "<s>", "</s>")  # fmt: skip
MARK = re.compile("|".join(map(re.escape, MARKS)))

Piece = tuple[np.ndarray, np.ndarray]


def render_within(row: Row, tokenizer: Tokenizer, settings: DataConfig) -> tuple[list[Piece], str | None]:
    """The (ids int64 [n], trained bool [n]) of a row within the limits, and the limit that it was over, if any.

    No piece if the row is over and may not be cut. RowError if the chat format does not take it or nothing of it is trained.
    """
    if row.shape == TEXT:
        return _text_pieces(row, tokenizer, settings.max_length), None
    first = None
    while True:
        ids, trained = render_row(row, tokenizer, settings)
        over = settings.over(int((~trained).sum()), int(trained.sum()))
        first = first or over
        shorter = _shorten(row, tokenizer, settings, ids, trained) if over and settings.truncate == "cut" else None
        if shorter is None:
            return ([] if over else [(ids, trained)]), first
        row = shorter


def render_sides(
    rows: Sequence[Row], tokenizer: Tokenizer, settings: DataConfig
) -> tuple[list[tuple[np.ndarray, np.ndarray, int]], str | None]:
    """render_within of a row, each piece with a 0; or of a pair, one behind the other, with where the second begins."""
    rendered = [render_within(row, tokenizer, settings) for row in rows]
    over = next((over for _, over in rendered if over), None)
    if len(rows) == 1:
        return [(ids, trained, 0) for ids, trained in rendered[0][0]], over
    pieces = [piece for found, _ in rendered for piece in found]
    if len(pieces) < len(rows):
        return [], over
    ids, trained = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    return [(ids, trained, len(pieces[0][0]))], over


def keep_tail(row: Row, tokenizer: Tokenizer, most: int | None) -> bool:
    """Cut the last question of a row, at its beginning, to at most so many tokens; whether there was anything to cut."""
    asked = next((m for m in reversed(row.messages) if m["role"] == "user"), None)
    ids = tokenizer.encode(asked["content"]) if asked and most else []
    if asked is None or most is None or len(ids) <= most:
        return False
    for n in range(most, 0, -1):  # a piece of a word may take more tokens than it did in the word
        asked["content"] = tokenizer.decode(ids[-n:]).lstrip("\ufffd")
        if len(tokenizer.encode(asked["content"])) <= most:
            break
    return True


def check_thoughts(row: Row, tokenizer: Tokenizer) -> None:
    """RowError if a message has a thought and the chat format has no place for one."""
    if any(m.get("thought") for m in row.messages) and not tokenizer.template.thinks:
        what = (
            f"{row.where}: a message has a thought, and the chat format {tokenizer.template.name} has no place for one"
        )
        hint = "Take a model that thinks, or leave the thoughts out: --ignore-keys reasoning_content (or as the key is called)."
        raise RowError("a thought without a place", what, hint)


def render_row(row: Row, tokenizer: Tokenizer, settings: DataConfig) -> Piece:
    check_thoughts(row, tokenizer)
    try:
        rendered, mask = tokenizer.render(row.messages, loss_on=settings.loss_on, train_end=settings.train_end)
    except DataError as error:
        raise RowError("not for this chat format", f"{row.where}: {error.what}", error.hint) from None
    ids, trained = np.array(rendered), np.array(mask)
    if not trained.any():
        what = f"{row.where}: there is nothing to learn, no token is trained"
        raise RowError("nothing trained", what, "Check loss_on and the row's loss keys.")
    return ids, trained


def _text_pieces(row: Row, tokenizer: Tokenizer, longest: int) -> list[Piece]:
    """A raw text and the token that ends a text, in pieces of `longest` tokens; everything is trained except what opens a piece."""
    known = tokenizer.specials
    opening = [known[t] for t in ("[gMASK]", "<sop>", "sop") if t in known]
    ending = [known[t] for t in ("<|endoftext|>", "</s>", *tokenizer.template.stops) if t in known][:1]
    if tokenizer.template == CHATGLM:
        what = f"{row.where}: ChatGLM-6B's format has no place for raw text"
        raise RowError("not for this chat format", what, "Write it as prompt and response.")
    ids = tokenizer.encode_answer(row.messages[0]["content"]) + ending
    step = max(longest - len(opening), 2)
    pieces = [np.array(opening + ids[i : i + step]) for i in range(0, len(ids), step)]
    least = max(len(opening), 1)
    return [(piece, np.arange(len(piece)) >= least) for piece in pieces if len(piece) > least]


def _shorten(row: Row, tokenizer: Tokenizer, settings: DataConfig, ids: np.ndarray, trained: np.ndarray) -> Row | None:
    """The row with one text shortened at its end by what is too much: the last answer, or the question before it.

    The template around the texts stays whole, the stop token too. None if there is not enough to cut.
    """
    masked, targets = int((~trained).sum()), int(trained.sum())
    source_over = masked - (settings.max_source_length or masked)
    target_over = targets - (settings.max_target_length or targets)
    answer = max(i for i, m in enumerate(row.messages) if m["role"] == "assistant" and m.get("loss", True))
    question = max((i for i, m in enumerate(row.messages[:answer]) if m["role"] == "user"), default=None)
    if target_over > 0:
        place, much = answer, target_over
    elif source_over > 0:
        place, much = question, source_over
    else:
        place, much = (answer if targets > masked or question is None else question), len(ids) - settings.max_length
    if place is None or row.messages[place].get("calls"):
        return None
    content = tokenizer.encode(row.messages[place]["content"])
    text = tokenizer.decode(content[: max(len(content) - much, 0)]).rstrip("\ufffd")
    if not text.strip():
        return None
    messages = [m | {"content": text} if i == place else m for i, m in enumerate(row.messages)]
    return row._replace(messages=messages)


def hashes(row: Row, *others: Row) -> tuple[int, int]:
    """64-bit hashes of a row's question (all that stands before its last answer) and of the whole row, with other answers to it."""
    texts = [_told(m) for m in row.messages]
    last = max((i for i, m in enumerate(row.messages) if m["role"] == "assistant"), default=len(texts))
    whole = texts + [_told(m) for other in others for m in other.messages[last:]]
    return _hash64(texts[:last]), _hash64(whole)


def _told(message: Message) -> list[Any]:
    """All that a message says."""
    return [message["role"], message["content"], *([message["calls"]] if message.get("calls") else [])]


def _hash64(value: Any) -> int:
    return int.from_bytes(hashlib.blake2b(json.dumps(value).encode(), digest_size=8).digest(), "little")
