"""A file of rows, from its bytes to tokens. The first line is the ending of its name, then the settings that are not the usual ones."""

import json
from functools import cache
from random import Random

from minilora.config import FIELDS, DataConfig
from minilora.rows.load import load_examples
from minilora.rows.shapes import ANSWERS, CHATS, QUESTIONS, ROLES
from minilora.settings import convert
from minilora.text.tokenizer import load_tokenizer

from ..mutator import mutate as mutated
from ..room import fresh, tiny

CHAT = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hé"}, {"role": "assistant", "content": "a", "weight": 0},
                     {"role": "user", "content": "{{ x }}"}, {"role": "assistant", "content": "b", "loss": True}]}  # fmt: skip
CALLS = {"tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}}],
         "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{\"k\": 1}"}}]},
                      {"role": "tool", "content": "r"}, {"role": "assistant", "content": "a", "reasoning_content": "t"}]}  # fmt: skip
ROWS = [
    {"instruction": "q", "input": "more", "output": "a", "system": "s", "history": [["x", "y"]]}, CHAT, CALLS,
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"text": "raw text"}, {"content": "c", "summary": "d"}, {"问题": "q", "答案": "a"},
]  # fmt: skip
SEEDS = [
    *(f".jsonl\n{json.dumps(row, ensure_ascii=False)}\n{json.dumps(row)}\n".encode() for row in ROWS),
    f".json skip_bad=true\n{json.dumps(ROWS)}".encode(),
    f".jsonl skip_bad=true max_length=20 truncate=cut\n{json.dumps(ROWS[0], indent=1)}\n".encode(),
    b".csv\nprompt,response\n\"a, b\",c\r\n\"x\ny\",z\n",
    b".tsv columns=prompt=one,response=two\none\ttwo\na\tb\n",
    b".csv\n" + "问题,答案\n天空是什么颜色的？,天空是蓝色的。\n".encode("gb18030"),
    b".csv encoding=big5\n" + "prompt,response\n這個,臺灣\n".encode("big5"),
    b".csv\n\xff\xfe" + "prompt,response\na,b\n".encode("utf-16-le"),
    b".txt\nplain text\nover lines\n",
]  # fmt: skip
WORDS = [*CHATS, *QUESTIONS, *ANSWERS, *ROLES, "tools", "tool_calls", "function", "arguments", "weight", "loss", "skip_bad=true", "truncate=cut",
         "truncate=error", "max_length=9", "encoding=utf-16", "encoding=gb18030", "encoding=cp1252", "define=x=y", "\r", "\u2028", '"', '""', "\t", ";"]  # fmt: skip
KINDS = (".jsonl", ".json", ".csv", ".tsv", ".txt")
FREE = (
    "skip_bad",
    "truncate",
    "max_length",
    "max_source_length",
    "max_target_length",
    "encoding",
    "columns",
    "define",
    "train_end",
    "ignore_keys",
)


@cache
def _tokenizer():
    return load_tokenizer(tiny())


def prepare() -> None:
    _tokenizer()


def target(data: bytes) -> None:
    first, _, content = data.partition(b"\n")
    kind, *words = first.decode("latin-1").split() or [""]
    path = fresh("rows") / f"x{kind if kind in KINDS else '.jsonl'}"
    given = dict(word.split("=", 1) for word in words if word.partition("=")[0] in FREE and "=" in word)
    path.write_bytes(content)
    settings = DataConfig(**{name: convert(FIELDS[name], value) for name, value in given.items()})
    examples, report = load_examples(path, _tokenizer(), settings)
    assert len(examples) and str(report)


def mutate(data: bytes, random: Random, other: bytes) -> bytes:
    """One line of the file changed as JSON, mostly, so that the others can still be read."""
    first, _, content = data.partition(b"\n")
    how = random.random()
    if how < 0.1:
        first = random.choice(KINDS).encode() + b" " + mutated(first.partition(b" ")[2], random, WORDS)
    elif how < 0.75 and content.count(b"\n") < 500:
        lines = content.split(b"\n")
        at = random.randrange(len(lines))
        lines[at] = mutated(lines[at], random, WORDS, other)
        content = b"\n".join(lines)
    else:
        content = mutated(content, random, WORDS, other)
    return first + b"\n" + content
