"""The value of a row to messages: its keys tell its shape.

alpaca (instruction, input, output, system, history), sharegpt (conversations of from and value), OpenAI and ChatGLM3 (messages
or conversations of role and content), pairs under many names (prompt and completion, question and answer, ADGEN's content and
summary, text and label, 问题 and 答案 ...), Qianfan's lists of turns, and raw text. Tools are in a key of the row, tool calls in a
key of OpenAI's messages or in turns of their own (LLaMA-Factory, ms-swift).
"""

import json
import re
from collections import Counter
from contextlib import suppress
from typing import Any, NamedTuple

from ..config import PLAIN, DataConfig
from ..errors import RowError, UsageError, quote
from ..files.strict_json import parse_json
from ..text.template import Message
from ..text.tools import as_json, read_calls, read_tools
from .keys import LOSSES, NOTES_OF_MESSAGES, NOTES_OF_TEXT, OF_MESSAGE, THOUGHTS, is_trained, refuse_unread, unread

PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
BLANK = re.compile(r"[\s\u200b-\u200f\u2060\ufeff]*")  # nothing that is seen
CHATS = ("messages", "conversations", "conversation", "dialog")
# in the order in which several of them are joined
QUESTIONS = ("instruction", "指令", "prompt", "提示", "query", "question", "problem", "问题", "提问", "input", "输入")
ANSWERS = ("completion", "response", "answer", "output", "target", "答案", "回答", "回复", "输出")
# names that mean a question and an answer only together
PAIRS = (("content", "summary"), ("text", "label"))
COLUMNS = ("prompt", "response", "system", "history", "instruction", "input", "output", "messages", "text")
ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "tool_response": "tool",
    "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
CALL_ROLES = ("function_call", "tool_call")  # of turns whose text is calls
MOST_FILLED = 1 << 18  # characters that --define may add to a text
CALLS, FUNCTIONS = ("tool_calls", "function_call"), ("tools", "functions")
LONGEST_ROW = 4 << 20  # characters, of which a tokenizer takes 300 bytes of memory each
TEXT = "text"  # the shape, and the role of its one message: raw text, all of it trained


class Row(NamedTuple):
    """One conversation, the shape it came in, where it stands, its keys that hold something and were not read, and those to ignore."""

    messages: list[Message]
    shape: str
    where: str
    unread: tuple[str, ...] = ()
    ignored: frozenset[str] = frozenset()


def fill(row: Row, define: dict[str, str]) -> tuple[Counter, set[str]]:
    """Replace `{{key}}` in the texts of a row by define[key]; returns how often each key stood there, and keys left over."""
    used, open_keys = Counter(), set()

    def filled(text: str, define: dict[str, str]) -> str:
        keys = PLACEHOLDER.findall(text)
        used.update(k for k in keys if k in define)
        open_keys.update(set(keys) - define.keys())
        if (more := sum(len(define.get(key, "")) for key in keys)) > MOST_FILLED:
            hint = f"Up to {MOST_FILLED:,} characters can be filled into a text."
            raise RowError("too much to fill in", f"{row.where}: --define would add {more:,} characters", hint)
        return PLACEHOLDER.sub(lambda m: define.get(m[1], m[0]), text)

    in_json = {key: as_json(text)[1:-1] for key, text in define.items()}
    for message in row.messages:
        message["content"] = filled(message["content"], in_json if message["role"] == "tools" else define)
        if "calls" in message:
            message["calls"] = json.loads(filled(as_json(message["calls"]), in_json))
    return used, open_keys


def check_columns(columns: dict[str, str]) -> None:
    """UsageError unless columns maps names of ours to columns of a file."""
    wrong = next((name for name in columns if name not in COLUMNS), None)
    if wrong is not None:
        raise UsageError(
            f"--columns {wrong}=...: {quote(wrong)} is not a name that is read", f"Known are {', '.join(COLUMNS)}."
        )


def is_header(names: set[str], columns: dict[str, str]) -> bool:
    """Whether the names of a sheet's columns make a shape, so that its line is the header."""
    if columns:
        return set(columns.values()) <= names
    pair = _pair(names)
    return (pair is not None and pair[1] is not None) or any(k in names for k in (*CHATS, TEXT))


