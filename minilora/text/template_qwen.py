"""Chats of the Qwen generations (ChatML), and of DeepSeek-R1-Distill.

Answers before the last question are written as the official templates write them: without their thoughts, and for Qwen3
without the empty think block that chat puts in front of a new answer.

Which generation a folder is of, and its default system prompt, is told by its Jinja template: what it writes, or what it is
known to write (own_template.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..errors import DataError, ModelError
from ..files.model_folder import ModelFolder
from .template import ROLES, Message, Segment, Template, ToolFormat, split_tools
from .tools_qwen import Hermes, Tags


@dataclass(frozen=True)
class ChatML(Template):
    """`<|im_start|>role`, a newline, the content, `<|im_end|>` and a newline.

    thinking: "never" (Qwen1.5 to 2.5, 2507-Instruct), "optional" (Qwen3: an empty think block turns it off), "always" (QwQ,
    2507-Thinking, R1-Distill: the prompt opens the think block), or "either" (Qwen3.5 and later: the prompt opens the block or
    has it whole and empty, every answer after the last question has one, and texts are stripped).
    """

    thinking: Literal["never", "optional", "always", "either"] = "never"
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
    def opens_thoughts(self) -> bool:
        return self.thinking == "always"

    @property
    def apart(self) -> bool:
        return self.name == "qwen"  # Qwen-1's own code cuts role and content by themselves

    def tool_formats(self, written: str) -> Sequence[ToolFormat]:
        return () if self.deepseek or self.apart else (Hermes(), Tags(), Tags(python=False))

    def _segments(self, messages: list[Message], prompt: bool, thinking: bool) -> list[Segment]:
        tools, turns = split_tools(messages)
        if self.default_system is not None and _role(turns, 0) != "system":
            turns = [{"role": "system", "content": self.default_system}, *turns]
        if self.thinking == "either":
            turns = [m | {"content": m["content"].strip()} for m in turns]
        shift = len(turns) - len(messages)
        last_user = max((i for i, m in enumerate(turns) if m["role"] == "user" and not _is_result(m)), default=-1)
        result = [Segment("<｜begin▁of▁sentence｜>", special=True)] if self.deepseek else []
        system = turns[0]["content"] if tools and _role(turns, 0) == "system" else None
        if tools:
            result += [*self._open("system"), *self.tools.preface(tools, system), *self._close()]
        for i, message in enumerate(turns):
            role = message["role"]
            if i == 0 and system is not None:
                continue
            if role == "assistant":
                result += self._open("assistant")
                result += self._answer(message, i - shift, i > last_user, i == len(turns) - 1)
            elif role in ("system", "user"):
                result += [*self._open(role), Segment(message["content"]), *self._close()]
            elif role == "tool":
                result += self._open("user") if _role(turns, i - 1) != "tool" else [Segment("\n")]
                result += self.tools.result(message["content"])
                result += self._close() if _role(turns, i + 1) != "tool" else []
            else:
                raise DataError(f"a message has the role {str(role)[:40]!r}", f"Roles are {', '.join(ROLES)}.")
        if prompt:
            result += self._open("assistant")
            if self.thinking == "always" or (self.thinking == "either" and thinking):
                result += [Segment("<think>", special=True), Segment("\n")]
            elif self.thinking in ("optional", "either") and not thinking:
                result += _empty_thought()
        return result

    def _open(self, role: str) -> list[Segment]:
        if not self.deepseek:
            return [Segment("<|im_start|>", special=True), Segment(f"{role}\n")]
        mark = {"user": "<｜User｜>", "assistant": "<｜Assistant｜>"}
        return [Segment(mark[role], special=True)] if role in mark else []

    def _close(self) -> list[Segment]:
        return [] if self.deepseek else [Segment("<|im_end|>", special=True), Segment("\n")]

    def _answer(self, message: Message, number: int, current: bool, final: bool) -> list[Segment]:
        """An assistant's message: what the prompt would already hold is masked, the rest and the stop token are trained.

        Thoughts of turns before the last question are dropped, as the templates do.
        """
        content, calls = message["content"], message.get("calls")
        thought, mark, _ = content.partition("</think>")
        thought = thought.split("<think>")[-1].strip(None if self.thinking == "either" else "\n")
        said = content.split("</think>")[-1].lstrip("\n") if mark else content
        if self.thinking == "never" and not self.deepseek:
            said = content  # these templates know no thoughts
        masked, trained = [], [Segment(said, answer=number)]
        if current and self.thinking != "never":
            if mark and (thought or self.thinking == "always"):
                trained = [Segment(f"{thought}\n", answer=number), *_close_thought(said, number)]
                opening = [Segment("<think>", special=True), Segment("\n")]
                if self.thinking in ("always", "either"):
                    masked = opening
                else:
                    trained = [s._replace(answer=number) for s in opening] + trained
            elif self.thinking == "always":
                masked = [Segment("<think>", special=True), Segment("\n")]
                trained = [Segment("\n", answer=number), *_close_thought(said, number)]
            elif (
                final or self.thinking == "either"
            ):  # of Qwen3's several messages in a row the last one alone gets the empty block
                masked, trained = _empty_thought(), [Segment(said.lstrip("\n"), answer=number)]
        if calls:
            trained += [s._replace(answer=number) for s in self.tools.calls(calls, said)]
        end = [Segment(self.stop, special=True, answer=number)]
        return masked + trained + end + ([] if self.deepseek else [Segment("\n")])


def _role(turns: list[Message], i: int) -> str | None:
    return turns[i]["role"] if 0 <= i < len(turns) else None


def _is_result(message: Message) -> bool:
    """Whether a user's text is the result of a call, as the templates of thinkers tell."""
    return message["content"].startswith("<tool_response>") and message["content"].endswith("</tool_response>")


