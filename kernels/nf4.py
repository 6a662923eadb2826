"""NF4 with double quantisation (QLoRA: Dettmers et al., 2023), the bits of bitsandbytes 0.50: 4.13 bits a weight.

    W[i] = NF4[code[i]] * absmax[i // 64]        absmax[j] = DYNAMIC[nested_code[j]] * nested_absmax[j // 256] + offset

W is read flat, row by row. NF4 are 16 levels in [-1, 1] that hold equal shares of a normal distribution; two codes
lie in a byte, the first one in the upper half. The scale of each 64 weights is their largest magnitude; these scales,
less their mean, are in turn codes of 8 bits, of levels that stand closer near zero, with a scale of their own for
each 256. A byte is looked up whole, in a table of the 256 pairs of levels.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.kernels.quantized import QuantizedWeight, look_up, piece_of, piece_starts

BLOCK, NESTED_BLOCK = 64, 256
# quantiles of the normal distribution, as bitsandbytes lists them
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
SMALLEST = 1e-38  # a block whose largest magnitude is less is divided by this
CPU = torch.device("cpu")
BINS = 65536  # equal parts of [-1, 1] by which bitsandbytes finds the level of a scale on a CPU


class NF4Weight(QuantizedWeight):
    """codes [ceil(N K / 2)] uint8 and absmax, one a block: uint8 with nested_absmax and offset, else fp32."""

    name = "nf4"
    parts = ("codes", "absmax", "nested_absmax", "offset")
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        shape: tuple[int, int],
        codes: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None = None,
        offset: Tensor | None = None,
    ):
        super().__init__(shape)
        blocks = -(-self.numel() // BLOCK)
        assert codes.shape == (-(-self.numel() // 2),) and absmax.shape == (blocks,), (shape, codes.shape, absmax.shape)
        assert nested_absmax is None or nested_absmax.shape == (-(-blocks // NESTED_BLOCK),), nested_absmax.shape
        for name, part in zip(self.parts, (codes, absmax, nested_absmax, offset), strict=True):
            self.register_buffer(name, part)

    @classmethod
    def empty(cls, shape: Sequence[int], device: torch.device | str = "cpu", nested: bool = True) -> "NF4Weight":
        n, k = shape
        blocks = -(-n * k // BLOCK)
        codes = torch.empty(-(-n * k // 2), dtype=torch.uint8, device=device)
        if not nested:
            return cls((n, k), codes, torch.empty(blocks, device=device))
        absmax = torch.empty(blocks, dtype=torch.uint8, device=device)
        nested_absmax = torch.empty(-(-blocks // NESTED_BLOCK), device=device)
        return cls((n, k), codes, absmax, nested_absmax, torch.empty((), device=device))

    @classmethod
    def of(cls, weight: Tensor) -> "NF4Weight":
        return quantize(weight)

    def scales(self) -> Tensor:
        """The largest magnitude of each block, fp32."""
        absmax, nested, offset = self.absmax, self.nested_absmax, self.offset
        if nested is None or offset is None:
            return absmax
        levels = torch.index_select(dynamic_levels(absmax.device), 0, absmax.int())
        scale_blocks(levels, nested, NESTED_BLOCK)
        return levels.add_(offset)

    def kernel_parts(self, k: int) -> tuple[Tensor, ...]:
        """W is read flat, so that k may also be a block."""
        codes, *scales = self.buffers()
        return codes.view(-1, k // 2), *scales, levels(codes.device)

    def fill(self, out: Tensor, start: int) -> None:
        table, scales, flat = level_pairs(out.device), self.scales(), out.view(-1)
        first = start * self.shape[1]
        last = first + flat.numel()
        step = piece_of(out.device, self.numel())
        pairs = torch.empty(min(step, self.codes.numel() * 2) // 2 + 1, dtype=table.dtype, device=out.device)
        # blocks do not end where rows do: from the block that the first weight is in
        for begin in piece_starts(first // BLOCK * BLOCK, last, step, out):
            end = min(begin + step, -(-last // BLOCK) * BLOCK, self.numel())
            codes = self.codes[begin // 2 : -(-end // 2)]
            wide = look_up(table, codes, pairs[: len(codes)]).view(torch.float32)[: end - begin]
            scale_blocks(wide, scales[begin // BLOCK :], BLOCK)
            low, high = max(begin, first), min(end, last)
            flat[low - first : high - first].copy_(wide[low - begin : high - begin])


def scale_blocks(flat: Tensor, scales: Tensor, block: int) -> None:
    """flat[i] *= scales[i // block], in place; the last block may be short."""
    whole = len(flat) // block
    flat[: whole * block].view(whole, block).mul_(scales[:whole, None])
    if len(flat) % block:
        flat[whole * block :].mul_(scales[whole])


def dequantize_ref(weight: NF4Weight) -> Tensor:
    """The specification: W [N, K] in fp32, one weight at a time."""
    codes = torch.stack((weight.codes >> 4, weight.codes & 15), 1).view(-1)[: weight.numel()]
    index = torch.arange(weight.numel())
    absmax = weight.absmax
    if weight.nested_absmax is not None and weight.offset is not None:
        block = torch.arange(len(absmax))
        absmax = dynamic_levels()[absmax.long()] * weight.nested_absmax[block // NESTED_BLOCK] + weight.offset
    return (torch.tensor(NF4)[codes.long()] * absmax[index // BLOCK]).view(weight.shape)


def quantize(weight: Tensor, nested: bool = True) -> NF4Weight:
    """A weight [N, K] of any floating-point dtype in NF4; `nested` puts the scales in 8 bits too."""
    flat, step = weight.detach().reshape(-1), piece_of(weight.device, weight.numel())
    pieces = [_quantize_blocks(flat[begin : begin + step].float()) for begin in range(0, len(flat), step)]
    codes, absmax = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    shape = (weight.shape[0], weight.shape[1])
    if not nested:
        return NF4Weight(shape, codes, absmax)
    offset = absmax.mean()
    return NF4Weight(shape, codes, *quantize_scales(absmax - offset), offset)


def _quantize_blocks(flat: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, two a byte, and the largest magnitude of each block) of fp32 values."""
    absmax, whole = _absmax(flat, BLOCK), len(flat) // BLOCK
    scaled = flat.clone()
    scaled[: whole * BLOCK].view(whole, BLOCK).mul_(1.0 / absmax[:whole, None].clamp(min=SMALLEST))
    if len(flat) % BLOCK:  # bitsandbytes divides by the scale of a short block, and stores it clamped
        absmax[whole] = absmax[whole].clamp(min=SMALLEST)
        scaled[whole * BLOCK :].div_(absmax[whole])
    scaled.clamp_(-1, 1)
    codes = torch.zeros(len(flat) + len(flat) % 2, dtype=torch.uint8, device=flat.device)
    codes[len(flat) :] = NF4.index(0.0)
    levels = torch.tensor(NF4)
    for bound in ((levels[:-1] + levels[1:]) / 2).tolist():  # a third of bucketize's time
        codes[: len(flat)].add_((scaled > bound).view(torch.uint8))
    return (codes[::2] << 4) | codes[1::2], absmax


def quantize_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, the largest magnitude of each 256) of the scales of blocks, less their mean."""
    nested = _absmax(scales, NESTED_BLOCK)
    each = nested.repeat_interleave(NESTED_BLOCK)[: len(scales)]
    scaled = (scales * (1.0 / each)).clamp_(-1, 1)
    # a fused multiply-add, as bitsandbytes' compiler makes it: exact in fp64, rounded once
    bins = ((scaled + 1) * 0.5).double().mul_(BINS - 1).add_(0.5).float().nan_to_num_(0.0).int()
    codes = level_of_bin(scales.device)[bins]
    return codes.masked_fill_(each == 0, 0), nested


def _absmax(flat: Tensor, block: int) -> Tensor:
    """The largest magnitude of each block; the last one may be short."""
    return F.pad(flat, (0, -len(flat) % block)).view(-1, block).abs().amax(1)


@lru_cache
def levels(device: torch.device) -> Tensor:
    """The levels of weights, then those of scales."""
    return torch.cat((torch.tensor(NF4, device=device), dynamic_levels(device)))


@lru_cache
def level_pairs(device: torch.device) -> Tensor:
    """For each byte the levels of its two codes, as one number of 8 bytes: moved, never computed with."""
    levels = torch.tensor(NF4, device=device)
    return torch.stack((levels.repeat_interleave(16), levels.repeat(16)), 1).view(torch.float64).view(-1)


@lru_cache
def dynamic_levels(device: torch.device = CPU) -> Tensor:
    """The 256 levels of scales: a decimal exponent, and a fraction of the bits that are left (Dettmers, 2015)."""
    found = [0.0, 1.0]
    for exponent in range(7):
        edges = _edges(2**exponent)
        means = 10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        found += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(found), device=device)


def _edges(parts: int) -> Tensor:
    """torch.linspace(0.1, 1, parts + 1) with fused multiply-adds: the last bit of torch's differs by machine."""
    start, index = torch.tensor(0.1), torch.arange(parts + 1)
    step = (1 - start) / parts
    upward, downward = start.double() + index * step.double(), 1 - (parts - index) * step.double()
    return torch.where(index < (parts + 1) // 2, upward, downward).float()


@lru_cache
def level_of_bin(device: torch.device) -> Tensor:
    """For each of the 65,536 bins of [-1, 1] the nearest level's code."""
    levels = dynamic_levels()
    values = -1 + (2 * torch.arange(BINS)).float() / (BINS - 1)
    return torch.bucketize(values, (levels[:-1] + levels[1:]) * 0.5).to(device, torch.uint8)
