"""The safetensors format: a memory-mapped reader, stricter than the reference library, and a streaming writer.

A file is 8 bytes of header length (little endian), a JSON header {name: {dtype, shape, data_offsets}} and the tensors' bytes
(format: https://huggingface.co/docs/safetensors). The reader refuses what can only be a mistake or an attack: duplicate
or unknown keys, holes, overlaps, trailing bytes, sizes that do not follow from shape and dtype. Nothing is allocated on the
word of a header.
"""

import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ModelError
from .model_folder import check_is_itself
from .regular import open_file
from .strict_json import parse_json

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000
MAX_TENSORS = 1_000_000
MAX_RANK = 8


class Entry(NamedTuple):
    """One tensor of a file: its type, its shape, and where its bytes lie after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """A mapped file. `entries` is the table of contents; `tensor(name)` is a view of the mapping, to be copied from."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with open_file(path, ModelError) as file:
                size = os.fstat(file.fileno()).st_size
                check_is_itself(path, file.read(64))
                file.seek(0)
                self.entries, self.metadata, self._data_start = _read_header(path, file.read, size)
                # private copy-on-write pages: torch wants a writable buffer, the file stays as it is
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise ModelError(f"{path}: {error.strerror}", "Check the path and the file's permissions.") from None

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name on the CPU; its memory is the mapping's."""
        dtype, shape, start, end = self.entries[name]
        if start == end:
            return torch.empty(shape, dtype=dtype)
        offset, count = self._data_start + start, math.prod(shape)
        if offset % dtype.itemsize:
            return torch.frombuffer(bytearray(self._map[offset : offset + end - start]), dtype=dtype).reshape(shape)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset).reshape(shape)

    def forget(self, name: str) -> None:
        """Give the pages of a tensor that was copied back to the system, so that they do not count twice."""
        entry = self.entries[name]
        first = (self._data_start + entry.start) // mmap.PAGESIZE * mmap.PAGESIZE
        length = self._data_start + entry.end - first
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, length)


def _read_header(path: Path, read: Callable[[int], bytes], size: int) -> tuple[dict[str, Entry], dict[str, str], int]:
    """(entries, metadata, where the data starts) of a file of `size` bytes; ModelError names the first broken rule."""

    def refuse(rule: str) -> ModelError:
        return ModelError(
            f"{path}: {rule}", "The file is damaged or not a safetensors file: download or copy it again."
        )

    prefix = read(8)
    if len(prefix) < 8:
        raise refuse(f"{size} bytes is too short for a safetensors file")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER:
        raise refuse(f"the header would be {length} bytes; {MAX_HEADER} is the limit")
    if 8 + length > size:
        raise refuse(f"the header would end at byte {8 + length}, the file at byte {size} (cut short?)")
    raw = read(length)
    if raw[:1] != b"{":
        raise refuse("the header does not begin with '{'")
    try:
        header = parse_json(raw, parse_constant=_no_constant, parse_int=_not_negative)
    except ValueError as error:
        raise refuse(f"the header is not valid JSON ({error})") from None
    metadata = header.pop("__metadata__", {})
    metadata = {} if metadata is None else metadata  # null is what MLX writes
    if type(metadata) is not dict or not all(_is_text(k) and _is_text(v) for k, v in metadata.items()):
        raise refuse("__metadata__ must map strings to strings")
    if len(header) > MAX_TENSORS:
        raise refuse(f"{len(header)} tensors; {MAX_TENSORS} is the limit")
    try:
        entries = {_checked_name(name): _entry(name, value) for name, value in header.items()}
        end = 0
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
            if entry.start != end:
                raise ValueError(f"tensor {name!r} starts at data byte {entry.start}, the one before ends at {end}")
            end = entry.end
    except ValueError as error:
        raise refuse(str(error)) from None
    if 8 + length + end != size:
        raise refuse(f"the tensors end at byte {8 + length + end}, the file at byte {size} (cut short?)")
    return entries, metadata, 8 + length


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _not_negative(digits: str) -> int:
    if digits.startswith("-"):  # also -0, which is no size for other readers
        raise ValueError(f"{digits[:40]} is negative")
    return int(digits)


def _is_text(value: Any) -> bool:
    """A string without half surrogate pairs."""
    return type(value) is str and not any("\ud800" <= c <= "\udfff" for c in value)


def _checked_name(name: str) -> str:
    if not 0 < len(name) <= 512 or not name.isprintable():
        raise ValueError(f"tensor name {name[:80]!r} must be 1 to 512 printable characters")
    return name


def _entry(name: str, value: Any) -> Entry:
    if type(value) is not dict or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} must have dtype, shape and data_offsets and nothing else")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPES:
        raise ValueError(f"tensor {name!r} has dtype {str(dtype)[:40]!r}; known are {', '.join(DTYPES)}")
    if type(shape) is not list or len(shape) > MAX_RANK or not all(_is_size(n) for n in shape):
        raise ValueError(f"tensor {name!r} has a shape that is not a list of at most {MAX_RANK} sizes")
    if type(offsets) is not list or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise ValueError(f"tensor {name!r} has data_offsets that are not a pair of byte numbers")
    if math.prod(n for n in shape if n) * DTYPES[dtype].itemsize >= 2**63:
        raise ValueError(f"tensor {name!r} has shape {shape}, more than any memory")
    start, end = offsets
    need = math.prod(shape) * DTYPES[dtype].itemsize
    if end - start != need:
        raise ValueError(f"tensor {name!r} {dtype} {shape} needs {need} bytes; its data_offsets span {end - start}")
    return Entry(DTYPES[dtype], tuple(shape), start, end)


def _is_size(n: Any) -> bool:
    return type(n) is int and 0 <= n < 2**63


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file of the named tensors; `tensor(name)` is asked for one at a time, in any order, and must fit its shape.

    The bytes are on the disk when this returns. The caller gives a name that does not exist yet (see atomic.py).
    """
    names = sorted(shapes, key=lambda n: (-shapes[n][0].itemsize, n))  # widest first: every tensor lies aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in names:
        dtype, shape = shapes[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name in names:
            value = tensor(name)
            assert (value.dtype, tuple(value.shape)) == shapes[name], (name, value.dtype, value.shape, shapes[name])
            file.write(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file of tensors that are in memory already."""
    shapes = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    write_safetensors(path, shapes, tensors.__getitem__, metadata)
