"""What a chat template is: a way to write messages as segments.

A segment is a piece of text with two facts: whether it is one of the template's own special tokens, and which message it
is the answer of, if any. Text that a user or a file supplies is never a special segment, so it can never become a special
token. The same segments serve training, evaluation and chat. A folder's own Jinja template tells which of the built-in
formats is used (own_template.py); what it writes is never trained itself.
"""

from dataclasses import dataclass
from typing import NamedTuple

from ..errors import ModelError
from ..files.model_folder import Folder, ModelFolder
from ..files.regular import read_file

MAX_TEMPLATE = 4 << 20  # bytes


class Segment(NamedTuple):
    """A piece of a rendered chat; `answer` is the number of the message whose trained answer it is, or None."""

    text: str
    special: bool = False
    answer: int | None = None


Message = dict  # {"role": "system" | "user" | "assistant", "content": str, and perhaps "loss": bool, "thought": True where it begins with one}


@dataclass(frozen=True)
class Template:
    """How one generation writes a chat. stops: the special tokens that end an assistant's turn."""

    name: str
    default_system: str | None = None

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

    def segments(self, messages: list[Message], prompt: bool = False, thinking: bool = False) -> list[Segment]:
        """The segments of a chat; `prompt` opens the assistant's next turn, `thinking` lets an optional thinker think.

        Raises DataError for what the format cannot say.
        """
        raise NotImplementedError

    def answer_of(self, text: str) -> str:
        """What the assistant said, from the text that it generated after a prompt."""
        return text


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
