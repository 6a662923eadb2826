"""Rows of preferences: a question and two answers to it, of which one was chosen.

{prompt or instruction ..., chosen: text, rejected: text}       {conversations, chosen: {from, value}, rejected: ...}
{messages, chosen: {role, content}, ...}                        {prompt: [messages], chosen: [messages], ...}
{chosen: [messages], rejected: [messages]}, equal but for their ends
"""

from typing import Any

from ..config import PLAIN, DataConfig
from ..errors import RowError, quote
from .shapes import ANSWERS, CHATS, Row, to_messages

SIDES = ("chosen", "rejected")


def to_pair(value: Any, where: str, settings: DataConfig = PLAIN) -> tuple[Row, Row]:
    """The conversations that end with the chosen and with the rejected answer; only these answers are trained.

    RowError if a row has no two answers, or they are to different questions.
    """
    absent = [key for key in SIDES if not isinstance(value, dict) or value.get(key) in (None, "", [], {})]
    if absent:
        hint = "A row of preferences has a question, chosen and rejected; --objective sft trains answers as they are."
        raise RowError("no pair", f"{where}: there is no {quote(absent[0])}", hint)
    chosen, rejected = (_last_alone(to_messages(_side(value, key, where), where, settings)) for key in SIDES)
    if chosen.messages[:-1] != rejected.messages[:-1]:
        hint = "Both belong to one question: let them differ in the last answer alone."
        raise RowError("two questions", f"{where}: chosen and rejected do not answer the same", hint)
    if all(chosen.messages[-1].get(k) == rejected.messages[-1].get(k) for k in ("content", "calls")):
        raise RowError("equal answers", f"{where}: chosen and rejected are the same", "Take the row out.")
    return chosen, rejected


def _side(value: dict, key: str, where: str) -> dict:
    """A row as it would be if it had one answer."""
    rest, answer = {k: v for k, v in value.items() if k not in SIDES}, value[key]
    held = next((k for k in ANSWERS if rest.get(k)), None)
    if held is not None:
        hint = f"--ignore-keys {held} leaves it out."
        raise RowError("three answers", f"{where}: beside chosen and rejected there is {quote(held)}", hint)
    chat = next((k for k in (*CHATS, "prompt") if isinstance(rest.get(k), list)), None)
    before = rest.pop(chat) if chat else []
    turns = answer if isinstance(answer, list) else [answer] if isinstance(answer, dict) else None
    if turns is None and not chat:  # a text: prompt, instruction ... are read as they are beside an answer
        return rest | {"output": answer}
    turns = turns or [_message("assistant", answer, like=before)]
    prompt = rest.get("prompt")
    if not before and isinstance(prompt, str):
        first = turns[0] if isinstance(turns[0], dict) else {}
        if first.get("role", first.get("from")) in ("assistant", "gpt"):
            before = [_message("user", rest.pop("prompt"), like=turns)]
        elif first.get("content", first.get("value")) == prompt:  # the conversation has it, too
            del rest["prompt"]
    return rest | {"messages": [*before, *turns]}


def _message(role: str, text: Any, like: list) -> dict[str, Any]:
    """A message in the spelling of others."""
    if like and isinstance(like[0], dict) and "from" in like[0]:
        return {"from": {"user": "human", "assistant": "gpt"}[role], "value": text}
    return {"role": role, "content": text}


def _last_alone(row: Row) -> Row:
    """The row, of whose answers the last alone is trained; RowError if it does not end with one."""
    if not row.messages or row.messages[-1]["role"] != "assistant":
        raise RowError(
            "no answer", f"{row.where}: chosen and rejected do not end with an answer", "Let the assistant speak last."
        )
    before = [m | {"loss": False} if m["role"] == "assistant" else m for m in row.messages[:-1]]
    return row._replace(messages=[*before, row.messages[-1]])
