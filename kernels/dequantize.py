"""A quantised weight in kernels: tiles of W in fp32, from its codes and scales (quantized.py).

    W[n, k] = level(code[n, k]) * scale(block of n, k)          codes [N, K], two a byte in nf4

Levels and scales are those of `fill`, to the bit, and so is W after the one rounding that is the caller's. A product
with W has two ways. In the loop: the GEMM of lora_gemm makes every tile of W from the codes, and no wide copy is ever in
memory. In two steps: `widen` writes W into a buffer, and the library multiplies. `in_the_loop` chooses.
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportAssignmentType=false

from collections.abc import Callable

import torch
from torch import Tensor

from minilora.kernels.dispatch import use_triton
from minilora.kernels.lang import cdiv, jit, load, store, tl
from minilora.kernels.launch import Launch, per_shape

WIDE = "wide"  # the format of a weight that is not quantised
NF4_BLOCK = 64
# Rows of x up to which W is made in the loop. The loop makes W again for every 128 rows: with nf4 a tile then takes 1.35
# times the cycles of its product on an A100 and 1.95 times on an H100 (bench/proof/compiled.json). Two steps write and
# read 4.5 bytes a weight once: 2.7 and 5.2 times those cycles. So they are even at 700 to 1,000 rows, and sooner where
# the library's GEMM comes nearer to its bound than this loop. All that is arithmetic, to be settled by bench.gpu.
ROWS_IN_THE_LOOP = 512
TILE = {"nf4": (64, 64), "int8": (16, 256), "fp8": (16, 256)}  # of `widen`: 32 weights a thread
# tiles of lora_gemm with W made in the loop, by architecture: forward up to FEW_ROWS rows, which is decoding; else
FEW_ROWS = 16
FEW = {
    0: {"BM": 16, "BN": 32, "BK": 128, "R": 16, "num_warps": 4, "num_stages": 1},
    80: {"BM": 16, "BN": 32, "BK": 256, "R": 16, "num_warps": 4, "num_stages": 4},
    86: {"BM": 16, "BN": 32, "BK": 256, "R": 16, "num_warps": 4, "num_stages": 4},
    90: {"BM": 16, "BN": 32, "BK": 256, "R": 16, "num_warps": 4, "num_stages": 4},
}
QUANTIZED = {
    0: {"BM": 32, "BN": 32, "BK": 32, "R": 16, "num_warps": 4, "num_stages": 1},
    80: {"BM": 128, "BN": 128, "BK": 64, "R": 16, "num_warps": 8, "num_stages": 3},
    86: {"BM": 128, "BN": 128, "BK": 64, "R": 16, "num_warps": 8, "num_stages": 3},
    90: {"BM": 128, "BN": 128, "BK": 64, "R": 32, "num_warps": 8, "num_stages": 3},
}


def readable(k: int, formats: set[str]) -> bool:
    """Whether the GEMM reads weights [N_j, K] of these formats together."""
    return formats in ({"int8"}, {"fp8"}) or (formats == {"nf4"} and k % NF4_BLOCK == 0)


def in_the_loop(rows: int, k: int, formats: set[str]) -> bool:
    """Whether a product of so many rows with quantised weights [N_j, K] makes W in its loop."""
    return rows <= ROWS_IN_THE_LOOP and readable(k, formats)


@jit
def codes_of(k, FORMAT: tl.constexpr):
    """How many codes, or pairs of them, hold k weights of a row."""
    if FORMAT == "nf4":
        return tl.multiple_of(k // 2, 32)  # k is whole blocks
    else:
        return k


@jit
def blocks_at(first, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """[1, n] numbers of the blocks that so many columns from `first` on are in."""
    return first // BLOCK + tl.arange(0, max(COLUMNS // BLOCK, 1))[None, :]


@jit
def scaled(b_levels, b_scales):
    """Levels [R, C] times the scales [R, blocks] of equal parts of their columns."""
    blocks: tl.constexpr = b_scales.shape[1]
    apart = tl.reshape(b_levels, (b_levels.shape[0], blocks, b_levels.shape[1] // blocks))
    return tl.reshape(apart * b_scales[:, :, None], b_levels.shape)


@jit
def dequantize(p_w, m_w, scales, o_n, first, N, K, FORMAT: tl.constexpr):
    """W [R, C] in fp32 at the rows o_n [R] and C columns from `first` on, of pointers p_w to its codes.

    C is a power of two and `first` a multiple of it; m_w masks p_w.
    """
    b_codes = tl.load(p_w, mask=m_w, other=0)
    o_n = o_n[:, None]
    if FORMAT == "int8":
        return scaled(b_codes, load(scales[0] + o_n, o_n < N, tl.float32) * (1 / 127))
    elif FORMAT == "fp8":
        o_b = blocks_at(first, b_codes.shape[1], 128)
        blocks = tl.cdiv(K, 128)
        b_scales = load(scales[0] + o_n // 128 * blocks + o_b, (o_n < N) & (o_b < blocks), tl.float32)
        # s eeee mmm, as the fp16 s 0eeee mmm0000000, is 2**-8 of what it says
        b_half = ((b_codes.to(tl.int16) << 7) & -0x4001).to(tl.float16, bitcast=True)
        return scaled(b_half, b_scales * 256.0)
    else:
        o_b = blocks_at(first, 2 * b_codes.shape[1], 64)
        blocks = K // 64
        m_b, o_b = (o_n < N) & (o_b < blocks), o_n * blocks + o_b
        if scales[0].dtype.element_ty == tl.uint8:
            b_absmax = tl.load(scales[0] + o_b, mask=m_b, other=0).to(tl.int32)
            b_scales = load(scales[3] + 16 + b_absmax, m_b, tl.float32) * load(scales[1] + o_b // 256, m_b, tl.float32)
            b_scales += tl.load(scales[2])
        else:
            b_scales = load(scales[0] + o_b, m_b, tl.float32)
        b_codes = tl.interleave(b_codes >> 4, b_codes & 15)
        b_levels = tl.load(scales[len(scales) - 1] + tl.arange(0, 16))
        b_w = tl.gather(b_levels, tl.reshape(b_codes.to(tl.int32), (b_codes.shape[0] * b_codes.shape[1],)), 0)
        return scaled(tl.reshape(b_w, b_codes.shape), b_scales)


@jit
def scales_of(scale_ptrs, j, COUNT: tl.constexpr, FORMAT: tl.constexpr):
    """The parts of the scales of projection j, of scale_ptrs, which has the first part of all, the second of all, ..."""
    scales = ()
    if FORMAT != "wide":
        for part in tl.static_range(len(scale_ptrs) // COUNT):
            scale_ptr = scale_ptrs[part * COUNT]
            for i in tl.static_range(1, COUNT):
                scale_ptr = tl.where(j == i, scale_ptrs[part * COUNT + i], scale_ptr)
            scales = scales + (scale_ptr,)
    return scales


@jit(do_not_specialize=["start", "rows"])
def _widen_kernel(
    out_ptr, w_ptr, scale_ptrs, start, rows, K, w_stride, FORMAT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """A program: a tile of W, rounded to the dtype of `out`, which has its rows from `start` on."""
    col_tiles = tl.cdiv(K, BN)
    i_m, i_n = tl.program_id(0) // col_tiles, tl.program_id(0) % col_tiles
    o_m = i_m.to(tl.int64) * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)[None, :]
    packed: tl.constexpr = 2 if FORMAT == "nf4" else 1
    o_c = i_n * (BN // packed) + tl.arange(0, BN // packed)[None, :]
    m_m = (o_m < rows)[:, None]
    p_w = w_ptr + (start + o_m[:, None]) * w_stride + o_c
    b_w = dequantize(p_w, m_m & (o_c < codes_of(K, FORMAT)), scale_ptrs, start + o_m, i_n * BN, start + rows, K, FORMAT)
    store(out_ptr + o_m[:, None] * K + o_n, b_w, m_m & (o_n < K))


@per_shape
def _widen_launch(device: torch.device, name: str, start: int, rows: int, k: int, stride: int) -> Launch:
    bm, bn = TILE[name]
    options = {"FORMAT": name, "BM": bm, "BN": bn, "num_warps": 4, "enable_fp_fusion": False}
    return Launch(device, cdiv(rows, bm) * cdiv(k, bn), (start, rows, k, stride), **options)


def can_widen(name: str, count: int, out: Tensor, start: int) -> bool:
    """Whether `widen` runs: out is on a GPU; in nf4 it is whole blocks of the `count` weights, which are whole blocks."""
    if name == "nf4" and (count % NF4_BLOCK or start * out.shape[1] % NF4_BLOCK or out.numel() % NF4_BLOCK):
        return False
    return name in TILE and use_triton(out)


def widen(name: str, parts: Callable[[int], tuple[Tensor, ...]], out: Tensor, start: int) -> None:
    """Write W, from a row on, into out [n, K] of any floating-point dtype: the values of `fill`, to the bit.

    parts: kernel_parts of a weight in this format.
    """
    rows, k = out.shape
    if name == "nf4":  # read flat, block by block, wherever rows end
        start, rows, k = start * k // NF4_BLOCK, out.numel() // NF4_BLOCK, NF4_BLOCK
    codes, *scales = parts(k)
    with torch.cuda.device_of(out):
        launch = _widen_launch(out.device, name, start, rows, k, codes.stride(0))
        launch(_widen_kernel, out, codes, tuple(scales))
