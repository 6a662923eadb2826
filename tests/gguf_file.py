"""A small reader of GGUF files for tests, written from the description of the format."""

import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SCALARS = {4: "I", 5: "i", 6: "f", 7: "?", 10: "Q"}
KINDS = {0: ("f32", 1, 4), 1: ("f16", 1, 2), 30: ("bf16", 1, 2), 8: ("q8_0", 32, 34), 2: ("q4_0", 32, 18)}


class Stored(NamedTuple):
    kind: str
    values: Tensor  # fp32, of the shape that torch has


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """The metadata and the tensors of a file, which has nothing but them and zeros between."""
    raw, at = path.read_bytes(), 0

    def take(form: str) -> Any:
        nonlocal at
        found = struct.unpack_from("<" + form, raw, at)
        at += struct.calcsize("<" + form)
        return found[0] if len(found) == 1 else found

    def text() -> str:
        n = take("Q")
        return take(f"{n}s").decode() if n else take("0s").decode()

    def value(kind: int) -> Any:
        if kind == 9:
            inner, n = take("I"), take("Q")
            return [value(inner) for _ in range(n)]
        return text() if kind == 8 else take(SCALARS[kind])

    magic, version, count, keys = take("4sIQQ")
    assert (magic, version) == (b"GGUF", 3)
    metadata = {}
    for _ in range(keys):
        key = text()
        metadata[key] = value(take("I"))
    table = {}
    for _ in range(count):
        name = text()
        sizes = [take("Q") for _ in range(take("I"))]
        table[name] = (tuple(reversed(sizes)), *take("IQ"))
    start = at + -at % 32
    tensors, end = {}, start
    for name, (shape, number, offset) in table.items():
        kind, block, size = KINDS[number]
        assert start + offset == end and not any(raw[at:end]), name  # aligned, one after the other
        at = end + torch.Size(shape).numel() // block * size
        tensors[name] = Stored(kind, decoded(kind, raw[end:at]).reshape(shape))
        end = at + -at % 32
    assert len(raw) == end
    return metadata, tensors


def decoded(kind: str, raw: bytes) -> Tensor:
    """The numbers that bytes stand for, fp32 [n]."""
    plain = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    if kind in plain:
        return torch.frombuffer(bytearray(raw), dtype=plain[kind]).float()
    blocks = torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(-1, {"q8_0": 34, "q4_0": 18}[kind])
    d, codes = blocks[:, :2].contiguous().view(torch.float16).float(), blocks[:, 2:]
    if kind == "q8_0":
        return (d * codes.contiguous().view(torch.int8).float()).flatten()
    return (d * (torch.cat([codes & 15, codes >> 4], 1).float() - 8)).flatten()
