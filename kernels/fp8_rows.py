"""Weights in FP8 e4m3, each row with a scale of its own, and products in FP8: 8 bits a weight.

    W[n, k] = e4m3[n, k] * scale[n]        scale = absmax / 448

Other formats are widened for a product. Here x goes into FP8 too, a scale for each token, and the tensor cores of
Hopper and Ada multiply the codes, at twice the rate of bf16 (FP8 formats for deep learning: Micikevicius et al., 2022):

    y  = (x8 W8^T) * scale_x * scale_w^T                           x8 scale_x ~ x, by rows
    dX = (dY8 W8) * scale_dy          dY8 scale_dy ~ dY * scale_w, by rows

In dX the scales of W lie along the sum, so that they go into dY before it is rounded. The tensor cores read both
operands along the sum, which for dX is W transposed: it is made from the same codes for each product, so that a weight
stays one byte, and the largest one is there twice for the time of its product. Adapters are not in these products: they
take x and dY as they are.

The products are torch._scaled_mm's, on a GPU of capability 8.9 or later, in bf16; its CPU path computes the same.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minilora.kernels.dispatch import capability
from minilora.kernels.quantized import QuantizedWeight, piece_of

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448


class FP8RowsWeight(QuantizedWeight):
    """codes [N, K] e4m3 and scales [N, 1] fp32."""

    name = "fp8-rows"
    parts = ("codes", "scales")
    scales: Tensor

    def __init__(self, codes: Tensor, scales: Tensor):
        super().__init__((codes.shape[0], codes.shape[1]))
        assert codes.dtype == E4M3 and scales.shape == (codes.shape[0], 1), (codes.dtype, codes.shape, scales.shape)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @classmethod
    def empty(cls, shape: Sequence[int], device: torch.device | str = "cpu") -> "FP8RowsWeight":
        n, k = shape
        return cls(torch.empty(n, k, dtype=E4M3, device=device), torch.empty(n, 1, device=device))

    @classmethod
    def of(cls, weight: Tensor) -> "FP8RowsWeight":
        return cls(*by_rows(weight.detach()))

    def fill(self, out: Tensor, start: int) -> None:
        step = max(1, piece_of(out.device, self.numel()) // self.shape[1])
        for begin in range(0, len(out), step):
            piece = out[begin : begin + step]
            rows = slice(start + begin, start + begin + len(piece))
            piece.copy_(self.codes[rows].float().mul_(self.scales[rows]))

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        if not self._multiplies(x):
            return None
        codes, scales = by_rows(x)
        return _scaled(codes, self.codes.T, scales, self.scales.T, x.dtype, bias)

    def input_gradient(self, dy: Tensor) -> Tensor | None:
        if not self._multiplies(dy):
            return None
        codes, scales = by_rows(dy, self.scales.T)
        transposed = self.codes.view(torch.int8).T.contiguous().view(E4M3)  # [K, N]
        ones = torch.ones(1, self.shape[1], device=dy.device)
        return _scaled(codes, transposed.T, scales, ones, dy.dtype)

    def _multiplies(self, x: Tensor) -> bool:
        """Whether the codes are multiplied; if not, W is widened."""
        fits = not any(size % 16 for size in self.shape)
        return fits and (not x.is_cuda or (x.dtype == torch.bfloat16 and has_fp8(x.device)))


def has_fp8(device: torch.device) -> bool:
    """Whether a GPU multiplies FP8."""
    return device.type == "cuda" and capability(device) >= (8, 9)


def by_rows(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [T, K], times a factor [1, K], as e4m3 [T, K] and a scale [T, 1] in fp32 for each row; a row of zeros has 1."""
    wide = x.float() if factor is None else x.float() * factor
    absmax = wide.abs().amax(1, keepdim=True)
    scales = torch.where(absmax > 0, absmax / LARGEST, 1)
    return (wide / scales).clamp_(-LARGEST, LARGEST).to(E4M3), scales


def _scaled(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """(a b) * scale_a * scale_b + bias: a [M, K], b [K, N] by columns, scales [M, 1] and [1, N]."""
    return torch._scaled_mm(a, b, scale_a, scale_b.contiguous(), bias=bias, out_dtype=dtype)


def product_ref(x: Tensor, weight: FP8RowsWeight, bias: Tensor | None = None) -> Tensor:
    """The specification: y [T, N] of x [T, K], in the dtype of x."""
    codes, scales = by_rows(x)
    y = codes.float() @ weight.codes.float().T * scales * weight.scales.T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def input_gradient_ref(dy: Tensor, weight: FP8RowsWeight) -> Tensor:
    """The specification: dX [T, K] of dY [T, N], in the dtype of dY."""
    codes, scales = by_rows(dy, weight.scales.T)
    return (codes.float() @ weight.codes.float() * scales).to(dy.dtype)
