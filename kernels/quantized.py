"""Frozen weights in 4 and 8 bits: what the formats share (nf4.py, int8_rows.py, fp8_blocks.py, fp8_rows.py).

A weight [N, K] is codes, each of which names a level, and scales. It is reached through one verb, `weight_as(weight,
dtype)`, that gives it in the dtype products are made in: level * scale in fp32, rounded once. The wide copy lives for
one product. It is made in pieces that stay in the cache, so that memory is read once for the codes and written once
for the copy.
"""

from collections.abc import Sequence
from typing import Self, cast

import torch
from torch import Tensor, nn

from minilora.kernels.dequantize import WIDE, can_widen, widen
from minilora.kernels.lang import rows_of

PIECE = 2**20  # weights that are widened at a time on a CPU: 4 MiB in fp32, the caches of a few cores
FEW_THREADS = 2  # up to these, one thread's index_select beats all threads' take (Zen 4: 0.5 and 1.4 ns a look-up)


class QuantizedWeight(nn.Module):
    """A frozen weight [N, K]; its parts are buffers, so that they move, and are counted and saved, with the model."""

    requires_grad = False
    name = ""  # what a user calls the format
    parts: tuple[str, ...] = ()  # the names of the buffers
    codes: Tensor
    # of the weight that was quantised, where it is known: its first values, by which a base model is recognised, and
    # how far off this one is, ||W_quantised - W|| / ||W||; error_left: with the start of an adapter added (LoftQ)
    first: Tensor | None = None
    error: float | None = None
    error_left: float | None = None

    def __init__(self, shape: tuple[int, int]):
        super().__init__()
        self.shape = torch.Size(shape)

    def _apply(self, fn, recurse=True):
        """Move with the model, but keep the dtypes: a scale in bf16 would be another scale."""
        for name in self.parts:
            part = cast(Tensor | None, getattr(self, name))
            if part is not None:
                moved = fn(part)
                setattr(self, name, moved if moved.dtype == part.dtype else part.to(moved.device))
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the codes; products are never made in it."""
        return self.codes.dtype

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.buffers())

    @classmethod
    def empty(cls, shape: Sequence[int], device: torch.device | str = "cpu") -> Self:
        """A weight of that shape whose parts hold nothing yet."""
        raise NotImplementedError

    @classmethod
    def of(cls, weight: Tensor) -> Self:
        """A weight [N, K] of any floating-point dtype, quantised."""
        raise NotImplementedError

    def copy_(self, other: Self) -> None:
        """Take over the parts of a weight of the same format and shape, and what it was made from."""
        for name in self.parts:
            part = cast(Tensor | None, getattr(self, name))
            if part is not None:
                part.copy_(getattr(other, name))
        self.first, self.error = other.first, other.error

    def first_values(self, count: int) -> Tensor:
        """The first `count` weights, row by row, as they were before they were quantised, where that is known."""
        if self.first is not None:
            return self.first[:count]
        return self.weight_as(torch.float32, slice(0, -(-count // self.shape[1]))).flatten()[:count]

    def numel(self) -> int:
        return self.shape.numel()

    def weight_as(self, dtype: torch.dtype, rows: slice | None = None) -> Tensor:
        """W [N, K], or these rows of it, in a dtype."""
        start, stop, step = (rows or slice(None)).indices(self.shape[0])
        assert step == 1, rows
        out = torch.empty((max(stop - start, 0), self.shape[1]), dtype=dtype, device=self.device)
        if out.numel():
            self.write(out, start)
        return out

    def write(self, out: Tensor, start: int) -> None:
        """The same as `fill`, by a kernel where there is one for it."""
        if can_widen(self.name, self.numel(), out, start):
            widen(self.name, self.kernel_parts, out, start)
        else:
            self.fill(out, start)

    def kernel_parts(self, k: int) -> tuple[Tensor, ...]:
        """Codes, in rows of k = K weights, and what gives their scales: what kernels/dequantize.py takes."""
        assert k == self.shape[1], (k, self.shape)
        return tuple(self.buffers())

    def fill(self, out: Tensor, start: int) -> None:
        """Write W, from a row on, into out [n, K] of any floating-point dtype."""
        raise NotImplementedError

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """x W^T + b [T, N] in the dtype of x, by a format that multiplies its codes; None: W is to be widened."""
        return None

    def input_gradient(self, dy: Tensor) -> Tensor | None:
        """dY W [T, K] in the dtype of dY, likewise."""
        return None


Weight = Tensor | QuantizedWeight


def weight_as(weight: Weight, dtype: torch.dtype, rows: slice | None = None) -> Tensor:
    """A weight [N, K], or these rows of it, in a dtype; a plain tensor that has it already comes as it is."""
    if isinstance(weight, QuantizedWeight):
        return weight.weight_as(dtype, rows)
    return (weight if rows is None else weight[rows]).to(dtype)


def format_of(weight: Weight) -> str:
    """What kernels call the format of a weight."""
    return WIDE if isinstance(weight, Tensor) else weight.name


def kernel_parts(weight: Weight) -> tuple[Tensor, ...]:
    """What kernels read a weight from: one tensor, or codes and scales."""
    return (rows_of(weight),) if isinstance(weight, Tensor) else weight.kernel_parts(weight.shape[1])


def relative_error(weight: QuantizedWeight, true: Tensor) -> float:
    """||W_quantised - W|| / ||W||, Frobenius, by pieces; 0 for a W of zeros."""
    height = max(1, piece_of(weight.device, weight.numel()) // max(1, weight.shape[1]))
    off = size = 0.0
    for start in range(0, weight.shape[0], height):
        rows = slice(start, start + height)
        wanted = true[rows].float()
        size += torch.linalg.vector_norm(wanted).item() ** 2
        off += torch.linalg.vector_norm(weight.weight_as(torch.float32, rows).sub_(wanted)).item() ** 2
    return (off / size) ** 0.5 if size else 0.0


def piece_of(device: torch.device, count: int) -> int:
    """How many of `count` weights are widened at a time: on a GPU all, where a launch costs more than the memory."""
    return max(count, 1) if device.type == "cuda" else PIECE


def piece_starts(first: int, last: int, step: int, out: Tensor) -> range:
    """Where the pieces of what is written to out begin; in a dry run the first alone, which takes as much memory as any."""
    return range(first, min(last, first + 1) if out.is_meta else last, step)


def look_up(table: Tensor, codes: Tensor, out: Tensor) -> Tensor:
    """table[codes] into out; table, out of one dtype, codes of integers that are not negative, all of one dimension."""
    if codes.device.type != "cpu" or torch.get_num_threads() <= FEW_THREADS:
        return torch.index_select(table, 0, codes.int(), out=out)
    return torch.take(table, codes.long(), out=out)
