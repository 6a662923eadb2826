"""The keys of rows and messages: each is read, or is a note about the row, or must be named.

A key that holds something and is neither read nor a note would be lost: training stops and names it. A key that holds nothing
(null, "", [], {}) is no loss. Upper and lower case are one in the names of notes.
"""

import shlex
from collections import Counter

from ..errors import RowError, quote

# notes about a row that teach nothing
NOTES = frozenset((
    "id", "_id", "idx", "index", "no", "number", "uid", "uuid", "guid", "row_id", "sample_id", "conversation_id", "conv_id", "dialogue_id",
    "dialog_id", "session_id", "thread_id", "parent_id", "message_id", "user_id", "__index_level_0__", "unnamed: 0", "source", "data_source", "origin",
    "dataset", "dataset_name", "subset", "split", "file", "filename", "path", "line", "category", "categories", "subcategory", "class_name", "topic",
    "topics", "domain", "subject", "field", "tag", "tags", "task", "task_id", "task_type", "task_name", "type", "kind", "level",
    "difficulty", "url", "link", "lang", "language", "locale", "timestamp", "time", "date", "datetime", "created", "created_at", "updated_at",
    "parallel_tool_calls", "author", "annotator", "license", "version", "meta", "metadata", "model", "model_name", "generator", "length", "num_turns", "n_turns", "num_tokens",
    "token_count", "tokens", "hash", "md5", "sha1", "sha256", "编号", "序号", "来源", "出处", "类别", "分类", "领域", "主题", "语言", "日期", "时间", "作者",
))  # fmt: skip
# in a message these are what it is about: an attachment, or the tool that ChatGLM3 calls
CONTENT_OF_MESSAGES = {"meta", "metadata", "file", "filename", "path", "url", "link", "task"}
# of a raw text they may be what is to be learnt of it
NOTES_OF_TEXT = NOTES - {"category", "categories", "subcategory", "class_name", "类别", "分类"}
NOTES_OF_MESSAGES = (NOTES - CONTENT_OF_MESSAGES) | {"finish_reason", "stop_reason", "usage", "logprobs"}
LOSSES = ("loss", "loss_mask", "weight", "train", "trainable")
OF_MESSAGE = "message "  # stands before a message's key where both kinds are named
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")


def unread(value: dict, read: set[str], ignored: frozenset[str], notes: frozenset[str] = NOTES) -> list[str]:
    """The keys that hold something and are neither read, nor notes, nor ignored on request."""
    return [
        str(key)
        for key, held in value.items()
        if key not in read and str(key).lower() not in notes and key not in ignored and held not in (None, "", [], {})
    ]


def refuse_unread(keys: tuple[str, ...], where: str) -> None:
    """RowError if keys that hold content would be lost."""
    if keys:
        key = quote(keys[0])
        more = f" (and {quote(', '.join(keys[1:]))})" if keys[1:] else ""
        raise RowError(
            f"key {key} is not read", f"{where}: {key} holds something and is not read{more}", _hint(keys[0])
        )


def _hint(key: str) -> str:
    name = key.removeprefix(OF_MESSAGE)
    shown = shlex.quote(name) if name.isprintable() else quote(name)
    leave = f"--ignore-keys {shown} leaves it out."
    if name in ("tools", "tool_calls", "function_call", "functions", "tool_call_id"):
        return f"Tools stand in a key of the row, and calls in a message of the assistant; {leave}"
    if name in ("chosen", "rejected"):
        return f"train --objective dpo learns from chosen and rejected answers; {leave}"
    if name in ("label", "score", "reward", "preference"):
        return f"Preferences can be trained as chosen and rejected answers alone; {leave}"
    if name in ("images", "image", "audio", "audios", "video", "videos"):
        return f"Only text can be trained; {leave}"
    if key.startswith(OF_MESSAGE) or name in (*LOSSES, *THOUGHTS):
        return leave
    return f"--columns input={shown} adds it to the question; {leave}"


def ignored_notes(rows: Counter) -> list[str]:
    """Lines on the keys that --ignore-keys names: how many rows have each of them, or that none has."""
    found = ", ".join(f"{quote(key)} ({n:,})" for key, n in sorted(rows.items()) if n)
    return [f"keys that are ignored on request: {found}"] * bool(found) + [
        f"note: no row has a key {quote(key)}, which --ignore-keys names" for key, n in sorted(rows.items()) if not n
    ]


def is_trained(turn: dict, of_assistant: bool, where: str, ignored: frozenset[str]) -> bool | None:
    """What a message says of its own training: None where it says nothing.

    RowError for weights between 0 and 1, for contradictions, and for a question that is marked for training.
    """
    said = {key: turn[key] for key in LOSSES if key not in ignored and turn.get(key) is not None}
    for key, value in said.items():
        if value not in (0, 1):  # True and False are these
            what = f"{where}: a message has {key} {quote(str(value))}"
            raise RowError("a weight that is not 0 or 1", what, "An answer is trained (1, true) or masked (0, false).")
    if len({bool(value) for value in said.values()}) > 1:
        what = f"{where}: a message has {' and '.join(f'{k} {v}' for k, v in said.items())}"
        raise RowError("contradiction", what, "Keep one of them.")
    trained = bool(next(iter(said.values()))) if said else None
    if trained and not of_assistant:
        what = f"{where}: a message that is not the assistant's has {' and '.join(f'{k} {v}' for k, v in said.items())}"
        raise RowError(
            "a question to train", what, f"Only answers can be trained; --ignore-keys {','.join(said)} leaves it out."
        )
    return trained
