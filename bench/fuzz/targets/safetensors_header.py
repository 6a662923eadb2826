"""The header of a safetensors file, against the reference library: what it rejects is never taken, what both take is the same.

The reader is stricter than the reference in what STRICTER lists, and in nothing else.
"""

import io
import json
import math
import struct
from pathlib import Path
from random import Random

import safetensors

from minilora.errors import ModelError
from minilora.files.safetensors import DTYPES, NAMES, _read_header

from ..mutator import mutate as mutated

# why we reject what safetensors 0.8 takes -> a piece of our message
STRICTER = {
    "a key twice in one object": "duplicate key",
    "fields beside dtype, shape and data_offsets": "and nothing else",
    "a name that is empty, long, or steers a terminal": "1 to 512 printable characters",
    "dtypes that no model here has (U16 to U64, F4, F6, F8_E5M2, F8_E8M0, C64)": "known are",
    "more than 8 sizes, or sizes of 2^63 and more": "list of at most",
    "offsets of 2^63 and more, of a tensor without bytes": "pair of byte numbers",
    "a product of sizes beyond any memory, beside a size of 0": "more than any memory",
    "blanks before the first brace": "does not begin with",
    "minus zero as a size": "is negative",
    "half a surrogate pair": "__metadata__ must map",
    "numbers of thousands of digits in a field that it ignores": "Exceeds the limit",
}
WORDS = [
    '"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', "dtype", "shape", "data_offsets", "__metadata__", *DTYPES, "U64", "F8_E5M2", "C64",
    "[0,0]", "[0,8]", '"F32"', "-0", "1e0", "\\ud800", "\\u0000", "18446744073709551616", "9223372036854775807", "4294967296,4294967296",
]  # fmt: skip
GOOD = (
    {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
    {"__metadata__": {"a": "b"}, "v": {"dtype": "I8", "shape": [], "data_offsets": [0, 1]},
     "w": {"dtype": "BF16", "shape": [2, 1], "data_offsets": [1, 5]}, "z": {"dtype": "I64", "shape": [0], "data_offsets": [5, 5]}},
    {"a": {"dtype": "F16", "shape": [2, 2, 1], "data_offsets": [0, 8]}, "b": {"dtype": "BOOL", "shape": [3], "data_offsets": [8, 11]}},
    {},
)  # fmt: skip


def _file(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


SEEDS = [
    _file(json.dumps(j).encode(), bytes(range(max((e["data_offsets"][1] for n, e in j.items() if n[0] != "_"), default=0))))
    for j in GOOD
]  # fmt: skip


def target(data: bytes) -> None:
    try:
        entries, _, start = _read_header(Path("x"), io.BytesIO(data).read, len(data))
    except ModelError as error:
        theirs = _reference(data)
        assert theirs is None or any(rule in error.what for rule in STRICTER.values()), (
            f"stricter than it says: {error.what}"
        )
        raise
    theirs = _reference(data)
    assert theirs is not None, "the reference rejects what is taken"
    assert theirs.keys() == entries.keys()
    for name, (dtype, shape, first, end) in entries.items():
        its = theirs[name]
        assert (NAMES[dtype], list(shape)) == (its["dtype"], its["shape"])
        assert bytes(its["data"]) == data[start + first : start + end]
        assert math.prod(shape) * dtype.itemsize == end - first


def _reference(data: bytes) -> dict | None:
    """What safetensors reads; None if it rejects the file."""
    try:
        return dict(safetensors.deserialize(data))
    except safetensors.SafetensorError:
        return None


def mutate(data: bytes, random: Random, other: bytes) -> bytes:
    """The header changed, mostly with a length before it that fits, and the number of bytes behind it that it had."""
    (length,) = struct.unpack("<Q", data[:8].ljust(8, b"\0"))
    length = min(length, len(data))
    header, rest = data[8 : 8 + length], data[8 + length :]
    header = mutated(header, random, WORDS, other[8:])
    if random.random() < 0.2:
        rest = mutated(rest, random, (), other[8:])
    if random.random() < 0.1:
        return mutated(_file(header, rest), random, (), other)
    return _file(header, rest)
