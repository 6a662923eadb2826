"""Tools and tool calls: checks those of rows and requests, and reads argument values that a model wrote as text."""

import json
import re
from typing import Any

from ..errors import quote
from ..files.strict_json import parse_json
from .template import Call

NAME = re.compile(r'[^\s"\\<>](?:[^"\\<>\x00-\x1f]*[^\s"\\<>])?')  # safe between the tags of every format
AROUND = 100  # levels of nesting that JSON may add around a tool or a call
PYTHON = {"True": True, "False": False, "None": None}
# keys of a call that no chat format writes
NOT_WRITTEN = {"id", "index", "type"}


class Unreadable(ValueError):
    """What is wrong with tools or tool calls."""


def as_json(value: Any, indent: int | None = None) -> str:
    """The JSON text that chat templates write."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def read_tools(value: Any) -> list[dict]:
    """A list of tools, or its JSON text, in OpenAI's form; Unreadable or another ValueError says what is wrong with it."""
    tools = parse_json(value) if isinstance(value, str) else value
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list):
        raise Unreadable("it is not a list of functions")
    return [_tool(tool) for tool in tools]


def _tool(tool: Any) -> dict:
    bare = isinstance(tool, dict) and "name" in tool and "function" not in tool
    if bare and tool.get("type") in (None, "function"):  # a function by itself, as LLaMA-Factory's rows have it
        tool = {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
    if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
        raise Unreadable(f"{quote(as_json(tool))} is not a function, which has a name and parameters")
    _check(tool["function"].get("name"), tool)
    return tool


def read_calls(value: Any) -> list[Call]:
    """One call or several, or their JSON text; Unreadable or another ValueError says what is wrong with them.

    A call is a name and arguments, by itself or as `function`; the arguments are an object or its JSON text.
    """
    calls = parse_json(value) if isinstance(value, str) else value
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not calls:
        raise Unreadable("it is not a list of calls")
    return [_call(call) for call in calls]


def _call(call: Any) -> Call:
    if not isinstance(call, dict):
        raise Unreadable(f"{quote(as_json(call))} is not a call, which has a name and arguments")
    function = call.get("function", call)
    if not isinstance(function, dict):
        raise Unreadable(f"its function is {quote(as_json(function))}")
    beside = set(call) - NOT_WRITTEN - {"function"} if function is not call else set()
    other = sorted(beside | (set(function) - NOT_WRITTEN - {"name", "arguments"}))
    if other or call.get("type", "function") != "function":
        raise Unreadable(f"a call has {quote(other[0] if other else 'type')}, which is not read")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = parse_json(arguments) if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise Unreadable(f"the arguments of a call are {quote(as_json(arguments))}, and no object")
    _check(function.get("name"), arguments)
    return {"name": function["name"], "arguments": arguments}


def _check(name: Any, held: Any) -> None:
    """Unreadable unless the name is safe in every chat format, and `held` can be written as JSON."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise Unreadable(f"a function's name is {quote(as_json(name))}")
    for _ in range(AROUND):
        held = [held]
    try:
        json.dumps([name, held], ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise Unreadable("it holds a number that is not finite, or half a surrogate pair, or too deep lists") from None


def typed(text: str, function: str, key: str, tools: list[dict]) -> Any:
    """The value of an argument that was written as bare text: a string if the schema says so, else the text parsed as JSON or Python."""
    schemas = [t["function"].get("parameters") for t in tools if t["function"]["name"] == function]
    properties = schemas[0].get("properties") if schemas and isinstance(schemas[0], dict) else None
    schema = properties.get(key) if isinstance(properties, dict) else None
    if isinstance(schema, dict) and schema.get("type") == "string":
        return text
    try:
        return PYTHON[text] if text in PYTHON else parse_json(text)
    except ValueError:
        return text
