"""The tokens of a row as a reader can see them: whole characters, roles, special tokens by name."""

import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..rows import Row
from ..rows.shapes import TEXT
from ..text.template import has_thought, render_text, split_tools
from ..text.tokenizer import Tokenizer

FORMAT = "format"  # the role of what the chat format adds
MARK = "\ue000"  # for private use: replaces the texts of a chat that is rendered to find what the format writes around them
LONGEST = 8  # tokens of one character, at most; a longer run is bytes that are not text


class Token(NamedTuple):
    """One token, or the few that make one character together; role is the message's, or "format"."""

    ids: tuple[int, ...]
    text: str
    role: str
    trained: bool
    special: bool


def tokens_of(row: Row, ids: np.ndarray, trained: np.ndarray, tokenizer: Tokenizer) -> list[Token]:
    """The tokens of a row rendered as ids int64 [n], trained bool [n]."""
    names = {i: text for text, i in tokenizer.specials.items()}
    groups = list(_characters(ids.tolist(), trained.tolist(), names, tokenizer))
    roles = _roles(row, [text for _, text, _ in groups], tokenizer)
    return [
        Token(group, text, role, flag, group[0] in names)
        for (group, text, flag), role in zip(groups, roles, strict=True)
    ]


def _characters(
    ids: list[int], trained: list[bool], names: dict[int, str], tokenizer: Tokenizer
) -> Iterator[tuple[tuple[int, ...], str, bool]]:
    """(ids, text, trained) of each special token, and of the shortest runs of others that are whole characters."""
    start = 0
    while start < len(ids):
        end, text = start + 1, names.get(ids[start])
        if text is None:
            end, text = _character(ids, trained, start, names, tokenizer)
        yield tuple(ids[start:end]), text, trained[start]
        start = end


def _character(
    ids: list[int], trained: list[bool], start: int, names: dict[int, str], tokenizer: Tokenizer
) -> tuple[int, str]:
    """(end, text) of the shortest run from `start` that is text; of one token, as <0x..>, if no short run is."""
    # SentencePiece drops the blank before a text: it shows only after another token
    before = ids[start - 1 : start] if start and ids[start - 1] not in names else []
    known = tokenizer.decode(before, specials=True)
    for end in range(start + 1, min(start + LONGEST, len(ids)) + 1):
        if end > start + 1 and (ids[end - 1] in names or trained[end - 1] != trained[start]):
            break
        alone = tokenizer.decode(ids[start:end], specials=True)
        both = tokenizer.decode(before + ids[start:end], specials=True)
        text = both[len(known) :] if before and both.startswith(known) and "\ufffd" not in known else alone
        if "\ufffd" not in text:
            return end, text
    return start + 1, tokenizer.decode(ids[start : start + 1], specials=True)


def _roles(row: Row, texts: list[str], tokenizer: Tokenizer) -> list[str]:
    """The role of each text: that of the message it belongs to, which is found between what the chat format writes around it."""
    if row.shape == TEXT:
        return ["assistant"] * len(texts)
    whole, spans, at = "".join(texts), [], 0
    around = _around(row, tokenizer)
    for message, before, behind in zip(split_tools(row.messages)[1], around, around[1:], strict=False):
        opened = whole.find(before, at)
        if opened < 0 and message.get("calls"):  # a format may have no line between a role and a call
            before = before.rstrip()
            opened = whole.find(before, at)
        if opened < 0:
            break
        at = opened + len(before)
        forms = [] if message.get("calls") else _forms(message["content"])
        form = next((form for form in forms if form and whole.startswith(form, at)), "")
        end = at + len(form) if form else whole.find(behind, at)
        spans.append((at, max(end, at), message["role"]))
        at = max(end, at)
    roles, place, number = [], 0, 0
    for text in texts:
        while number < len(spans) and place >= spans[number][1]:
            number += 1
        inside = number < len(spans) and place + len(text) > spans[number][0]
        roles.append(spans[number][2] if inside else FORMAT)
        place += len(text)
    return roles


def _around(row: Row, tokenizer: Tokenizer) -> list[str]:
    """What the chat format writes before the first message's text, between each two, and after the last."""
    turns = split_tools(row.messages)[1]
    marked = [{"role": m["role"], "content": f"{MARK}{i}{MARK}"} for i, m in enumerate(turns)]
    told = row.messages[: len(row.messages) - len(turns)]
    text = render_text(tokenizer.template.segments([*told, *marked], thinking=has_thought(row.messages)))
    parts, at = [], 0
    for i in range(len(marked)):
        mark = f"{MARK}{i}{MARK}"
        found = text.find(mark, at)
        if found >= 0:  # a format may leave a message out
            parts.append(text[at:found])
            at = found + len(mark)
    return [*parts, text[at:]]


def _forms(content: str) -> list[str]:
    """The forms in which chat formats and tokenizers may write a message's text."""
    forms = [content, content.strip(), content.rpartition("</think>")[2].strip()]
    return forms + [unicodedata.normalize("NFC", form) for form in forms]
