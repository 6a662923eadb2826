"""Cut a tokenizer.model or a .tiktoken file down to a golden file's texts: python tests/golden/shrink_vocabulary.py FULL GOLDEN OUT.

Kept are bytes, control pieces, and the tokens that are part of some text. Any other can never come out of these texts, nor be
a step on the way. The order stays; ids are numbered anew, in the golden file too.
"""

import base64
import json
import sys
import unicodedata
from pathlib import Path

full, golden, out = map(Path, sys.argv[1:])
raw, g = full.read_bytes(), json.loads(golden.read_text(encoding="utf-8"))
texts = [t["text"] for t in g["texts"]] + [m["content"] for c in g["chats"] for m in c["messages"]]
texts += ["\n", "system\n", "user\n", "assistant\n", "You are a helpful assistant."]


def parts(text: bytes | str, longest: int) -> set:
    return {text[i:j] for i in range(len(text)) for j in range(i + 1, min(len(text), i + longest) + 1)}


def of_ranks() -> tuple[bytes, list[int], int]:
    """The small file, the ids that are kept, and how many there were, of `base64 rank` lines."""
    wanted = set().union(*(parts(unicodedata.normalize("NFC", t).encode(), 128) for t in texts))
    tokens = [base64.b64decode(line.split()[0]) for line in raw.splitlines()]
    kept = [i for i, token in enumerate(tokens) if len(token) == 1 or token in wanted]
    lines = [base64.b64encode(tokens[i]) + f" {n}\n".encode() for n, i in enumerate(kept)]
    return b"".join(lines), kept, len(tokens)


def varint(place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[place]
        value, place, shift = value | (byte & 127) << shift, place + 1, shift + 7
        if byte < 128:
            return value, place


def of_pieces() -> tuple[bytes, list[int], int]:
    """The same of a SentencePiece model: a list of pieces (field 1) and settings."""
    wanted = set().union(*(parts("▁" + t.replace(" ", "▁"), 16) for t in texts))
    result, kept, place, count = b"", [], 0, 0
    while place < len(raw):
        start = place
        key, place = varint(place)
        length, place = varint(place)
        field, place = raw[place : place + length], place + length
        if key >> 3 == 1:
            piece = field[2 : 2 + field[1]].decode()
            keep = count < 259 or piece in wanted
            kept += [count] if keep else []
            count += 1
        else:
            keep = True
        result += raw[start:place] if keep else b""
    return result, kept, count


small, kept, old = of_ranks() if full.suffix == ".tiktoken" else of_pieces()
new = {i: n for n, i in enumerate(kept)}
for item in g["texts"] + g["chats"]:
    item["ids"] = [new[i] if i < old else i - old + len(kept) for i in item["ids"]]
out.mkdir(parents=True, exist_ok=True)
(out / full.name).write_bytes(small)
(out / "golden.json").write_text(json.dumps(g, ensure_ascii=False, indent=0), encoding="utf-8")
