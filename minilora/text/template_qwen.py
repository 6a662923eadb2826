"""Chats of the Qwen generations (ChatML), and of DeepSeek-R1-Distill.

Answers before the last question are written as the official templates write them: without their thoughts, and for Qwen3
without the empty think block that chat puts in front of a new answer.

Which generation a folder is of is read from its Jinja template: the default system prompt stands there verbatim, and the
words `enable_thinking` and `<think>` tell how the model thinks.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import DataError, ModelError
from .template import NEWLINE, Message, Segment, Template, jinja_text

STRING = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)  # of a Jinja expression, escapes as Python's
BLOCK = re.compile(r"\{[{%#].*?[}%#]\}", re.DOTALL)


@dataclass(frozen=True)
class ChatML(Template):
    """`<|im_start|>role`, a newline, the content, `<|im_end|>` and a newline.

    thinking: "never" (Qwen1.5 to 2.5, 2507-Instruct), "optional" (Qwen3: an empty think block turns it off), or "always"
    (QwQ, 2507-Thinking, R1-Distill: the prompt opens the think block).
    """

    thinking: Literal["never", "optional", "always"] = "never"
    deepseek: bool = False
    stop: str = "<|im_end|>"

    @property
    def stops(self) -> tuple[str, ...]:
        opens = ("<|im_start|>",) if self.name == "qwen" else ()
        return (self.stop, "<|endoftext|>", *opens)

    @property
    def thinks(self) -> bool:
        return self.thinking != "never" or self.deepseek

    @property
    def apart(self) -> bool:
        return self.name == "qwen"  # Qwen-1's own code cuts role and content by themselves

    def segments(self, messages: list[Message], prompt: bool = False, thinking: bool = False) -> list[Segment]:
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
                result += self._answer(content, i - shift, i > last_user, i == len(messages) - 1)
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

    def _answer(self, content: str, number: int, current: bool, final: bool) -> list[Segment]:
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
            elif final:  # of several messages in a row the last one alone gets the empty block
                masked, trained = _empty_thought(), [Segment(said.lstrip("\n"), answer=number)]
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


def default_system(jinja: str) -> str | None:
    """The system prompt that a template writes where a chat has none: it stands there verbatim, in a string or as plain text."""
    texts = [m[0][1:-1].encode("ascii", "backslashreplace").decode("unicode-escape") for m in STRING.finditer(jinja)]
    texts.append(BLOCK.sub("\0", jinja.replace("\r\n", "\n")))
    found = (re.search(r"<\|im_start\|>system\n([^\0]+?)<\|im_end\|>", text) for text in texts)
    return next((m[1] for m in found if m), None)


def qwen_template(folder: Path, special_tokens: set[str], model_type: str | None) -> ChatML:
    """The template of a folder, told from its Jinja text, or else from its tokens and its model_type."""
    jinja = jinja_text(folder)
    if "<｜Assistant｜>" in special_tokens:
        thinking = "always" if "<think>" in special_tokens else "never"
        return ChatML("deepseek-r1", None, thinking, True, "<｜end▁of▁sentence｜>")
    if "<|im_start|>" not in special_tokens:
        raise ModelError(
            f"{folder}: the tokenizer has neither <|im_start|> nor <|assistant|>",
            "Only the chat formats of Qwen and GLM are known.",
        )
    if model_type == "qwen":
        return ChatML("qwen", "You are a helpful assistant.")
    if jinja is None:
        if model_type == "qwen3":
            return ChatML("qwen3", None, "optional")
        return ChatML("qwen2", "You are a helpful assistant.")
    system = default_system(jinja)
    if "enable_thinking" in jinja:
        return ChatML("qwen3", system, "optional")
    if re.search(rf"<\|im_start\|>assistant{NEWLINE}<think>", jinja):
        return ChatML("qwen-thinking", system, "always")
    return ChatML("qwen2.5" if system and "Qwen" in system else "chatml", system)
