"""What published chat templates write of rows with tools: python tests/golden/make_tool_texts.py QWEN35 QWEN36 GLM45 GLM4_9B GLM47.

Each argument is a chat_template.jinja: of Qwen3.5 (4B and more), of Qwen3.6, of GLM-4.5, of GLM-4-9B-chat, of GLM-4.7. Their texts alone are kept.
"""

import json
import sys
from pathlib import Path

from tool_chats import row

from minilora.files.model_folder import ModelFolder
from minilora.rows import to_messages
from minilora.text.own_template import FORMS, _orders, render
from minilora.text.tools_glm import AVAILABLE

NAMES = ("qwen3.5", "qwen3.6", "glm-4.5", "glm4-9b", "glm-4.7")
found = sorted((row(seed, seed % 2 == 1) for seed in range(200)), key=lambda r: len(json.dumps(r)))
kinds = [
    lambda m: m[0]["role"] == "system" and any("reasoning_content" in t and len(t.get("tool_calls", [])) > 1 and t["content"] for t in m),
    lambda m: m[0]["role"] == "user" and m[-1].get("tool_calls"),
    lambda m: sum(t["role"] == "user" for t in m) > 1 and any(t.get("tool_calls") and not t["content"] for t in m),
]  # fmt: skip
rows = [next(r for r in found if kind(r["messages"])) for kind in kinds]
texts = {}
for name, path in zip(NAMES, sys.argv[1:], strict=True):
    template = Path(path).read_text(encoding="utf-8")
    form = FORMS[name == "glm4-9b"]
    texts[name] = []
    for r in rows:
        orders = _orders(to_messages(r, "here").messages, form)[:2]
        texts[name].append([text for text, _ in render(ModelFolder(Path(path).parent), template, orders)])
intro = texts["glm4-9b"][0][0].split("<|system|>\n")[1].split(AVAILABLE)[0]
out = Path(__file__).with_name("tool_texts.json")
out.write_text(
    json.dumps({"rows": rows, "intro": intro, "texts": texts}, ensure_ascii=False, indent=1), encoding="utf-8"
)