def to_messages(value: Any, where: str, settings: DataConfig = PLAIN) -> Row:
    """A row's messages; RowError if its keys are of no known shape, or a text is missing. It may end with a question.

    Of the settings, `columns` gives keys the names that are read here, and `ignored` are keys to leave out.
    """
    columns, ignored = settings.columns, settings.ignored
    held = ignored & _all_keys(value) if ignored else ignored
    if isinstance(value, list) and value and all(isinstance(turn, dict) and "role" in turn for turn in value):
        value = {"messages": value}
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        messages, lost = _turns(value, where, columns, ignored)
        shape = "turns"
    elif isinstance(value, dict):
        value = {k: v for k, v in value.items() if k not in ignored}
        value = _rename(value, where, columns) if columns else value
        messages, shape, lost = _messages(value, where, ignored)
        messages = (_functions(value, where) if shape != TEXT else []) + messages
    else:
        what = f"{where}: a row is a JSON object, not {quote(json.dumps(value))}"
        raise RowError("no object", what, "Write each row as {...}.")
    characters = sum(len(m["content"]) + (len(as_json(m["calls"])) if "calls" in m else 0) for m in messages)
    if characters > LONGEST_ROW:
        what = f"{where} has {characters:,} characters; up to {LONGEST_ROW:,} are read"
        raise RowError("text too long", what, "Divide it into several rows.")
    return Row(messages, shape, where, tuple(dict.fromkeys(lost)), held)


def _all_keys(value: Any) -> set[str]:
    """The keys of a row and of its messages."""
    row = value if isinstance(value, dict) else {"": value}
    lists = [turns for held in row.values() if isinstance(turns := _parsed(held), list)]
    return {*row, *(key for turns in lists for turn in turns if isinstance(turn, dict) for key in turn)}


def trainable(row: Row) -> Row:
    """The row; RowError if nothing of it can be learnt, one of its answers is empty, or a key that holds something is not read."""
    check_answers(row)
    refuse_unread(row.unread, row.where)
    return row


def check_answers(row: Row) -> None:
    """RowError if nothing of a row can be learnt, or one of its answers is empty."""
    answers = [m for m in row.messages if m["role"] in ("assistant", TEXT)]
    trained = [m for m in answers if m.get("loss", True)]
    if not trained:
        more = "every answer has loss: false" if answers else "no message is the assistant's"
        unread = f" (not read: {quote(', '.join(row.unread))})" if row.unread else ""
        what = f"{row.where}: there is nothing to learn, {more}{unread}"
        name = "" if answers else " --columns response=NAME names its column."
        name = " train --objective dpo learns from chosen and rejected." if "chosen" in row.unread else name
        raise RowError("no answer", what, f"Add the answer, or take the row out.{name}")
    if any(BLANK.fullmatch(m["content"]) and not m.get("calls") for m in trained):
        what = f"{row.where}: there is nothing to learn, the answer is empty"
        raise RowError("empty answer", what, "Write the answer, or take the row out.")


def _rename(row: dict, where: str, columns: dict[str, str]) -> dict:
    missing = next((c for c in columns.values() if c not in row), None)
    if missing is not None:
        has = quote(", ".join(map(str, row)))
        raise RowError(
            "a column is missing", f"{where}: no column {quote(missing)} (there are {has})", "Correct --columns."
        )
    own = next(
        (name for name, c in columns.items() if name != c and name in row and name not in columns.values()), None
    )
    if own is not None and row[own] not in (None, "", [], {}):
        what = f"{where}: the row has a key {quote(own)} of its own beside --columns {own}={columns[own]}"
        raise RowError("two of a name", what, f"Map that one too, or leave it out: --ignore-keys {own}.")
    rest = {k: v for k, v in row.items() if k not in columns.values() and k not in columns}
    return {name: row[column] for name, column in columns.items()} | rest


def _pair(names: Any) -> tuple[str, str | None] | None:
    """The keys of the question and of the answer, which a row of a test set may lack."""
    question = next((k for k in QUESTIONS if k in names), None)
    answer = next((k for k in ANSWERS if k in names), None)
    if question is not None and answer is not None:
        return question, answer
    both = next((pair for pair in PAIRS if pair[0] in names and pair[1] in names), None)
    return both or (None if question is None else (question, None))


def _messages(row: dict, where: str, ignored: frozenset[str]) -> tuple[list[Message], str, list[str]]:
    """The messages of one row, the name of its shape, and the keys that were not read."""
    held = [k for k, v in row.items() if v is not None]  # a table of several shapes has null for the keys of the others
    chat = next((k for k in CHATS if k in held), None)
    if chat is not None:
        messages, shape, lost = _chat(row, chat, where, ignored)
        return messages, shape, lost + unread(row, {chat, "system", *FUNCTIONS}, ignored)
    # a text whose label is null is a row without its answer, and no raw text
    pair = _pair(held) or (None if TEXT in held and "label" not in row else _pair(row))
    if pair is not None and pair[1] is None:
        pair = pair[0], next((k for k in ANSWERS if k in row), None)
    if pair is not None:
        shape = "alpaca" if "instruction" in row and pair[0] in QUESTIONS else "/".join(filter(None, pair))
        turn, read = _question_and_answer(row, pair, where)
        thought = next((k for k in THOUGHTS if row.get(k)), None)
        if thought is not None and pair[1] is not None:
            turn[-1] |= _with_thought(turn[-1], _text(row, thought, where), where)
            read.add(thought)
        lost = unread(row, {*read, "system", "history", *FUNCTIONS}, ignored)
        return _system(row, where) + _history(row, where) + turn, shape, lost
    if TEXT in row:
        return [{"role": TEXT, "content": _text(row, TEXT, where)}], TEXT, unread(row, {TEXT}, ignored, NOTES_OF_TEXT)
    raise RowError(
        "unknown shape",
        f"{where}: keys {quote(', '.join(map(str, row)))} are of no known shape",
        "Known are messages, conversations, instruction/output, prompt/response, question/answer, content/summary, "
        "text/label and text; --columns prompt=NAME,response=NAME names others.",
    )


