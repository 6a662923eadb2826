"""Limits how much a tokenizer can lengthen a text before splitting it: a few characters must not become gigabytes.

The tokenizers library runs the steps that a tokenizer.json lists, and a SentencePiece model holds a table of replacements. Both
are checked before use. How long a regular expression of a step may try is left to the library.
"""

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

import tokenizers

MOST, LONGEST_TOKEN, LONGEST_REPLACEMENT = 64, 1_000, 256  # times, characters (Qwen's have up to 128), bytes
MOST_ADDED = 1 << 20  # characters of all tokens beside the vocabulary: the library holds hundreds of bytes for each
TIMES = {"ByteLevel": 2, "Metaspace": 4, "BertNormalizer": 3}  # the growth of steps that insert no text from the file


def check_growth(j: dict[str, Any]) -> None:
    """ValueError for a tokenizer.json (parsed) whose steps could make a text more than MOST times as long."""
    if len(json.dumps(j.get("post_processor"))) > 1 << 20:
        raise ValueError("its post_processor is larger than any")
    # the steps as the library reads them, which knows older ways to write one and skips keys that it does not know
    steps = {name: j.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")}
    alone = json.dumps(steps | {"model": {"type": "BPE", "vocab": {}, "merges": []}})
    j = json.loads(tokenizers.Tokenizer.from_str(alone).to_str())
    for names in (("normalizer", "pre_tokenizer"), ("decoder",)):
        times = math.prod(_times(j.get(name)) for name in names)
        if times > MOST:
            raise ValueError(f"its {' and '.join(names)} could make a text {times:,.0f} times as long")


def _times(step: Any) -> float:
    """The largest factor by which a step lengthens a text of a few characters."""
    if not isinstance(step, dict):
        return 1
    kind = step["type"]
    if kind == "Sequence":
        return math.prod(map(_times, next(v for v in step.values() if isinstance(v, list))))
    if kind == "Replace":
        old, new = step["pattern"].get("String"), len(step["content"])
        return max(1, new / len(old)) if old else 1 + new  # a regular expression may match between any two characters
    if kind == "Prepend":
        return 1 + len(step["prepend"])
    if kind == "Precompiled":
        return 1 + len(step["precompiled_charsmap"])
    return TIMES.get(kind, 1)


def check_tokens(vocabulary: Iterable[str | bytes], added: Iterable[str] = ()) -> None:
    """ValueError for tokens far longer than any: building and using them takes time quadratic in their length.

    added: tokens beside the vocabulary, which the library looks for in each text.
    """
    lengths = [len(token) for token in added]
    longest = max((*lengths, *map(len, vocabulary)), default=0)
    if longest > LONGEST_TOKEN:
        raise ValueError(f"one of its tokens has {longest:,} characters")
    if sum(lengths) > MOST_ADDED:
        raise ValueError(f"its added tokens have {sum(lengths):,} characters")


def check_replacements(model: bytes) -> None:
    """ValueError for a SentencePiece model whose table replaces a character by a long text.

    normalizer_spec (3) and denormalizer_spec (5) hold precompiled_charsmap (2): the size of a trie, the trie, and texts that
    end with a zero byte. A field that stands there twice is looked at twice.
    """
    for spec in (*_fields(model, 3), *_fields(model, 5)):
        for table in _fields(spec, 2):
            texts = table[4 + int.from_bytes(table[:4], "little") :]
            longest = max(map(len, texts.split(b"\0")))
            if longest > LONGEST_REPLACEMENT:
                raise ValueError(f"it replaces a letter by {longest:,} bytes")


def _fields(message: bytes, wanted: int) -> Iterator[bytes]:
    """The length-delimited fields of that number in a protocol buffer."""
    at = 0
    while at < len(message):
        tag, at = _number(message, at)
        kind = tag & 7
        if kind == 2:
            size, at = _number(message, at)
            if tag >> 3 == wanted:
                yield message[at : at + size]
            at += size
        elif kind == 0:
            _, at = _number(message, at)
        else:
            at += {1: 8, 5: 4}[kind]


def _number(message: bytes, at: int) -> tuple[int, int]:
    """A varint (7 bits a byte), and where the next field begins."""
    value = shift = 0
    while message[at] & 128:
        value |= (message[at] & 127) << shift
        at, shift = at + 1, shift + 7
    return value | message[at] << shift, at + 1
