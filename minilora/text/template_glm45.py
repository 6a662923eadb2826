"""Chats of GLM-4.5 and 4.6: an answer begins with its reasoning, which is empty if /nothink follows the question.

A conversation has reasoning if an answer to its last question has; reasoning before that question is left out. The
reasoning block is trained if the model writes it: with /nothink it is part of the prompt, and empty.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import DataError
from .template import ROLES, Message, Segment, Template, ToolFormat, has_thought, split_tools
from .tools_glm import ArgumentTags


@dataclass(frozen=True)
class ReasoningTurns(Template):
    """Role tokens as in GLM-4, a reasoning block in each answer."""

    @property
    def stops(self) -> tuple[str, ...]:
        return ("<|user|>", "<|endoftext|>", "<|observation|>")

    @property
    def thinks(self) -> bool:
        return True

    def tool_formats(self, written: str) -> Sequence[ToolFormat]:
        return (ArgumentTags(),)

    def _segments(self, messages: list[Message], prompt: bool, thinking: bool) -> list[Segment]:
        result = [Segment("[gMASK]", special=True), Segment("<sop>", special=True)]
        last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
        thinking = thinking or (not prompt and has_thought(messages))
        tools, turns = split_tools(messages)
        if tools:
            result += [Segment("<|system|>", special=True), Segment("\n"), *self.tools.preface(tools, None)]
        before, role = None, ""
        for i, message in enumerate(turns, len(messages) - len(turns)):
            last, role, content, calls = role, message["role"], message["content"], message.get("calls", [])
            if role not in ROLES:
                raise DataError(f"a message has the role {str(role)[:40]!r}", f"Roles are {', '.join(ROLES)}.")
            mark = "<|observation|>" if role == "tool" else f"<|{role}|>"
            opens = [Segment(mark, special=True, answer=before if role in ("user", "tool") else None)]
            before = i if role == "assistant" else None
            if role == "assistant":
                result += opens + self._answer(content, i, i > last_user, thinking)
                result += [s._replace(answer=i) for s in self.tools.calls(calls, content)] if calls else []
            elif role == "tool":
                result += [*(opens if last != "tool" else []), Segment("\n"), *self.tools.result(content)]
            else:
                quiet = role == "user" and not thinking and not content.endswith("/nothink")
                result += [*opens, Segment("\n"), Segment(content), *([Segment("/nothink", own=True)] * quiet)]
        if prompt:
            result.append(Segment("<|assistant|>", special=True))
            result += [] if thinking else _thought("")
        elif before is not None:
            end = "<|observation|>" if turns[-1].get("calls") else "<|user|>"
            result.append(Segment(end, special=True, answer=before))
        return result

    def _answer(self, content: str, number: int, current: bool, thinking: bool) -> list[Segment]:
        """An answer; its reasoning is trained if it is not part of the prompt."""
        thought, mark, _ = content.partition("</think>")
        said = content.split("</think>")[-1].strip()
        thought = thought.split("<think>")[-1].strip() if mark and current else ""
        trained = number if current and thinking else None
        return [s._replace(answer=trained) for s in _thought(thought)] + [
            Segment(f"\n{said}" * bool(said), answer=number)
        ]

    def answer_of(self, text: str) -> str:
        return text.lstrip(" \n")


def _thought(text: str) -> list[Segment]:
    return [Segment("\n<think>", own=True), Segment(text), Segment("</think>", own=True)]


GLM45 = ReasoningTurns("glm-4.5", tools=ArgumentTags())
