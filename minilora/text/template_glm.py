"""Chats of the GLM generations: rounds of plain text (ChatGLM-6B, ChatGLM2), and role tokens (ChatGLM3 and later).

Rounds. `[Round 1]`, the question after 问：, the answer after 答：. The whole history is one text; what is learnt is the last
answer alone, as the authors train it. ChatGLM-6B counts rounds from 0, leaves the marks out where there is one question, and
puts [gMASK] <sop> behind the prompt: all before <sop> sees each other, and <sop> is learnt too. ChatGLM2 puts [gMASK] sop in
front. Neither knows a system prompt; it is written as the first paragraph.

Roles. <|user|>, a newline, the content; the next role token ends a turn, so <|user|> is what an assistant learns to end its
turn with, and <|observation|> where it calls a function. Closing the last turn, ChatGLM3 takes </s> and GLM-4 <|user|>. The
newline after <|assistant|> is the assistant's to write, and is learnt.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from ..errors import DataError
from .template import ROLES, Message, Segment, Template, ToolFormat, split_tools
from .template_glm45 import GLM45, GLM47, ReasoningTurns
from .tools_glm import AVAILABLE, CallTurns


@dataclass(frozen=True)
class Rounds(Template):
    """ChatGLM-6B (`first` 0) and ChatGLM2 (`first` 1): gap is what stands between the lines of a round."""

    first: int = 0
    gap: str = "\n"
    end: str = "<eop>"

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.end,)

    @property
    def apart(self) -> bool:
        return True

    @property
    def last_only(self) -> bool:
        return True

    def _segments(self, messages: list[Message], prompt: bool, thinking: bool) -> list[Segment]:
        system = [m["content"] for m in messages if m["role"] == "system"]
        turns = [m for m in messages if m["role"] != "system"]
        for i, message in enumerate(turns):
            if message["role"] != ("user", "assistant")[i % 2]:
                raise DataError(
                    f"a message has the role {str(message['role'])[:40]!r}, {('user', 'assistant')[i % 2]} is due",
                    f"In {self.name}'s rounds a question and an answer take turns.",
                )
        if not turns or (prompt and turns[-1]["role"] == "assistant"):
            raise DataError(f"a chat of {self.name} has no question at its end", "Ask something.")
        answer = turns[-1]["content"] if turns[-1]["role"] == "assistant" else None
        number = None if answer is None else max(i for i, m in enumerate(messages) if m["role"] == "assistant")
        text = self.gap.join([*system, *self._rounds(turns if answer is None else turns[:-1])])
        if self.first == 0:
            start = [Segment(text), Segment("[gMASK]", special=True), Segment("<sop>", special=True, answer=number)]
        else:
            start = [Segment("[gMASK]", special=True), Segment("sop", special=True), Segment(text)]
        if answer is None:
            return start
        return [*start, Segment(answer, answer=number), Segment(self.end, special=True, answer=number)]

    def _rounds(self, turns: list[Message]) -> list[str]:
        """The paragraphs of questions and answers, the last one a question that waits for its answer."""
        if self.first == 0 and len(turns) == 1:
            return [turns[0]["content"]]
        paragraphs = []
        for i in range(0, len(turns), 2):
            said = turns[i + 1]["content"] if i + 1 < len(turns) else ""
            paragraphs += [f"[Round {i // 2 + self.first}]", f"问：{turns[i]['content']}", f"答：{said}"]
        return paragraphs


@dataclass(frozen=True)
class RoleTokens(Template):
    """ChatGLM3, GLM-4, GLM-4-0414, GLM-Z1, GLM-Edge.

    start: the tokens before the first role; header: what stands between a role token and its content; end: the token that
    closes the last turn; opens_thought: the prompt opens the assistant's thoughts (GLM-Z1); own_code: the format of the original
    code, which cuts header and content into tokens by themselves; skips_empty: a message without content is not written.
    """

    start: tuple[str, ...] = ("[gMASK]", "<sop>")
    header: str = "\n"
    end: str = "<|user|>"
    opens_thought: bool = False
    own_code: bool = False
    skips_empty: bool = False

    @property
    def thinks(self) -> bool:
        return self.opens_thought

    @property
    def opens_thoughts(self) -> bool:
        return self.opens_thought

    @property
    def stops(self) -> tuple[str, ...]:
        return (*dict.fromkeys((self.end, "<|endoftext|>", "<|user|>", "<|observation|>")),)

    @property
    def apart(self) -> bool:
        return self.own_code

    def tool_formats(self, written: str) -> Sequence[ToolFormat]:
        told = re.search(rf"<\|system\|>\n(.*?){AVAILABLE}(\n+)## ", written, re.DOTALL)
        return [CallTurns(told[1], told[2], gap) for gap in ("", " ")] if told and not self.opens_thought else ()

    def _segments(self, messages: list[Message], prompt: bool, thinking: bool) -> list[Segment]:
        result = [Segment(t, special=True) for t in self.start]
        last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
        tools, turns = split_tools(messages)
        if tools:
            result += [Segment("<|system|>", special=True), Segment("\n"), *self.tools.preface(tools, None)]
        before, end = None, self.end  # the number of the answer that is not closed yet, and what closes it at the end
        for i, message in enumerate(turns, len(messages) - len(turns)):
            role, content, calls = message["role"], message["content"], message.get("calls", [])
            if role not in ROLES:
                raise DataError(f"a message has the role {str(role)[:40]!r}", f"Roles are {', '.join(ROLES)}.")
            if self.skips_empty and not content and not calls:
                continue
            # the token that makes an answer stop is learnt with it
            mark = "<|observation|>" if role == "tool" else f"<|{role}|>"
            result.append(Segment(mark, special=True, answer=before if role in ("user", "tool") else None))
            before, end = (i, "<|observation|>" if calls else self.end) if role == "assistant" else (None, self.end)
            result += self._content(content, before, i > last_user) if content or not calls else []
            result += [s._replace(answer=i) for s in self.tools.calls(calls, content)] if calls else []
        if prompt:
            result.append(Segment("<|assistant|>", special=True))
            result += [Segment(f"{self.header}<think>")] if self.opens_thought else []
        elif before is not None:
            result.append(Segment(end, special=True, answer=before))
        return result

    def _content(self, content: str, answer: int | None, current: bool) -> list[Segment]:
        if answer is not None and self.opens_thought:
            thought, mark, said = content.rpartition("</think>")
            if not current:  # thoughts of turns before the last question are dropped
                content = said.lstrip("\n") if mark else content
            else:
                thought = thought.split("<think>")[-1].strip("\n")
                said = said.lstrip("\n")
                return [Segment(f"{self.header}<think>"), Segment(f"\n{thought}</think>\n{said}", answer=answer)]
        return [Segment(self.header, answer=answer), Segment(content, answer=answer)]

    def answer_of(self, text: str) -> str:
        return text.lstrip(" \n") if self.header else text


CHATGLM = Rounds("chatglm")
CHATGLM2 = Rounds("chatglm2", first=1, gap="\n\n", end="</s>")
CHATGLM3 = RoleTokens("chatglm3", start=("[gMASK]", "sop"), end="</s>", own_code=True)
GLM4_OWN = RoleTokens("glm4", own_code=True)


def glm_formats(model_type: str | None = None) -> list[RoleTokens | ReasoningTurns]:
    """The formats that a folder with role tokens and a tokenizer.json can have, the likeliest first."""
    choices = product((("[gMASK]", "<sop>"), ()), ("\n", ""), (False, True), (False, True))
    roles = [
        RoleTokens(
            "glm-z1" if opens else "glm4" if start else "glm-edge",
            None,
            start,
            header,
            "<|user|>",
            opens,
            skips_empty=skips,
        )
        for start, header, opens, skips in choices
    ]
    if model_type == "glm4_moe_lite":
        return [GLM47, GLM45, *roles]
    return [GLM45, GLM47, *roles] if model_type == "glm4_moe" else [*roles, GLM45, GLM47]
