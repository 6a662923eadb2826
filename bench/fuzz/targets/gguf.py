"""The GGUF writer: what metadata and tensors it is given, as JSON, is what the tests' reader finds in the file."""

import json
import math
from contextlib import suppress
from typing import Any

import torch

from minilora.errors import UsageError
from minilora.files.gguf import KINDS, encode, write_gguf
from tests.gguf_file import decoded, read_gguf

from ..room import fresh

SEEDS = [
    json.dumps(j).encode()
    for j in (
        [{"a.text": "é", "a.number": 7, "a.real": 0.5, "a.switch": True, "a.texts": ["x", ""], "a.numbers": [1, -2]}, {"w": ["f32", [2, 3]], "q": ["q8_0", [2, 32]], "p": ["q4_0", [1, 64]]}],
        [{}, {}], [{"general.alignment": 32}, {"x": ["bf16", [5]], "y": ["f16", [1, 1, 1]]}], [{"a": ""}, {"": ["f32", [0]]}],
    )
]  # fmt: skip
WORDS = [*KINDS, "general.architecture", "x"]


def target(data: bytes) -> None:
    try:
        metadata, shapes = json.loads(data)
        metadata = {str(k): v for k, v in metadata.items() if _is_value(v)}
        tensors = {str(k): (kind, tuple(shape)) for k, (kind, shape) in shapes.items() if _fits(kind, shape)}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UsageError("nothing that the writer would be given") from None
    path = fresh("gguf") / "x.gguf"
    generator = torch.Generator().manual_seed(len(data))
    values = {k: torch.randn(shape, generator=generator) for k, (_, shape) in tensors.items()}
    write_gguf(path, metadata, tensors, values.__getitem__)
    found, stored = read_gguf(path)
    written = {_sound(k): _as_read(v) for k, v in metadata.items()}
    if len(written) == len(metadata):
        assert found == written, (found, written)
    if len({_sound(k) for k in tensors}) == len(tensors):
        assert stored.keys() == {_sound(k) for k in tensors}
        for name, (kind, shape) in tensors.items():
            its = stored[_sound(name)]
            assert its.kind == kind and its.values.shape == shape
            assert torch.equal(
                its.values.flatten(), decoded(kind, encode(values[name].flatten(), kind).numpy().tobytes())
            )


def _is_value(value: Any) -> bool:
    if isinstance(value, list):
        return all(type(v) is str for v in value) or all(type(v) is int and abs(v) < 2**31 for v in value)
    in_range = (
        type(value) is int and 0 <= value < 2**32 or type(value) is float and math.isfinite(value) and abs(value) < 3e38
    )
    return type(value) in (str, bool) or in_range


def _fits(kind: Any, shape: Any) -> bool:
    with suppress(TypeError):
        sizes = [n for n in shape if type(n) is int and 0 < n <= 4096]
        return (
            kind in KINDS
            and 0 < len(sizes) == len(shape) <= 4
            and math.prod(sizes) < 1 << 16
            and sizes[-1] % KINDS[kind].block == 0
        )
    return False


def _sound(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _as_read(value: Any) -> Any:
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float32).item()
    return (
        [_sound(v) if isinstance(v, str) else v for v in value]
        if isinstance(value, list)
        else _sound(value)
        if isinstance(value, str)
        else value
    )
