"""What a chat template is: a way to write messages as segments.

A segment is a piece of text with two facts: whether it is one of the template's own special tokens, and which message it
is the answer of, if any. Text that a user or a file supplies is never a special segment, so it can never become a special
token. The same segments serve training, evaluation and chat. A folder's own Jinja template tells which of the built-in
formats is used (own_template.py); what it writes is never trained itself.

A message is {"role": "system" | "user" | "assistant" | "tool", "content": str}, and perhaps "loss": bool, "thought": True where
it begins with one, and of an assistant "calls": [{"name": str, "arguments": dict}]. The tools that it may call are in a first
message of the role "tools", as the JSON text of a list.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from ..errors import DataError, ModelError
from ..files.model_folder import Folder, ModelFolder
from ..files.regular import read_file

MAX_TEMPLATE = 4 << 20  # bytes


class Segment(NamedTuple):
    """A piece of a rendered chat; `answer` is the number of the message whose trained answer it is, or None.

    own: the template's words, in which the names of tokens (<tool_call>) are these tokens where the tokenizer has them.
    """

    text: str
    special: bool = False
    answer: int | None = None
    own: bool = False


ROLES = ("system", "user", "assistant", "tool")
Message = dict
Call = dict  # {"name": str, "arguments": dict}


@dataclass(frozen=True)
class ToolFormat:
    """How one generation writes the functions that may be called, calls, and their results; this class itself writes none."""

    marks: ClassVar[tuple[str, ...]] = ()  # the tokens that stand in calls

    def preface(self, tools: list[dict], system: str | None) -> list[Segment]:
        """The text of the system's turn, which tells of the functions."""
        raise NotImplementedError

    def calls(self, calls: list[Call], said: str) -> list[Segment]:
        """The calls of a turn, behind what else is said in it."""
        raise NotImplementedError

    def result(self, text: str) -> list[Segment]:
        """What a function returned."""
        return [Segment("<tool_response>\n", own=True), Segment(text), Segment("\n</tool_response>", own=True)]

    def start(self, text: str) -> int:
        """How much of a text that is being generated stands before its calls for certain."""
        mark = self.marks[0]
        halves = (len(text) - n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n]))
        found = text.find(mark)
        return len(text[: found if found >= 0 else next(halves, len(text))].rstrip("\n"))

    def read(self, text: str, tools: list[dict]) -> tuple[str, list[Call]]:
        """What was said beside the calls, and the calls, of a text that an assistant generated; no call if one of them is broken."""
        raise NotImplementedError

    def variables(self, messages: Sequence[Message]) -> dict[str, Any]:
        """What a Jinja template is given of a conversation: its tools and messages as OpenAI writes them."""
        tools, turns = split_tools(messages)
        told = [{key: m[key] for key in ("role", "content")} for m in turns]
        for message, shown in zip(turns, told, strict=True):
            if message.get("calls"):
                shown["tool_calls"] = [{"type": "function", "function": dict(call)} for call in message["calls"]]
        return {"tools": tools or None, "messages": told}


@dataclass(frozen=True)
class Template:
    """How one generation writes a chat. stops: the special tokens that end an assistant's turn."""

    name: str
    default_system: str | None = None
    tools: ToolFormat = field(default=ToolFormat(), kw_only=True)

    @property
    def stops(self) -> tuple[str, ...]:
        raise NotImplementedError

    @property
    def apart(self) -> bool:
        """Whether each segment is cut into tokens by itself, and not together with its neighbours as one text."""
        return False

    @property
    def thinks(self) -> bool:
        """Whether the format has a place for an assistant's thought."""
        return False

    @property
    def opens_thoughts(self) -> bool:
        """Whether the prompt opens the assistant's thought, so that each trained answer begins with one."""
        return False

    @property
    def last_only(self) -> bool:
        """Whether only the last answer of a conversation can be trained: the others are part of its prompt."""
        return False

    def tool_formats(self, written: str) -> Sequence[ToolFormat]:
        """The ways in which a folder of this format may write tools, of which its template has `written` some."""
        return ()

    def segments(self, messages: list[Message], prompt: bool = False, thinking: bool = False) -> list[Segment]:
        """The segments of a chat; `prompt` opens the assistant's next turn, `thinking` lets an optional thinker think.

        Raises DataError for what the format cannot say.
        """
        if not self.tools.marks and any(m["role"] in ("tools", "tool") or m.get("calls") for m in messages):
            hint = "Take a model whose own chat template writes them, as those of Qwen2.5 to Qwen3.6 and of GLM-4 to GLM-4.7 do."
            raise DataError(f"tools cannot be written here in the chat format {self.name}", hint)
        return self._segments(messages, prompt, thinking)

    def _segments(self, messages: list[Message], prompt: bool, thinking: bool) -> list[Segment]:
        raise NotImplementedError

    def written(self, message: Message) -> str:
        """The text of an assistant's message, with its calls."""
        calls = message.get("calls")
        found = self.tools.calls(calls, message["content"]) if calls else []
        return message["content"] + "".join(s.text for s in found if not s.special)

    def answer_of(self, text: str) -> str:
        """What the assistant said, from the text that it generated after a prompt."""
        return text


def split_tools(messages: Sequence[Message]) -> tuple[list[dict], list[Message]]:
    """The functions of a conversation, and its other messages."""
    if messages and messages[0]["role"] == "tools":
        return json.loads(messages[0]["content"]), list(messages[1:])
    return [], list(messages)


def has_thought(messages: Sequence[Message]) -> bool:
    """Whether an answer to the last question has a thought, so that the assistant was let think."""
    last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    answers = (m["content"].partition("</think>") for m in messages[last + 1 :] if m["role"] == "assistant")
    return any(mark and thought.split("<think>")[-1].strip() for thought, mark, _ in answers)


def render_text(segments: list[Segment]) -> str:
    """The text of a rendered chat, as a Jinja template would write it."""
    return "".join(s.text for s in segments)


def jinja_text(folder: Folder) -> str | None:
    """The folder's own chat template, unread, if it has one: chat_template.jinja goes before tokenizer_config.json."""
    folder = ModelFolder.of(folder)
    if (folder / "chat_template.jinja").is_file():
        return read_file(folder / "chat_template.jinja", ModelError, MAX_TEMPLATE).decode("utf-8", "replace")
    text = folder.tokenizer_config.get("chat_template")
    if isinstance(text, list):  # several named templates
        text = next((t.get("template") for t in text if isinstance(t, dict) and t.get("name") == "default"), None)
    return text if isinstance(text, str) else None


def jinja_note(folder: ModelFolder) -> str | None:
    """What a user should know of chat templates in a folder that jinja_text does not give."""
    text, given = jinja_text(folder), folder.tokenizer_config.get("chat_template")
    if text is None and given is not None:
        return "tokenizer_config.json has chat templates, and none that is a text or is named default"
    if text is not None and isinstance(given, str) and given.strip() != text.strip():
        return "chat_template.jinja is used; tokenizer_config.json has another chat_template"
    return None
