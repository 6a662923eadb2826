"""Chats of a model without a chat format (GPT-2): <|endoftext|> ends each text, and nothing marks the roles.

    question <|endoftext|> answer <|endoftext|>

GPT2Tokenizer of transformers 4.40 writes chats this way if a folder has no template; DialoGPT was trained this way.
"""

from dataclasses import dataclass

from ..errors import DataError
from .template import Message, Segment, Template

END = "<|endoftext|>"


@dataclass(frozen=True)
class Plain(Template):
    """Texts one after the other, each followed by <|endoftext|>."""

    @property
    def stops(self) -> tuple[str, ...]:
        return (END,)

    def _segments(self, messages: list[Message], prompt: bool, thinking: bool) -> list[Segment]:
        result = []
        for i, message in enumerate(messages):
            if message["role"] not in ("system", "user", "assistant"):
                what = f"a message has the role {str(message['role'])[:40]!r}"
                raise DataError(what, "Roles are system, user and assistant.")
            answer = i if message["role"] == "assistant" else None
            result += [Segment(message["content"], answer=answer), Segment(END, special=True, answer=answer)]
        return result or [Segment(END, special=True)]


PLAIN = Plain("plain")
