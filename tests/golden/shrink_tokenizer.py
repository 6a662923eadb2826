"""Cut a tokenizer.json down to what a golden file's texts need: python tests/golden/shrink_tokenizer.py FULL GOLDEN OUT.

A merge is kept if its result is part of some pre-tokenised word of the texts. Any other merge can never apply to them, so the
small tokenizer gives the ids of the full one. Ids are kept as they are.
"""

import json
import sys
from pathlib import Path

import tokenizers

full, golden, out = map(Path, sys.argv[1:])
description = json.loads(full.read_text(encoding="utf-8"))
g = json.loads(golden.read_text(encoding="utf-8"))
texts = [t["text"] for t in g["texts"]] + [m["content"] for c in g["chats"] for m in c["messages"]]
texts += [c["text"] for c in g["chats"]] + [
    "system\n",
    "user\n",
    "assistant\n",
    "\n",
    "\n\n",
    "You are a helpful assistant.",
]
tokenizer = tokenizers.Tokenizer.from_str(json.dumps(description | {"added_tokens": []}))
normalize = tokenizer.normalizer.normalize_str if tokenizer.normalizer else str
words = set()
for text in texts:
    for piece in [text, *text.replace("<|", "\0<|").replace("|>", "|>\0").split("\0")]:
        words |= {w for w, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normalize(piece))}
parts = {w[i:j] for w in words for i in range(len(w)) for j in range(i + 1, len(w) + 1)}
model = description["model"]
pairs = [m if isinstance(m, list) else m.split(" ") for m in model["merges"]]
model["merges"] = [m for m in pairs if "".join(m) in parts]
kept = {"".join(m) for m in model["merges"]}
model["vocab"] = {t: i for t, i in model["vocab"].items() if len(t) == 1 or t in kept}
# the library numbers an added token after the vocabulary unless the vocabulary has it
model["vocab"] |= {t["content"]: t["id"] for t in description["added_tokens"]}
(out / "tokenizer.json").write_text(json.dumps(description, ensure_ascii=False, indent=0), encoding="utf-8")
