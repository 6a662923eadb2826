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

The products are torch._scaled_mm's, on a GPU of capability 8.9 or later, in bf16; its CPU path computes the same. x and dY
are rounded by a kernel that reads them once from memory and writes a byte a number.
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from minilora.kernels.dispatch import capability, use_triton
from minilora.kernels.lang import PINNED, jit, load, next_power_of_2, rows_of, tl
from minilora.kernels.launch import Launch, per_shape
from minilora.kernels.quantized import QuantizedWeight, piece_of, piece_starts

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448
TINY = 1e-30  # of the largest number of a row, below which all become zero: no scale is infinite
MAX_WIDTH = 32768  # of the rows that a program can hold without spilling
PIECE_ROWS = 256  # that are rounded at a time by torch, whose steps need fp32 copies


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
        for begin in piece_starts(0, len(out), step, out):
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
        codes, scales = by_rows(dy, self.scales)
        transposed = self.codes.view(torch.int8).T.contiguous().view(E4M3)  # [K, N]
        return _scaled(codes, transposed.T, scales, _ones(self.shape[1], dy.device), dy.dtype)

    def _multiplies(self, x: Tensor) -> bool:
        """Whether the codes are multiplied; if not, W is widened."""
        fits = not any(size % 16 for size in self.shape)
        return fits and (not x.is_cuda or (x.dtype == torch.bfloat16 and has_fp8(x.device)))


def has_fp8(device: torch.device) -> bool:
    """Whether a GPU multiplies FP8."""
    return device.type == "cuda" and capability(device) >= (8, 9)


@jit
def _rows_kernel(
    x_ptr,
    factor_ptr,
    codes_ptr,
    scales_ptr,
    x_stride,
    N,
    TINY: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program: one row. factor_ptr is None without a factor."""
    i_m = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK)
    b_x = load(x_ptr + i_m * x_stride + o_n, o_n < N, ACC)
    if factor_ptr is not None:
        b_x *= load(factor_ptr + o_n, o_n < N, ACC)
    absmax = tl.maximum(tl.max(tl.abs(b_x), 0), TINY)
    tl.store(scales_ptr + i_m, absmax * (1 / LARGEST))
    tl.store(codes_ptr + i_m * N + o_n, e4m3(b_x * tl.div_rn(LARGEST, absmax), LARGEST), mask=o_n < N)


@jit
def e4m3(x, LARGEST: tl.constexpr):
    """The codes of fp32 numbers, to the nearest, ties to even, as bytes: cards and interpreters without FP8 make the same."""
    size = tl.minimum(tl.abs(x), LARGEST)
    bits = size.to(tl.int32, bitcast=True)
    # s eeee mmm has 3 of fp32's 23 bits of fraction, and a bias of 7, not 127
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # below 2^-6 codes count steps of 2^-9, which are what fp32 rounds to at 2^14
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, small, normal)
    code = tl.where(tl.abs(x) >= 0, code, 0x7F)  # NaN is not
    return (code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@per_shape
def _launch(device: torch.device, rows: int, n: int, stride: int) -> Launch:
    """16 values a thread, 32 in the longest rows."""
    block = next_power_of_2(n)
    options = {"BLOCK": block, "ACC": tl.float32, "num_warps": min(32, max(1, block // 512)), **PINNED}
    return Launch(device, rows, (stride, n), TINY=TINY, LARGEST=LARGEST, **options)


def by_rows(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [T, K], times a factor [K, 1] in fp32, as e4m3 [T, K], and a scale [T, 1] in fp32 for each row."""
    codes = torch.empty(x.shape, dtype=E4M3, device=x.device)
    scales = torch.empty(x.shape[0], 1, device=x.device)
    x = rows_of(x)
    if use_triton(x) and x.shape[1] <= MAX_WIDTH and x.dtype != torch.float64:
        if x.numel():
            with torch.cuda.device_of(x):
                launch = _launch(x.device, *x.shape, x.stride(0))
                launch(_rows_kernel, x, factor, codes.view(torch.uint8), scales)
        return codes, scales
    for start in range(0, x.shape[0], PIECE_ROWS):
        rows = slice(start, start + PIECE_ROWS)
        codes[rows], scales[rows] = by_rows_ref(x[rows], factor)
    return codes, scales


def by_rows_ref(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The specification of by_rows."""
    wide = x.float() if factor is None else x.float() * factor.T
    absmax = wide.abs().amax(1, keepdim=True).clamp_(min=TINY)
    up = torch.full_like(absmax, LARGEST) / absmax  # torch divides a number by a tensor in two steps
    return (wide * up).clamp_(-LARGEST, LARGEST).to(E4M3), absmax * (1 / LARGEST)


def _scaled(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """(a b) * scale_a * scale_b + bias: a [M, K], b [K, N] by columns, scales [M, 1] and [1, N]."""
    return torch._scaled_mm(a, b, scale_a, scale_b.contiguous(), bias=bias, out_dtype=dtype)


@lru_cache
def _ones(n: int, device: torch.device) -> Tensor:
    return torch.ones(1, n, device=device)


def product_ref(x: Tensor, weight: FP8RowsWeight, bias: Tensor | None = None) -> Tensor:
    """The specification: y [T, N] of x [T, K], in the dtype of x."""
    codes, scales = by_rows_ref(x)
    y = codes.float() @ weight.codes.float().T * scales * weight.scales.T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def input_gradient_ref(dy: Tensor, weight: FP8RowsWeight) -> Tensor:
    """The specification: dX [T, K] of dY [T, N], in the dtype of dY."""
    codes, scales = by_rows_ref(dy, weight.scales)
    return (codes.float() @ weight.codes.float() * scales).to(dy.dtype)
