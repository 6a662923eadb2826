"""Tools in GLM's chats: a call is a turn of its own (GLM-4), or stands in tags (GLM-4.5 to 4.7)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .template import Call, Message, Segment, ToolFormat, split_tools
from .tools import as_json, read_calls, typed

LISTED = (
    (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    ),
    "</tools>\n\nFor each function call, output the function name and arguments within the following XML format:\n",
)
SHAPE = (
    "<tool_call>{function-name}", "<arg_key>{arg-key-1}</arg_key>", "<arg_value>{arg-value-1}</arg_value>", "<arg_key>{arg-key-2}</arg_key>",
    "<arg_value>{arg-value-2}</arg_value>", "...", "</tool_call>",
)  # fmt: skip
AVAILABLE, IN_JSON = "# 可用工具", "在调用上述函数时，请使用 Json 格式表示调用的参数。"
CALL = re.compile(r"\n?<tool_call>(.*?)</tool_call>", re.DOTALL)
ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
TURN = "<|assistant|>"


@dataclass(frozen=True)
class ArgumentTags(ToolFormat):
    """GLM-4.5: the function's name, and a tag for each key and value; a text stands as it is, anything else as JSON.

    gap: what stands between tags.
    """

    gap: str = "\n"
    marks = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")

    def preface(self, tools: list[dict], system: str | None) -> list[Segment]:
        lines = [Segment(f"{as_json(tool)}\n") for tool in tools]
        return [Segment(LISTED[0], own=True), *lines, Segment(LISTED[1] + self.gap.join(SHAPE), own=True)]

    def calls(self, calls: list[Call], said: str) -> list[Segment]:
        found, between = [], f"</arg_key>{self.gap}<arg_value>"
        for call in calls:
            found += [Segment(f"{self.gap}<tool_call>", own=True), Segment(f"{call['name']}{self.gap}")]
            for key, value in call["arguments"].items():
                written = value if isinstance(value, str) else as_json(value)
                found += [Segment("<arg_key>", own=True), Segment(key), Segment(between, own=True), Segment(written)]
                found.append(Segment(f"</arg_value>{self.gap}", own=True))
            found += [Segment("</tool_call>", own=True)]
        return found

    def result(self, text: str) -> list[Segment]:
        opens, closes = f"<tool_response>{self.gap}", f"{self.gap}</tool_response>"
        return [Segment(opens, own=True), Segment(text), Segment(closes, own=True)]

    def read(self, text: str, tools: list[dict]) -> tuple[str, list[Call]]:
        try:
            calls = [self._one(found, tools) for found in CALL.findall(text)]
        except ValueError:
            return text, []
        return CALL.sub("", text) if calls else text, calls

    def _one(self, written: str, tools: list[dict]) -> Call:
        """The call between two marks; ValueError if it is broken."""
        at = written.find("<arg_key>")
        name, given = (written, "") if at < 0 else (written[:at], written[at:])
        name = name.strip()
        if ARGUMENT.sub("", given).strip():
            raise ValueError("more than keys and values in a call")
        arguments = {key: typed(value, name, key, tools) for key, value in ARGUMENT.findall(given)}
        return read_calls({"name": name, "arguments": arguments})[0]


@dataclass(frozen=True)
class CallTurns(ToolFormat):
    """GLM-4: each call is a turn of the assistant with the function's name behind the role and the arguments as its text.

    intro: what stands before the list of functions; lead: before each of them; gap: behind a name in a call.
    """

    intro: str = ""
    lead: str = "\n\n"
    gap: str = ""
    marks = (TURN,)

    def preface(self, tools: list[dict], system: str | None) -> list[Segment]:
        functions = [tool["function"] for tool in tools]
        listed = [f"{self.lead}## {f['name']}\n\n{as_json(f, 4)}\n{IN_JSON}" for f in functions]
        return [Segment(f"{self.intro}{AVAILABLE}{''.join(listed)}")]

    def calls(self, calls: list[Call], said: str) -> list[Segment]:
        found = []
        for call in calls:
            found += [Segment(TURN, special=True), Segment(f"{call['name']}{self.gap}\n")]
            found += [Segment(as_json(call["arguments"]))]
        return found if said else found[1:]  # the first turn is open

    def result(self, text: str) -> list[Segment]:
        return [Segment(text)]

    def start(self, text: str) -> int:
        return super().start(text) if text.startswith("\n") else 0  # a name stands where a line would end

    def read(self, text: str, tools: list[dict]) -> tuple[str, list[Call]]:
        names, said, calls = {tool["function"]["name"] for tool in tools}, [], []
        for turn in text.split(TURN):
            name, _, arguments = turn.partition("\n")
            if name.strip() not in names:
                said.append(turn)
                continue
            try:
                calls += read_calls({"name": name.strip(), "arguments": arguments})
            except ValueError:
                return text.replace(TURN, "\n"), []
        return "".join(said), calls

    def variables(self, messages: Sequence[Message]) -> dict[str, Any]:
        """Of GLM-4's own making: `metadata` names a function, and the first message has the tools."""
        tools, turns = split_tools(messages)
        told: list[dict] = []
        for message in turns:
            role, calls = message["role"], message.get("calls", [])
            if message["content"] or not calls:
                told.append({"role": "observation" if role == "tool" else role, "content": message["content"]})
            told += [{"role": role, "metadata": call["name"], "content": as_json(call["arguments"])} for call in calls]
        if tools and told:
            told[0]["tools"] = tools
        return {"tools": tools or None, "messages": told}
