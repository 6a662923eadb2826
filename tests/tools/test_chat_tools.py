"""A chat with functions: calls are read from the answer, and what is said next is what they returned."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import make_model

from minilora.__main__ import main
from minilora.sampling import GREEDY
from minilora.text.tokenizer import load_tokenizer
from minilora.text.tools_qwen import Hermes
from minilora.tools import chat

TOOLS = [{"type": "function", "function": {"name": "f"}}]
CALLS = [{"name": "f", "arguments": {"k": n}} for n in (1, 2)]
SAID = "Let me see.\n" + "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in CALLS)


def test_results_follow_calls(tmp_path: Path, monkeypatch):
    tokenizer = load_tokenizer(make_model(tmp_path / "model"))
    tokenizer.template = replace(tokenizer.template, tools=Hermes())
    answers, prompts = iter([SAID, "done"]), []

    def generate(model, ids, *_):
        prompts.append(tokenizer.decode(ids, specials=True))
        return iter(tokenizer.encode(next(answers)))

    monkeypatch.setattr(chat, "generate", generate)
    model: Any = SimpleNamespace(config=SimpleNamespace(max_positions=4096, rotary=8))
    session = chat.Session(model, tokenizer, GREEDY, set(), 4000, torch.Generator(), [], TOOLS)
    session.forget([{"role": "system", "content": "s"}])
    assert "".join(session.reply("q")) == SAID
    assert session.notes() == ['what you say next is what f({"k": 1}) returned']
    assert "".join(session.reply("r1")) == "" and session.notes() == ['what you say next is what f({"k": 2}) returned']
    assert "".join(session.reply("r2")) == "done" and not session.notes()
    told = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "Let me see.", "calls": CALLS},
            {"role": "tool", "content": "r1"}, {"role": "tool", "content": "r2"}]  # fmt: skip
    functions = {"role": "tools", "content": json.dumps(TOOLS)}
    assert session.messages == [functions, *told, {"role": "assistant", "content": "done"}]
    assert prompts[1] == tokenizer.decode(tokenizer.render([functions, *told], prompt=True)[0], specials=True)
    session.forget([])
    assert session.messages == [functions] and not session.called


@pytest.mark.parametrize(
    ("text", "told"),
    [("[", "tools.json: Expecting"), ('[{"type": "python"}]', "is not a function"), (json.dumps(TOOLS), "tools cannot be written here"), (None, "No such file")],
)  # fmt: skip
def test_functions_that_cannot_be_used_are_told(tmp_path: Path, capsys, text: str | None, told: str):
    path = tmp_path / "tools.json"
    if text is not None:
        path.write_text(text)
    words = ["chat", "--model", str(make_model(tmp_path / "model")), "--prompt", "x"]
    assert main([*words, "--tools", str(path)]) == 2
    assert told in capsys.readouterr().err