def _empty_thought() -> list[Segment]:
    return [Segment("<think>", special=True), Segment("\n\n"), Segment("</think>", special=True), Segment("\n\n")]


def _close_thought(said: str, number: int) -> list[Segment]:
    return [Segment("</think>", special=True, answer=number), Segment(f"\n\n{said}", answer=number)]


HELPFUL = "You are a helpful assistant."
QWEN25 = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
QWEN1 = ChatML("qwen", HELPFUL)
QWEN3 = ChatML("qwen3", None, "optional", tools=Hermes())
QWEN35 = ChatML("qwen3.5", None, "either", tools=Tags())
DEEPSEEK_R1 = ChatML("deepseek-r1", None, "always", True, "<｜end▁of▁sentence｜>")


def qwen_formats(
    folder: ModelFolder, jinja: str | None, specials: set[str], model_type: str | None, system: str | None
) -> list[ChatML]:
    """The formats that a folder with these tokens can have, the likeliest first; ModelError if there is none.

    jinja: the text of its own chat template; system: the default system prompt that this writes.
    """
    if "<｜Assistant｜>" in specials:
        return [DEEPSEEK_R1 if "<think>" in specials else replace(DEEPSEEK_R1, thinking="never")]
    if "<|im_start|>" not in specials:
        raise ModelError(
            f"{folder}: the tokenizer has neither <|im_start|> nor <|assistant|>",
            "Only the chat formats of Qwen and GLM are known.",
        )
    if model_type == "qwen":
        return [QWEN1]
    if jinja is None:
        known = {"qwen3": QWEN3, "qwen3_next": ChatML("chatml", tools=Hermes())}
        known |= dict.fromkeys(("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), QWEN35)
        return [known.get(str(model_type), ChatML("qwen2", HELPFUL))]
    plain = ChatML("qwen2.5" if system and "Qwen" in system else "chatml", system)
    if "<think>" not in specials:
        return [plain]
    thinking = [
        ChatML("qwen3", system, "optional"),
        replace(QWEN35, tools=ToolFormat()),
        ChatML("qwen-thinking", system, "always"),
    ]
    return [*thinking, plain] if "enable_thinking" in jinja else [plain, *thinking]
