"""Files of training rows in the shapes that users have, read as messages.

json (an array) and jsonl; alpaca (instruction, input, output, system, history), sharegpt (conversations of from and value),
OpenAI (messages of role and content), prompt and completion, question and answer. The keys of a row tell its shape. Every
complaint names the file and the line or row.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .errors import DataError
from .template import Message

MAX_LINE = 64 << 20
PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
CHATS = ("messages", "conversations", "conversation", "dialog")
QUESTIONS = ("prompt", "question", "query")
ANSWERS = ("completion", "response", "answer", "output")
ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
}  # fmt: skip


class Row(NamedTuple):
    """One conversation, the shape it came in, and where it stands."""

    messages: list[Message]
    shape: str
    where: str


def read_rows(path: Path) -> list[Row]:
    """The conversations of a file; DataError for the first row that is none, or if there is no row."""
    rows = [Row(*_messages(value, where), where) for where, value in _values(path)]
    if not rows:
        raise DataError(f"{path}: no rows", "Give a file with at least one conversation.")
    return rows


def fill(row: Row, define: dict[str, str]) -> tuple[Counter, set[str]]:
    """Replace `{{key}}` in the texts of a row by define[key]; returns how often each key stood there, and keys left over."""
    used, open_keys = Counter(), set()
    for message in row.messages:
        text = message["content"]
        keys = PLACEHOLDER.findall(text)
        used.update(k for k in keys if k in define)
        open_keys |= set(keys) - define.keys()
        message["content"] = PLACEHOLDER.sub(lambda m: define.get(m[1], m[0]), text)
    return used, open_keys


def _values(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, JSON value) of every row of a file."""
    if not path.is_file():  # a pipe could not be read twice
        what = "a folder" if path.is_dir() else "no regular file" if path.exists() else "not there"
        raise DataError(f"{path} is {what}", "Give a .json or .jsonl file.")
    if path.suffix.lower() in (".csv", ".tsv", ".xlsx", ".parquet", ".safetensors"):
        raise DataError(f"{path} is no file of JSON rows", "Give a .json or .jsonl file.")
    try:
        with open(path, "rb") as file:
            start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        if start.startswith(b"["):
            yield from _array(path)
        else:
            yield from _lines(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", "Check the path and the file's permissions.") from None


def _array(path: Path) -> Iterator[tuple[str, Any]]:
    text = _decode(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), str(path))
    for number, value in enumerate(_parse(text, str(path)), 1):
        yield f"{path}, row {number}", value


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as file:
        number = 0
        # lines end in \n alone: a text may hold other separators
        while raw := file.readline(MAX_LINE + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(raw) > MAX_LINE:
                raise DataError(f"{where} is longer than {MAX_LINE >> 20} MiB", "A row belongs on a line of its own.")
            raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if raw.strip():
                yield where, _parse(_decode(raw, where), where)


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        try:
            raw.decode("gb18030")
            guess = "it looks like GB18030: convert it with `iconv -f gb18030 -t utf-8`"
        except UnicodeDecodeError:
            guess = "save it as UTF-8"
        line = "" if ", line" in where else f", line {raw[: error.start].count(10) + 1}"
        raise DataError(
            f"{where}{line}: byte 0x{raw[error.start]:02x} is not UTF-8", f"The file must be UTF-8; {guess}."
        ) from None


def _parse(text: str, where: str) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        line = "" if ", line" in where else f", line {error.lineno}"
        raise DataError(f"{where}{line}, column {error.colno}: {error.msg}: {quote(text[error.pos : error.pos + 40])}",
                        "Correct the JSON there.") from None  # fmt: skip
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {error}", "Correct the JSON there.") from None
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(k for k, n in Counter(k for k, _ in pairs).items() if n > 1)
        raise ValueError(f"key {quote(twice)} stands twice in one object")
    return result


def quote(text: str, limit: int = 80) -> str:
    """A stranger's text for a message: one line, short, control characters escaped."""
    return repr(text if len(text) <= limit else text[:limit] + "…")


def _messages(row: Any, where: str) -> tuple[list[Message], str]:
    """The messages of one row and the name of its shape."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row is a JSON object, not {quote(json.dumps(row))}", "Write each row as {...}.")
    chat = next((k for k in CHATS if k in row), None)
    question = next((k for k in QUESTIONS if k in row), None)
    answer = next((k for k in ANSWERS if k in row), None)
    if chat is not None:
        messages, shape = _chat(row, chat, where)
    elif "instruction" in row and answer is not None:
        messages, shape = _alpaca(row, answer, where), "alpaca"
    elif question is not None and answer is not None:
        messages = _system(row, where) + _turn(_text(row, question, where), _text(row, answer, where))
        shape = f"{question}/{answer}"
    else:
        raise DataError(f"{where}: keys {quote(', '.join(map(str, row)))} are of no known shape",
                        "Known are messages, conversations, instruction/output, prompt/completion and question/answer.")  # fmt: skip
    _check(messages, where)
    return messages, shape


def _chat(row: dict, key: str, where: str) -> tuple[list[Message], str]:
    turns = row[key]
    if not isinstance(turns, list) or not turns or not all(isinstance(t, dict) for t in turns):
        raise DataError(f"{where}: {key} is no list of messages", "Write it as [{...}, ...].")
    sharegpt = "from" in turns[0]
    role_key, text_key = ("from", "value") if sharegpt else ("role", "content")
    messages = _system(row, where)
    for turn in turns:
        role = turn.get(role_key)
        if not isinstance(role, str) or role not in ROLES:
            raise DataError(f"{where}: a message has {role_key} {quote(str(role))}", f"Known are {', '.join(ROLES)}.")
        message: Message = {"role": ROLES[role], "content": _text(turn, text_key, where)}
        if "loss" in turn or "loss_mask" in turn:
            message["loss"] = bool(turn.get("loss", turn.get("loss_mask")))
        messages.append(message)
    return messages, "sharegpt" if sharegpt else "messages"


def _alpaca(row: dict, answer: str, where: str) -> list[Message]:
    instruction, more = _text(row, "instruction", where), _text(row, "input", where, "")
    messages = _system(row, where)
    history = row.get("history") or []
    for pair in history if isinstance(history, list) else [None]:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)):
            raise DataError(f"{where}: history is no list of [question, answer] pairs", "Write it as [[q, a], ...].")
        messages += _turn(*(_sound(t, "history", where) for t in pair))
    return messages + _turn(f"{instruction}\n{more}" if more else instruction, _text(row, answer, where))


def _system(row: dict, where: str) -> list[Message]:
    system = _text(row, "system", where, "")
    return [{"role": "system", "content": system}] if system else []


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _text(row: dict, key: str, where: str, default: str | None = None) -> str:
    """The text under a key: a string, or a list of parts of type text."""
    value = row.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in value):
        texts = [p.get("text") for p in value]
        value = "".join(texts) if all(isinstance(t, str) for t in texts) else value
    if not isinstance(value, str):
        raise DataError(f"{where}: {key} is {quote(json.dumps(value))}", "A text belongs there.")
    return _sound(value, key, where)


def _sound(text: str, key: str, where: str) -> str:
    """The text; DataError if it cannot be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where}: {key} holds half a surrogate pair", "Correct the \\ud... escape there.") from None
    return text


def _check(messages: list[Message], where: str) -> None:
    """A row must teach something: at least one answer that is trained and not empty."""
    answers = [m for m in messages if m["role"] == "assistant"]
    if not answers:
        raise DataError(
            f"{where}: there is nothing to learn, no message is the assistant's",
            "Add the answer, or take the row out.",
        )
    if not any(m["content"].strip() and m.get("loss", True) for m in answers):
        raise DataError(
            f"{where}: there is nothing to learn, the answer is empty",
            "Write the answer, or take the row out.",
        )