def _question_and_answer(row: dict, pair: tuple[str, str | None], where: str) -> tuple[list[Message], set[str]]:
    """One turn, its question of all keys that are one, its answer if it has one, and the keys that were read."""
    asks = [k for k in QUESTIONS if k in row] if pair[0] in QUESTIONS else [pair[0]]
    texts = [_text(row, k, where, "" if k != pair[0] else None) for k in asks]
    question = "\n".join(text for text in texts if text)
    if pair[1] is None:
        return [{"role": "user", "content": question}], set(asks)
    return _turn(question, _answer(row, pair[1], where)), {*asks, pair[1]}


def _chat(row: dict, key: str, where: str, ignored: frozenset[str]) -> tuple[list[Message], str, list[str]]:
    turns = _parsed(row[key])
    if not isinstance(turns, list) or not turns or not all(isinstance(t, dict) for t in turns):
        raise RowError("no messages", f"{where}: {key} is not a list of messages", "Write it as [{...}, ...].")
    sharegpt = "from" in turns[0]
    role_key, text_key = ("from", "value") if sharegpt else ("role", "content")
    messages, lost = _system(row, where), []
    for turn in turns:
        role = turn.get(role_key)
        if role is None:
            what = f"{where}: a message has the keys {quote(', '.join(map(str, turn)))}"
            raise RowError("unknown role", what, "A message is a role and a content, or from and value.")
        if not isinstance(role, str) or role not in ROLES:
            what = f"{where}: a message has {role_key} {quote(str(role))}"
            raise RowError("unknown role", what, f"Known are {', '.join(ROLES)}.")
        thought = next((k for k in THOUGHTS if k not in ignored and turn.get(k)), None)
        message: Message = {"role": ROLES[role]}
        if role in CALL_ROLES:
            call = None
            message |= _calls_of_text(turn, text_key, where)
        else:
            keys = CALLS if ROLES[role] == "assistant" else ()
            call = next((k for k in keys if turn.get(k) and k not in ignored), None)
            message["content"] = _text(turn, text_key, where, None if call is None else "")
            message |= _calls(turn[call], call, where) if call is not None else {}
        if thought is not None:
            message |= _with_thought(message, _text(turn, thought, where), where)
        trained = is_trained(turn, ROLES[role] == "assistant", where, ignored)
        if trained is not None:
            message["loss"] = trained
        read = {role_key, text_key, *LOSSES, *filter(None, (thought, call))}
        read |= {"name", "tool_call_id"} if ROLES[role] == "tool" else set()
        lost += [f"{OF_MESSAGE}{k}" for k in unread(turn, read, ignored, NOTES_OF_MESSAGES)]
        _add(messages, message, role in CALL_ROLES)
    return messages, "sharegpt" if sharegpt else "messages", lost


def _add(messages: list[Message], message: Message, calls_alone: bool) -> None:
    """Take in a message; calls that are turns of their own belong to the assistant's turn before them."""
    before = messages[-1] if messages else {}
    one = calls_alone and before.get("role") == "assistant" and before.get("loss") == message.get("loss")
    if one and not message["content"]:
        before["calls"] = before.get("calls", []) + message["calls"]
    else:
        messages.append(message)


def _functions(row: dict, where: str) -> list[Message]:
    """The functions of a row as a first message."""
    held = [k for k in FUNCTIONS if row.get(k)]
    if not held:
        return []
    if held[1:]:
        raise RowError("two of a name", f"{where}: the row has {' and '.join(held)}", "Keep one of them.")
    key = held[0]
    try:
        tools = read_tools(row[key])
    except ValueError as error:
        hint = f"Write them as OpenAI does; --ignore-keys {key} leaves them out."
        raise RowError("broken tools", f"{where}: {key}: {error}", hint) from None
    return [{"role": "tools", "content": as_json(tools)}] if tools else []


def _calls(value: Any, key: str, where: str) -> Message:
    try:
        return {"calls": read_calls(value)}
    except ValueError as error:
        hint = 'A call is a name and arguments: {"name": "f", "arguments": {"x": 1}}.'
        raise RowError("broken call", f"{where}: {key}: {error}", hint) from None


