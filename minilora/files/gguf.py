"""A streaming writer of GGUF, the format of llama.cpp and Ollama.

A file is a magic number, a version, two counts, the metadata (key, type, value), a table of the tensors (name, sizes with the
innermost first, kind, offset) and the tensors' bytes, each at a multiple of 32 (a kind is a ggml type; format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Quantised kinds store a row in blocks of 32 values with one scale each:

    q8_0    scale fp16, 32 x int8         x = d q,         d = max|x| / 127
    q4_0    scale fp16, 16 x two codes    x = d (q - 8),   d = -x_max / 8 for the x_max of largest magnitude, its sign kept
"""

import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
BLOCK = 32
NUMBERS_AT_ONCE = 1 << 22  # numbers of a tensor that are encoded at a time


class Kind(NamedTuple):
    """How a tensor's numbers are written: its number in the table of tensors, and bytes for each `block` of them."""

    number: int
    block: int
    size: int


KINDS = {
    "f32": Kind(0, 1, 4), "f16": Kind(1, 1, 2), "bf16": Kind(30, 1, 2), "q8_0": Kind(8, BLOCK, 34), "q4_0": Kind(2, BLOCK, 18),
}  # fmt: skip
PLAIN = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

Value = str | bool | int | float | list[str] | list[int]  # an int is written as uint32, a float as float32
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9


def write_gguf(
    path: Path,
    metadata: Mapping[str, Value],
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    tensor: Callable[[str], Tensor],
) -> None:
    """Write a file of the named tensors, each of a kind (KINDS) and a shape; the rows of a quantised one are whole blocks.

    `tensor(name)` is asked for one at a time, of any floating dtype. The bytes are on the disk when this returns. The caller gives
    a name that does not exist yet (see atomic.py).
    """
    with open(path, "xb") as file:
        file.write(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
        file.writelines(_text(key) + _typed(value) for key, value in metadata.items())
        offset = 0
        for name, (kind, shape) in tensors.items():
            sizes = struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), KINDS[kind].number, offset)
            file.write(_text(name) + sizes)
            offset += _padded(_bytes(kind, shape))
        _pad(file)
        for name, (kind, shape) in tensors.items():
            value = tensor(name)
            assert tuple(value.shape) == shape, (name, value.shape, shape)
            file.writelines(piece.numpy().data for piece in _encoded(value, kind))
            _pad(file)
        file.flush()
        os.fsync(file.fileno())


def encode(x: Tensor, kind: str) -> Tensor:
    """The bytes of numbers x [n], uint8; a quantised kind takes whole blocks."""
    if kind in PLAIN:
        return x.to(PLAIN[kind]).view(torch.uint8)
    blocks = x.float().reshape(-1, BLOCK)
    return {"q8_0": _q8_0, "q4_0": _q4_0}[kind](blocks).flatten()


def _q8_0(x: Tensor) -> Tensor:
    """Blocks [n, 32] fp32 -> [n, 34] uint8."""
    d = x.abs().amax(1, keepdim=True) / 127
    scaled = x * _reciprocal(d)
    q = scaled.sign() * (scaled.abs() + 0.5).floor()  # halves away from zero, as llama.cpp rounds
    return torch.cat([d.half().view(torch.uint8), q.to(torch.int8).view(torch.uint8)], 1)


def _q4_0(x: Tensor) -> Tensor:
    """Blocks [n, 32] fp32 -> [n, 18] uint8: byte i has the codes of x[i] (low bits) and of x[i + 16]."""
    d = x.gather(1, x.abs().argmax(1, keepdim=True)) / -8
    q = (x * _reciprocal(d) + 8.5).trunc().clamp(0, 15).to(torch.uint8)
    low, high = q.chunk(2, 1)
    return torch.cat([d.half().view(torch.uint8), low | high << 4], 1)


def _reciprocal(d: Tensor) -> Tensor:
    return torch.where(d == 0, 0, 1 / d)


def _encoded(x: Tensor, kind: str) -> Iterator[Tensor]:
    for piece in x.detach().cpu().contiguous().flatten().split(NUMBERS_AT_ONCE):
        yield encode(piece, kind)


def _bytes(kind: str, shape: tuple[int, ...]) -> int:
    assert shape[-1] % KINDS[kind].block == 0, (kind, shape)
    return math.prod(shape) // KINDS[kind].block * KINDS[kind].size


def _padded(n: int) -> int:
    return n + -n % ALIGNMENT


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "replace")
    return struct.pack("<Q", len(raw)) + raw


def _typed(value: Value) -> bytes:
    """The type of a value, and the value."""
    match value:
        case bool():
            return struct.pack("<I?", BOOL, value)
        case int():
            return struct.pack("<II", UINT32, value)
        case float():
            return struct.pack("<If", FLOAT32, value)
        case str():
            return struct.pack("<I", STRING) + _text(value)
        case [int(), *_]:
            return struct.pack(f"<IIQ{len(value)}i", ARRAY, INT32, len(value), *value)
        case _:
            return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_text, value))  # pyright: ignore[reportArgumentType]
