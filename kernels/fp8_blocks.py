"""Weights in FP8 e4m3, a scale for each block of 128 x 128, as in the -FP8 folders of Qwen: 8 bits a weight.

    W[n, k] = e4m3[n, k] * scale[n // 128, k // 128]

The files call the scale weight_scale_inv, the inverse of what W was multiplied by (DeepSeek-V3, 2024). In those
models' own inference x goes into FP8 too; here it stays in the compute dtype.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minilora.kernels.quantized import QuantizedWeight, piece_of, piece_starts

BLOCK = 128
E4M3 = torch.float8_e4m3fn
LIFT = 256.0  # 2**8, see as_half
LARGEST = torch.finfo(E4M3).max  # 448


class FP8Weight(QuantizedWeight):
    """codes [N, K] e4m3 and scales [ceil(N / 128), ceil(K / 128)] fp32."""

    name = "fp8"
    parts = ("codes", "scales")
    scales: Tensor

    def __init__(self, codes: Tensor, scales: Tensor):
        super().__init__((codes.shape[0], codes.shape[1]))
        assert codes.dtype == E4M3 and scales.shape == grid(self.shape), (codes.dtype, codes.shape, scales.shape)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @classmethod
    def empty(cls, shape: Sequence[int], device: torch.device | str = "cpu") -> "FP8Weight":
        n, k = shape
        return cls(torch.empty(n, k, dtype=E4M3, device=device), torch.empty(grid(torch.Size(shape)), device=device))

    @classmethod
    def of(cls, weight: Tensor) -> "FP8Weight":
        return quantize(weight)

    def kernel_parts(self, k: int) -> tuple[Tensor, ...]:
        return self.codes.view(torch.int8), self.scales

    def fill(self, out: Tensor, start: int) -> None:
        k = self.shape[1]
        step = max(1, piece_of(out.device, self.numel()) // k)
        wide = torch.empty((min(step, len(out)), k), device=out.device)
        for begin in piece_starts(0, len(out), step, out):
            piece = out[begin : begin + step]
            rows = slice(start + begin, start + begin + len(piece))
            values = wide[: len(piece)].copy_(as_half(self.codes[rows]))
            scales = self.scales[torch.arange(rows.start, rows.stop, device=out.device) // BLOCK] * LIFT
            whole = k // BLOCK
            values[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)).mul_(scales[:, :whole, None])
            if k % BLOCK:
                values[:, whole * BLOCK :].mul_(scales[:, whole:])
            piece.copy_(values)


def as_half(codes: Tensor) -> Tensor:
    """Finite e4m3 / LIFT as fp16: the same bits, moved; torch's own cast goes byte by byte on a CPU."""
    # s eeee mmm, sign-extended and shifted, is s s eeee mmm 0000000; fp16 has s 0 eeee mmm 0000000, and 8 more bias
    return codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4001).view(torch.float16)


def grid(shape: torch.Size) -> tuple[int, int]:
    """How many blocks there are of a weight of that shape, down and across; those at the edges may be smaller."""
    return -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)


def _spread(scales: Tensor, shape: torch.Size) -> Tensor:
    """The scale of every weight."""
    return scales.repeat_interleave(BLOCK, 0)[: shape[0]].repeat_interleave(BLOCK, 1)[:, : shape[1]]


def dequantize_ref(weight: FP8Weight) -> Tensor:
    """The specification: W [N, K] in fp32."""
    return weight.codes.float() * _spread(weight.scales, weight.shape)


def quantize(weight: Tensor) -> FP8Weight:
    """A weight [N, K] of any floating-point dtype in FP8 by blocks; a block of zeros has the scale 1."""
    wide, (n, k) = weight.detach().float(), grid(weight.shape)
    padded = wide.new_zeros(n * BLOCK, k * BLOCK)
    padded[: wide.shape[0], : wide.shape[1]] = wide
    absmax = padded.view(n, BLOCK, k, BLOCK).abs().amax((1, 3))
    factor = torch.where(absmax > 0, LARGEST / absmax, 1)
    codes = (wide * _spread(factor, weight.shape)).clamp_(-LARGEST, LARGEST).to(E4M3)
    return FP8Weight(codes, 1 / factor)