def _calls_of_text(turn: dict, key: str, where: str) -> Message:
    """A turn whose text is the JSON of calls, perhaps behind a thought."""
    value, thought, mark = turn.get(key), "", ""
    if isinstance(value, str):
        thought, mark, rest = _text(turn, key, where).rpartition("</think>")
        value = rest
    message: Message = {"content": "", **_calls(value, key, where)}
    if not mark:
        return message
    thought = thought.lstrip().removeprefix("<think>").strip("\n")
    return message | {"content": f"<think>\n{thought}\n</think>\n\n", "thought": True}


def _with_thought(message: Message, thought: str, where: str) -> Message:
    """A message with its thought in front, as the templates of models that think read it."""
    if message["role"] != "assistant":
        raise RowError("a thought of another role", f"{where}: the {message['role']} has a thought", "Take it out.")
    if "</think>" in message["content"]:
        what = f"{where}: a thought stands in its own key and in the content"
        raise RowError("two thoughts", what, "Keep one of them.")
    if not message["content"].strip() and not message.get("calls"):
        what = f"{where}: a message has a thought, and its answer is empty"
        raise RowError("empty answer", what, "Write the answer, or take the row out.")
    thought = thought.strip("\n")
    return {"content": f"<think>\n{thought}\n</think>\n\n{message['content']}", "thought": True}


def _turns(
    turns: list[dict], where: str, columns: dict[str, str], ignored: frozenset[str]
) -> tuple[list[Message], list[str]]:
    """Qianfan: a dialogue is a list of turns, each a prompt and its answers; and the keys that were not read."""
    messages: list[Message] = []
    lost: list[str] = []
    for turn in turns:
        row = {k: v for k, v in turn.items() if k not in ignored}
        row = _rename(row, where, columns) if columns else row
        pair = _pair(row)
        if pair is None or (pair[1] is None and turn is not turns[-1]):
            what = f"{where}: a turn has the keys {quote(', '.join(map(str, row)))}"
            raise RowError("unknown shape", what, "A turn is a prompt and a response.")
        lost += unread(row, {*filter(None, pair), *QUESTIONS, *(() if messages else ("system",))}, ignored)
        messages += _system(row, where) if not messages else []
        messages += _question_and_answer(row, pair, where)[0]
    return messages, lost


def _history(row: dict, where: str) -> list[Message]:
    messages: list[Message] = []
    history = _parsed(row.get("history"))
    if history in (None, "", [], {}):
        return []
    for pair in history if isinstance(history, list) else [None]:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)):
            what = f"{where}: history is not a list of [question, answer] pairs"
            raise RowError("no history", what, "Write it as [[q, a], ...].")
        messages += _turn(*(_sound(t, "history", where) for t in pair))
    return messages


def _parsed(value: Any) -> Any:
    """A list that a sheet holds as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError):
            return parse_json(value)
    return value


def _system(row: dict, where: str) -> list[Message]:
    system = _text(row, "system", where, "")
    return [{"role": "system", "content": system}] if system else []


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _answer(row: dict, key: str, where: str) -> str:
    """The answer under a key: a text, the number of a class, or a list of one answer (Qianfan's in a list of one list)."""
    value = row[key]
    for _ in range(2):
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
            value = value[0]
    if isinstance(value, list) and len(value) > 1:
        what = f"{where}: {key} is a list of {len(value):,} answers"
        raise RowError("several answers", what, "Keep the one that shall be learnt, or make a row of each.")
    if key == "label" and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return _text({key: value}, key, where, "")


def _text(row: dict, key: str, where: str, default: str | None = None) -> str:
    """The text under a key: a string, or a list of parts of type text."""
    value = row.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, list) and all(_is_text_part(p) for p in value):
        texts = [p.get("text") for p in value]
        value = "".join(texts) if all(isinstance(t, str) for t in texts) else value
    parts = [part for part in value if isinstance(part, dict)] if isinstance(value, list) else []
    other = next((part["type"] for part in parts if part.get("type", "text") != "text"), None)
    if other is not None:
        kind = quote(str(other))
        what = f"{where}: {key} is {quote(json.dumps(value))}, with a part of type {kind}"
        raise RowError(f"a part of type {kind}", what, "Only text can be trained: take the row out, or the part.")
    if not isinstance(value, str):
        raise RowError("no text", f"{where}: {key} is {quote(json.dumps(value))}", "A text belongs there.")
    return _sound(value, key, where)


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and not unread(part, {"type", "text"}, frozenset())


def _sound(text: str, key: str, where: str) -> str:
    """The text; RowError if it cannot be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        what = f"{where}: {key} holds half a surrogate pair"
        raise RowError("half a character", what, "Correct the \\ud... escape there.") from None
    return text
