"""Conversations with tools as rows: OpenAI's messages, and the same as LLaMA-Factory's sharegpt."""

import json
from random import Random
from typing import Any

WORDS = ["yes", "天气", "naïve", "12", "a.b", "x\ny", "né e", "{}", "\"q\"", "\\n", "  ", "🙂", "Σ", "don't", "3.50", "-", "。", "one\n\ntwo", "It's"]  # fmt: skip
NAMES = ["get_weather", "查询", "db.query", "f2", "book-room"]
KINDS = ["string", "integer", "number", "boolean", "array", "object"]


def text(draw: Random, blank: bool = False) -> str:
    """Some words; with `blank` perhaps with white space around them."""
    words = " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 5))).strip() or "w"
    return draw.choice(["", "\n", " "]) + words + draw.choice(["", "\n\n"]) if blank else words


def value(draw: Random, kind: str) -> Any:
    """A value of an argument; a text is not like a number, as bare text could not be told from one."""
    return {
        "string": lambda: text(draw),
        "integer": lambda: draw.randint(-9, 10**12),
        "number": lambda: draw.choice([0.5, -1e-7, 1e22, 3.0]),
        "boolean": lambda: draw.random() < 0.5,
        "array": lambda: [draw.choice([1, "é", None, False, {"k": "v w"}]) for _ in range(draw.randint(0, 3))],
        "object": lambda: {draw.choice(WORDS): value(draw, draw.choice(KINDS[:4])) for _ in range(draw.randint(0, 2))},
    }[kind]()


def functions(draw: Random) -> list[dict]:
    found = []
    for name in draw.sample(NAMES, draw.randint(1, 3)):
        properties = {
            f"k{i}é": {"type": kind, "description": text(draw)}
            for i, kind in enumerate(draw.sample(KINDS, draw.randint(0, 4)))
        }
        schema = {"type": "object", "properties": properties, "required": list(properties)[:1]}
        found.append({"type": "function", "function": {"name": name, "description": text(draw), "parameters": schema}})
    return found


def call(draw: Random, tools: list[dict]) -> dict:
    function = draw.choice(tools)["function"]
    properties = function["parameters"]["properties"]
    kept = [k for k in properties if draw.random() < 0.8]
    return {"name": function["name"], "arguments": {k: value(draw, properties[k]["type"]) for k in kept}}


def row(seed: int, thinks: bool) -> dict:
    """A row of OpenAI's messages: system or not, one to three questions, calls with text and thoughts or without, results."""
    draw = Random(seed)
    tools = functions(draw)
    messages: list[dict] = [{"role": "system", "content": text(draw)}] if draw.random() < 0.5 else []
    for _ in range(draw.randint(1, 3)):
        messages.append({"role": "user", "content": text(draw)})
        thinking = thinks and draw.random() < 0.5
        for _ in range(draw.choice([0, 1, 1, 2])):
            calls = [call(draw, tools) for _ in range(draw.choice([1, 1, 2, 3]))]
            written = [
                {"id": f"c{i}", "type": "function", "function": c | {"arguments": json.dumps(c["arguments"])} if draw.random() < 0.5 else c}
                for i, c in enumerate(calls)
            ]  # fmt: skip
            said = draw.choice([None, "", text(draw)])
            messages.append({"role": "assistant", "content": said, "tool_calls": written})
            if thinking and draw.random() < 0.8:
                messages[-1]["reasoning_content"] = text(draw)
            results = [
                json.dumps({"r": text(draw)}, ensure_ascii=False) if draw.random() < 0.5 else text(draw) for _ in calls
            ]
            messages += [{"role": "tool", "tool_call_id": f"c{i}", "content": r} for i, r in enumerate(results)]
        messages.append({"role": "assistant", "content": text(draw)})
        if thinking:
            messages[-1]["reasoning_content"] = text(draw)
    if messages[-2]["role"] == "tool" and draw.random() < 0.5:  # it ends with calls
        while messages[-1]["role"] != "assistant" or not messages[-1].get("tool_calls"):
            messages.pop()
    return {"messages": messages, "tools": json.dumps(tools, ensure_ascii=False) if draw.random() < 0.5 else tools}


def as_sharegpt(row: dict) -> dict:
    """The same row as LLaMA-Factory writes it: calls and results are turns of their own, and a call has no text beside it."""
    turns = []
    names = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
    for message in row["messages"]:
        thought = message.get("reasoning_content")
        before = f"<think>\n{thought}\n</think>\n\n" if thought else ""
        if message.get("tool_calls"):
            calls = [call["function"] for call in message["tool_calls"]]
            turns.append({"from": "function_call", "value": before + json.dumps(calls, ensure_ascii=False)})
        else:
            turns.append({"from": names[message["role"]], "value": before + message["content"]})
    bare = [tool["function"] for tool in json.loads(row["tools"])] if isinstance(row["tools"], str) else row["tools"]
    return {"conversations": turns, "tools": json.dumps(bare, ensure_ascii=False)}
