"""Chat templates of the Qwen generations, rendered segment by segment; no Jinja is run.

A segment is a piece of text with two facts: whether it is one of the template's own special tokens, and which message it
is the answer of, if any. Text that a user or a file supplies is never a special segment, so it can never become a special
token. The same segments serve training, evaluation and chat.

Answers before the last question are written as the official templates write them: without their thoughts, and for Qwen3
without the empty think block that chat puts in front of a new answer.

Which generation a folder is of is read from its Jinja template as a string: the default system prompt stands there
verbatim, and the words `enable_thinking` and `<think>` tell how the model thinks.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from .checkpoint import read_json
from .errors import DataError, ModelError


class Segment(NamedTuple):
    """A piece of a rendered chat; `answer` is the number of the message whose trained answer it is, or None."""

    text: str
    special: bool = False
    answer: int | None = None


Message = dict  # {"role": "system" | "user" | "assistant", "content": str, and perhaps "loss": bool}


@dataclass(frozen=True)
class Template:
    """How one generation writes a chat.

    thinking: "never" (Qwen1.5 to 2.5, 2507-Instruct), "optional" (Qwen3: an empty think block turns it off), or "always"
    (QwQ, 2507-Thinking, R1-Distill: the prompt opens the think block).
    """

    name: str
    default_system: str | None
    thinking: Literal["never", "optional", "always"]
    deepseek: bool = False
    stop: str = "<|im_end|>"

    def segments(self, messages: list[Message], prompt: bool = False, thinking: bool = False) -> list[Segment]:
        """The segments of a chat; `prompt` opens the assistant's next turn, `thinking` lets an optional thinker think.

        Raises DataError for a role that no template has.
        """
        if self.default_system is not None and (not messages or messages[0]["role"] != "system"):
            messages = [{"role": "system", "content": self.default_system}, *messages]
            shift = 1
        else:
            shift = 0
        last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
        result = [Segment("<｜begin▁of▁sentence｜>", special=True)] if self.deepseek else []
        for i, message in enumerate(messages):
            role, content = message["role"], message["content"]
            if role == "assistant":
                result += self._open("assistant")
                result += self._answer(content, i - shift, current=i > last_user)
            elif role in ("system", "user"):
                result += self._open(role)
                result.append(Segment(content))
                result += [] if self.deepseek else [Segment("<|im_end|>", special=True), Segment("\n")]
            else:
                raise DataError(f"a message has the role {str(role)[:40]!r}", "Roles are system, user and assistant.")
        if prompt:
            result += self._open("assistant")
            if self.thinking == "always":
                result += [Segment("<think>", special=True), Segment("\n")]
            elif self.thinking == "optional" and not thinking:
                result += _empty_thought()
        return result

    def _open(self, role: str) -> list[Segment]:
        if not self.deepseek:
            return [Segment("<|im_start|>", special=True), Segment(f"{role}\n")]
        mark = {"user": "<｜User｜>", "assistant": "<｜Assistant｜>"}
        return [Segment(mark[role], special=True)] if role in mark else []

    def _answer(self, content: str, number: int, current: bool) -> list[Segment]:
        """An assistant's message: what the prompt would already hold is masked, the rest and the stop token are trained.

        Thoughts of turns before the last question are dropped, as the templates do.
        """
        thought, mark, said = content.rpartition("</think>")
        thought = thought.split("<think>")[-1].strip("\n")
        said = said.lstrip("\n") if mark else content
        if self.thinking == "never" and not self.deepseek:
            said = content  # these templates know no thoughts
        masked, trained = [], [Segment(said, answer=number)]
        if current and self.thinking != "never":
            if mark and (thought or self.thinking == "always"):
                trained = [Segment(f"{thought}\n", answer=number), *_close_thought(said, number)]
                opening = [Segment("<think>", special=True), Segment("\n")]
                if self.thinking == "always":
                    masked = opening
                else:
                    trained = [s._replace(answer=number) for s in opening] + trained
            elif self.thinking == "always":
                masked = [Segment("<think>", special=True), Segment("\n")]
                trained = [Segment("\n", answer=number), *_close_thought(said, number)]
            else:
                masked = _empty_thought()
        end = [Segment(self.stop, special=True, answer=number)]
        return masked + trained + end + ([] if self.deepseek else [Segment("\n")])


def _empty_thought() -> list[Segment]:
    return [
        Segment("<think>", special=True),
        Segment("\n\n"),
        Segment("</think>", special=True),
        Segment("\n\n"),
    ]


def _close_thought(said: str, number: int) -> list[Segment]:
    return [Segment("</think>", special=True, answer=number), Segment(f"\n\n{said}", answer=number)]


def template_of(folder: Path, special_tokens: set[str], model_type: str | None) -> Template:
    """The Template of a checkpoint folder, told from its Jinja text, or else from its tokens and its model_type."""
    jinja = _jinja_text(folder)
    if "<｜Assistant｜>" in special_tokens:
        return Template(
            "deepseek-r1",
            None,
            "always" if "<think>" in special_tokens else "never",
            True,
            "<｜end▁of▁sentence｜>",
        )
    if "<|im_start|>" not in special_tokens:
        raise ModelError(
            f"{folder}: the tokenizer has no <|im_start|> token", "Only the chat formats of Qwen are known."
        )
    if jinja is None:
        if model_type == "qwen3":
            return Template("qwen3", None, "optional")
        return Template("qwen2", "You are a helpful assistant.", "never")
    default = re.search(r"<\|im_start\|>system(?:\n|\\n)((?:(?!{{|{%)[^<>'\"])+?)<\|im_end\|>", jinja)
    system = default[1].replace("\\\\", "\\") if default else None
    if "enable_thinking" in jinja:
        return Template("qwen3", system, "optional")
    if re.search(r"<\|im_start\|>assistant(?:\n|\\n)<think>", jinja):
        return Template("qwen-thinking", system, "always")
    return Template("qwen2.5" if system and "Qwen" in system else "chatml", system, "never")


def _jinja_text(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if not (folder / "tokenizer_config.json").is_file():
        return None
    text = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(text, list):  # several named templates
        text = next((t.get("template") for t in text if isinstance(t, dict) and t.get("name") == "default"), None)
    return text if isinstance(text, str) else None
