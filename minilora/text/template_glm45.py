"""Chats of GLM-4.5 to 4.7: an answer begins with its reasoning.

Reasoning before the last question is left out. The reasoning block is trained as far as the model writes it. In GLM-4.5 and 4.6
it is empty, and part of the prompt, if /nothink follows the question; a conversation has reasoning if an answer to its last
question has. GLM-4.7 writes no line ends beside its tokens: a prompt opens the block, or has its end alone where nothing is thought.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import DataError
from .template import ROLES, Message, Segment, Template, ToolFormat, has_thought, split_tools
from .tools_glm import ArgumentTags


@dataclass(frozen=True)
class ReasoningTurns(Template):
    """GLM-4.5's: role tokens as in GLM-4, a reasoning block in each answer. gap: what stands behind a token."""

    gap: str = "\n"

    @property
    def stops(self) -> tuple[str, ...]:
        return ("<|user|>", "<|endoftext|>", "<|observation|>")

    @property
    def thinks(self) -> bool:
        return True

    def tool_formats(self, written: str) -> Sequence[ToolFormat]:
        return (ArgumentTags(self.gap),)

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
                result += [*(opens if last != "tool" else []), Segment(self.gap), *self.tools.result(content)]
            else:
                quiet = role == "user" and not thinking and not content.endswith("/nothink")
                result += [*opens, Segment(self.gap), Segment(content), *(self._no_thought() * quiet)]
        if prompt:
            result += [Segment("<|assistant|>", special=True), *self._opening(thinking)]
        elif before is not None:
            end = "<|observation|>" if turns[-1].get("calls") else "<|user|>"
            result.append(Segment(end, special=True, answer=before))
        return result

    def _no_thought(self) -> list[Segment]:
        """What is put behind a question that is to be answered at once."""
        return [Segment("/nothink", own=True)]

    def _opening(self, thinking: bool) -> list[Segment]:
        """What a prompt has of the answer."""
        return [] if thinking else _thought("")

    def _answer(self, content: str, number: int, current: bool, thinking: bool) -> list[Segment]:
        """An answer; its reasoning is trained if it is not part of the prompt."""
        thought, said = _parts(content, current)
        block = [s._replace(answer=number if current and thinking else None) for s in _thought(thought)]
        return [*block, Segment(f"\n{said}" * bool(said), answer=number)]

    def answer_of(self, text: str) -> str:
        return text.lstrip(" \n")


class OpenedReasoning(ReasoningTurns):
    """GLM-4.7's: the prompt opens the reasoning block, or ends it."""

    def _no_thought(self) -> list[Segment]:
        return []

    def _opening(self, thinking: bool) -> list[Segment]:
        return [Segment("<think>" if thinking else "</think>", own=True)]

    def _answer(self, content: str, number: int, current: bool, thinking: bool) -> list[Segment]:
        thought, said = _parts(content, current)
        block = [Segment(thought, answer=number), Segment("</think>", answer=number, own=True)]
        return [*self._opening(bool(thought)), *(block if thought else []), Segment(said, answer=number)]


def _parts(content: str, current: bool) -> tuple[str, str]:
    """The reasoning of an answer, if it answers the last question, and what it says."""
    thought, mark, _ = content.partition("</think>")
    return thought.split("<think>")[-1].strip() if mark and current else "", content.split("</think>")[-1].strip()


def _thought(text: str) -> list[Segment]:
    return [Segment("\n<think>", own=True), Segment(text), Segment("</think>", own=True)]


GLM45 = ReasoningTurns("glm-4.5", tools=ArgumentTags())
GLM47 = OpenedReasoning("glm-4.7", tools=ArgumentTags(""), gap="")
