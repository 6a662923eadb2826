"""New inputs from old ones: bytes and words cut, doubled, put in and taken from another input; in JSON, values and keys changed.

Everything follows from the random.Random that is given: the same seed gives the same inputs.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from random import Random
from typing import Any

LONGEST = 1 << 16  # bytes of an input
BYTES = (b"", b"\0", b"\xff", b"\n", b"\r\n", b" ", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\x1b[2J", b"{", b"}", b"[", b"]", b'"', b",",
         b":", b"0", b"-1", b"1e999", b"NaN", b"null", b"true", b"../", b"/etc/passwd", b"%s%n", b"\xe2\x80\xae", b"9" * 400)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 3, 7, 8, 16, 255, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 53) + 1, 1 << 63, 1 << 64, 10**30, -(1 << 63),
           0.5, -0.0, 1e-30, 1e30, 1e308)  # fmt: skip
TEXTS = ("", " ", "a", "é", "\0", "\ud800", "\x1b[31m", "\u202e", "../x", "/dev/zero", "x" * 300, "(a+)+$", "(|.)(|.)(|.)", "{{ 7*7 }}", "nan",
         "on", "null", "0x10", "1e5", "inf", "\u2028", "{", "'", '"', "<|im_end|>", "<script>", "=1+1", "true", "all-linear")  # fmt: skip


def mutate(data: bytes, random: Random, words: Sequence[str] = (), other: bytes = b"") -> bytes:
    """An input made of `data`, with something of `other` in it now and then; words: what the format is made of."""
    for _ in range(random.choice((1, 1, 1, 2, 2, 4))):
        how = random.random()
        if how < 0.85:
            with suppress(ValueError, RecursionError):
                data = _of_value(data, random, words)
                continue
        data = _of_bytes(data, random, words, other)
    return data[:LONGEST]


def _of_bytes(data: bytes, random: Random, words: Sequence[str], other: bytes) -> bytes:
    at = random.randint(0, len(data))
    length = random.choice((0, 0, 1, 1, 2, 4, 16, len(data) // 4))
    how = random.randrange(7)
    if how == 0 and data:  # a bit
        at = min(at, len(data) - 1)
        return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]
    if how == 1:  # a piece twice
        return data[: at + length] + data[at:]
    if how == 2:  # cut
        return data[:at]
    if how == 3 and other:  # the end of another input
        return data[:at] + other[random.randint(0, len(other)) :]
    if how == 4 and words:
        return data[:at] + random.choice(words).encode("utf-8", "surrogatepass") + data[at + length :]
    if how == 5:  # a piece elsewhere
        to = random.randint(0, len(data))
        return data[:to] + data[at : at + length] + data[to:]
    return data[:at] + random.choice(BYTES) + data[at + length :]


def _of_value(data: bytes, random: Random, words: Sequence[str]) -> bytes:
    """The JSON value with something in it changed; ValueError if it is none."""
    if data[:1] not in b'{["':
        raise ValueError(data)
    value = json.loads(data)
    places: list[tuple[Any, Any]] = []
    _walk(value, places, 0)
    if not places:
        return json.dumps(_any(random, words)).encode()
    holder, key = random.choice(places)
    how = random.randrange(6)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[random.choice([*words, *TEXTS])] = holder[key]
    elif how == 1:
        holder.insert(key, holder[key])
    elif how == 2:  # another place's value
        there, name = random.choice(places)
        holder[key] = json.loads(json.dumps(there[name]))
    elif how == 3 and isinstance(holder[key], str):
        text = holder[key]
        at = random.randint(0, len(text))
        holder[key] = text[:at] + random.choice([*TEXTS, *words]) + text[at + random.choice((0, 1, 4)) :]
    else:
        holder[key] = _any(random, words)
    return json.dumps(value, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")


def _walk(value: Any, places: list[tuple[Any, Any]], depth: int) -> None:
    if depth > 20 or len(places) > 3000:
        return
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        places.append((value, key))
        _walk(value[key], places, depth + 1)


def _any(random: Random, words: Sequence[str]) -> Any:
    makers: tuple[Callable[[], Any], ...] = (
        lambda: random.choice(NUMBERS),
        lambda: random.choice(TEXTS),
        lambda: random.choice(words or TEXTS),
        lambda: random.choice(
            (None, True, False, [], {}, [None], {"a": {}}, [[]], [0] * 50, float("nan"), float("-inf"))
        ),
        lambda: random.randint(-4, 40),
    )
    return random.choice(makers)()
