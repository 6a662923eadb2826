"""Tools in Qwen's chats: a call is a JSON object (Hermes: Qwen2.5, Qwen3), or a list of parameters in tags (Qwen3.5 and later)."""

import re
from dataclasses import dataclass
from typing import Any

from .template import Call, Segment, ToolFormat
from .tools import as_json, read_calls, typed

HERMES = (
    (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
    ),
    (
        "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
        '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    ),
)
TAGS = (
    "# Tools\n\nYou have access to the following functions:\n\n<tools>",
    (
        "\n</tools>\n\nIf you choose to call a function ONLY reply in the following format with NO suffix:\n\n"
        "<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
        "<parameter=example_parameter_2>\nThis is the value for the second parameter\nthat can span\nmultiple lines\n"
        "</parameter>\n</function>\n</tool_call>\n\n<IMPORTANT>\nReminder:\n"
        "- Function calls MUST follow the specified format: an inner <function=...></function> block must be nested within "
        "<tool_call></tool_call> XML tags\n- Required parameters MUST be specified\n"
        "- You may provide optional reasoning for your function call in natural language BEFORE the function call, but NOT after\n"
        "- If there is no function call available, answer the question like normal with your current knowledge and do not tell "
        "the user about function calls\n</IMPORTANT>"
    ),
)
CALL = re.compile(r"<tool_call>(.*?)</tool_call>\n?", re.DOTALL)
FUNCTION = re.compile(r"<function=([^>\n]+)>\n?(.*?)</function>", re.DOTALL)
PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


@dataclass(frozen=True)
class Hermes(ToolFormat):
    """`<tool_call>`, {"name": ..., "arguments": {...}}, `</tool_call>`; several calls stand one behind the other."""

    marks = ("<tool_call>", "</tool_call>")

    def preface(self, tools: list[dict], system: str | None) -> list[Segment]:
        before = [] if system is None else [Segment(system), Segment("\n\n")]
        return [*before, *_listed(HERMES, tools)]

    def calls(self, calls: list[Call], said: str) -> list[Segment]:
        found = [Segment("\n")] if said else []
        for n, call in enumerate(calls):
            found += [Segment("\n<tool_call>\n" if n else "<tool_call>\n", own=True)]
            found += [Segment(f'{{"name": "{call["name"]}", "arguments": {as_json(call["arguments"])}}}')]
            found += [Segment("\n</tool_call>", own=True)]
        return found

    def read(self, text: str, tools: list[dict]) -> tuple[str, list[Call]]:
        try:
            calls = [call for found in CALL.findall(text) for call in self._one(found.strip(), tools)]
        except ValueError:
            return text, []
        return (CALL.sub("", text).rstrip("\n") if calls else text), calls

    def _one(self, written: str, tools: list[dict]) -> list[Call]:
        """The call between two marks; ValueError if it is broken."""
        return read_calls(written)


@dataclass(frozen=True)
class Tags(Hermes):
    """A function and its parameters in tags; python: what is no text, list or object is written as Python does (True), not as JSON."""

    python: bool = True

    def preface(self, tools: list[dict], system: str | None) -> list[Segment]:
        return [*_listed(TAGS, tools), *([Segment("\n\n"), Segment(system)] if system else [])]

    def calls(self, calls: list[Call], said: str) -> list[Segment]:
        found = [Segment("\n\n")] if said else []
        for n, call in enumerate(calls):
            found += [Segment("\n<tool_call>\n" if n else "<tool_call>\n", own=True)]
            found += [Segment(f"<function={call['name']}>\n")]
            for key, value in call["arguments"].items():
                found += [Segment(f"<parameter={key}>\n{self._written(value)}\n</parameter>\n")]
            found += [Segment("</function>\n"), Segment("</tool_call>", own=True)]
        return found

    def _written(self, value: Any) -> str:
        plain = isinstance(value, str) or (self.python and not isinstance(value, (list, dict)))
        return str(value) if plain else as_json(value)

    def _one(self, written: str, tools: list[dict]) -> list[Call]:
        function = FUNCTION.fullmatch(written)
        if function is None or PARAMETER.sub("", function[2]).strip():
            raise ValueError("no function in a call")
        name = function[1]
        arguments = {key: typed(value, name, key, tools) for key, value in PARAMETER.findall(function[2])}
        return read_calls({"name": name, "arguments": arguments})


def _listed(words: tuple[str, str], tools: list[dict]) -> list[Segment]:
    """The functions, one a line, between words of the template."""
    lines = [Segment(f"\n{as_json(tool)}") for tool in tools]
    return [Segment(words[0], own=True), *lines, Segment(words[1], own=True)]
