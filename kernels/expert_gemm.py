"""The grouped GEMMs of the experts of a mixture: those of lora_gemm.py, with tiles that each belong to one expert (expert_tiles.py).

    y_i = x_i W_e^T + f S_i B_e^T, times the weight of the slot in down        dX_i = dY_i W_e + mask(dS_i A_e)

for slot i of expert e. gate_up gathers the rows of its tokens as it reads x. down writes the row of a slot next to the other slots
of its token, so that a sum over k neighbouring rows combines them in a fixed order; the backward mirrors this. Quantised weights
are dequantised in the loop (dequantize.py): no 16-bit copy of the experts is ever in memory.
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportAssignmentType=false

import torch
from torch import Tensor

from minilora.kernels.dequantize import FEW, QUANTIZED, WIDE, codes_of, scales_of
from minilora.kernels.dropout import keep_mask, threshold
from minilora.kernels.expert_tiles import Sizes, Stack, Tiles, buffer_rows, tile_at
from minilora.kernels.group import Place, launch_options
from minilora.kernels.lang import cdiv, jit, load, quarters, store, tl
from minilora.kernels.launch import Launch, per_shape
from minilora.kernels.lora_gemm import (
    GEMM,
    GROUP_ROWS,
    INPUT_GRADIENT,
    add_ds_a,
    as_operand,
    dot,
    load_operand,
    load_weight,
    swizzle_tile,
)


@jit(do_not_specialize=["tiles"])
def _forward_kernel(
    x_ptr,
    s_ptr,
    w_ptr,
    scale_ptrs,
    b_ptr,
    y_ptr,
    weights_ptr,
    slots_ptr,
    tiles_ptr,
    scale,
    N,
    rank,
    b_step,
    w_stride,
    x_stride,
    chosen,
    experts,
    K,
    tiles,
    col_tiles,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    FORMAT: tl.constexpr,
    PADDED_R: tl.constexpr,
    R: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program: one tile of slots by BN columns; FROM and TO say how rows of x and y are indexed (buffer_rows)."""
    i_t, i_n = swizzle_tile(tl.program_id(0), tiles, col_tiles, GROUP)
    expert, first, end = tile_at(tiles_ptr, i_t)
    if first >= end:
        return
    # rows beyond the end read the last row, columns the last column: no mask in the loops, only at the store
    o_i = tl.minimum(first + tl.arange(0, BM), end - 1)
    o_m = buffer_rows(slots_ptr, o_i, chosen, FROM)[:, None]
    o_n = i_n * BN + tl.arange(0, BN)
    o_b = tl.minimum(o_n, N - 1).to(tl.int64)
    # expand: y = f S B_e^T, R ranks at a time                                              [BM, R] x [R, BN]
    b_y = tl.zeros((BM, BN), ACC)
    if s_ptr is not None:
        b_ptr += expert * b_step
        for start_r in tl.range(0, PADDED_R, R, num_stages=1):
            o_r = start_r + tl.arange(0, R)
            p_s = s_ptr + o_i[:, None].to(tl.int64) * PADDED_R + o_r[None, :]
            b_s = load_operand(p_s, o_r[None, :] < rank, ACC)
            b_b = load(b_ptr + o_b[None, :] * rank + o_r[:, None], o_r[:, None] < rank, ACC)
            b_y = dot(b_s, as_operand(b_b, x_ptr.dtype.element_ty), b_y)
        b_y *= scale
    # base GEMM: y += x W_e^T                                                             [BM, BK] x [BK, BN]
    packed: tl.constexpr = 2 if FORMAT == "nf4" else 1
    o_k, o_c, o_w = tl.arange(0, BK), tl.arange(0, BK // packed), expert * N + o_b
    p_x, p_w = x_ptr + o_m * x_stride + o_k[None, :], w_ptr + o_w[:, None] * w_stride + o_c[None, :]
    w_scales = scales_of(scale_ptrs, 0, 1, FORMAT)
    for start_k in range(0, K, BK):
        m_k = (start_k + o_k < K) | EVEN_K
        m_c = (start_k // packed + o_c < codes_of(K, FORMAT)) | EVEN_K
        b_w = load_weight(
            p_w, m_c[None, :], w_scales, o_w, start_k, experts * N, K, FORMAT, x_ptr.dtype.element_ty, ACC
        )
        b_y = dot(load_operand(p_x, m_k[None, :], ACC), tl.trans(b_w), b_y)
        p_x += BK
        p_w += BK // packed
    # the weights of the slots, and the one rounding in the store                                    [BM, BN]
    if weights_ptr is not None:
        b_y *= tl.load(weights_ptr + tl.load(slots_ptr + o_i)).to(ACC)[:, None]
    p_y = y_ptr + buffer_rows(slots_ptr, o_i, chosen, TO)[:, None] * N
    store(p_y + o_n[None, :], b_y, (tl.arange(0, BM)[:, None] < end - first) & (o_n[None, :] < N))


@jit(do_not_specialize=["tiles", "threshold"])
def _input_gradient_kernel(
    dx_ptr,
    ds_ptr,
    dy_ptr,
    w_ptr,
    scale_ptrs,
    a_ptr,
    seed_ptr,
    slots_ptr,
    tiles_ptr,
    threshold,
    rank,
    a_step,
    N,
    dy_stride,
    w_stride,
    chosen,
    experts,
    K,
    tiles,
    col_tiles,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    MASK: tl.constexpr,
    FORMAT: tl.constexpr,
    PADDED_R: tl.constexpr,
    R: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program: one tile of slots by BN of the K columns of dX; FROM, TO and MASK say how rows of dY, dX and the mask are indexed."""
    i_t, i_n = swizzle_tile(tl.program_id(0), tiles, col_tiles, GROUP)
    expert, first, end = tile_at(tiles_ptr, i_t)
    if first >= end:
        return
    o_i = tl.minimum(first + tl.arange(0, BM), end - 1)
    o_s, o_n = o_i[:, None].to(tl.int64), i_n * BN + tl.arange(0, BN)[None, :]
    # without dropout the part of the adapter comes first, dX = dS A_e                       [BM, R] x [R, BN]
    b_dx = tl.zeros((BM, BN), ACC)
    if ds_ptr is not None:
        a_ptr += expert * a_step
        if seed_ptr is None:
            b_dx = add_ds_a(b_dx, ds_ptr, a_ptr, rank, 0, o_s, o_n, 0, K, dx_ptr, PADDED_R, R, ACC)
    # base GEMM: dX += dY W_e                                                             [BM, BK] x [BK, BN]
    packed: tl.constexpr = 2 if FORMAT == "nf4" else 1
    o_k, o_c = tl.arange(0, BK), i_n * (BN // packed) + tl.arange(0, BN // packed)[None, :]
    p_dy = dy_ptr + buffer_rows(slots_ptr, o_i, chosen, FROM)[:, None] * dy_stride + o_k[None, :]
    p_w = w_ptr + (expert * N + o_k[:, None]) * w_stride + o_c
    w_scales = scales_of(scale_ptrs, 0, 1, FORMAT)
    for start_k in range(0, N, BK):
        m_k = (start_k + o_k < N) | EVEN_K
        b_dy, m_w = load_operand(p_dy, m_k[None, :], ACC), m_k[:, None] & (o_c < codes_of(K, FORMAT))
        o_w = expert * N + start_k + o_k
        b_w = load_weight(p_w, m_w, w_scales, o_w, i_n * BN, experts * N, K, FORMAT, dx_ptr.dtype.element_ty, ACC)
        b_dx = dot(b_dy, b_w, b_dx)
        p_dy += BK
        p_w += tl.cast(BK, tl.int64) * w_stride
    p_dx = dx_ptr + buffer_rows(slots_ptr, o_i, chosen, TO)[:, None] * K
    m_m = tl.arange(0, BM)[:, None] < end - first
    if seed_ptr is not None:
        # dX += mask(dS A_e), a quarter of the columns at a time, as in lora_gemm        [BM, R] x [R, BN / 4]
        o_mask, seed = buffer_rows(slots_ptr, o_i, chosen, MASK)[:, None], tl.load(seed_ptr)
        parts = quarters(b_dx)
        width: tl.constexpr = BN // 4
        for i in tl.static_range(4):
            start_n = i_n * BN + i * width
            o_n = start_n + tl.arange(0, width)[None, :]
            b_ds_a = tl.zeros((BM, width), ACC)
            b_ds_a = add_ds_a(b_ds_a, ds_ptr, a_ptr, rank, 0, o_s, o_n, 0, K, dx_ptr, PADDED_R, R, ACC)
            b_part = parts[i] + tl.where(keep_mask(seed, threshold, o_mask, start_n, width), b_ds_a, 0.0)
            store(p_dx + o_n, b_part, m_m & (o_n < K))
    else:
        store(p_dx + o_n, b_dx, m_m & (o_n < K))


def _options(table: dict, place: Place, sizes: Sizes, inner: int) -> dict:
    """Launch options of a product that sums over `inner`."""
    options = launch_options(table, place, [sizes.rank])
    del options["COUNT"]
    options |= {"FORMAT": sizes.format, "GROUP": GROUP_ROWS, "enable_fp_fusion": sizes.format == WIDE}
    return options | {"EVEN_K": inner % options["BK"] == 0}


@per_shape
def _forward_launch(place: Place, sizes: Sizes, x_stride: int, chosen: int, tiles: int, few: bool) -> Launch:
    options = _options(FEW if few else GEMM if sizes.format == WIDE else QUANTIZED, place, sizes, sizes.k)
    col_tiles = cdiv(sizes.n, options["BN"])
    numbers = sizes.factor, sizes.n, sizes.rank, sizes.b_step, sizes.w_stride, x_stride, chosen
    numbers += sizes.experts, sizes.k, tiles, col_tiles
    names = {"FROM": sizes.rows.x, "TO": sizes.rows.y}
    return Launch(place.device, tiles * col_tiles, numbers, **names, **options)


def forward(x: Tensor, s: Tensor | None, weights: Tensor | None, stack: Stack, tiles: Tiles) -> Tensor:
    """y [T k, N]; s from expert_shrink.shrink, weights [T k] indexed by slot."""
    count, sizes = len(tiles.table), stack.sizes
    launch = _forward_launch(Place.of(x), sizes, x.stride(0), tiles.chosen, count, tiles.few)
    y = torch.empty((len(tiles.slots), sizes.n), dtype=x.dtype, device=x.device)
    b = None if s is None else stack.b
    launch(_forward_kernel, x, s, stack.weight, stack.scales, b, y, weights, tiles.slots, tiles.table)
    return y


@per_shape
def _input_gradient_launch(place: Place, sizes: Sizes, dy_stride: int, chosen: int, tiles: int) -> Launch:
    options = _options(INPUT_GRADIENT if sizes.format == WIDE else QUANTIZED, place, sizes, sizes.n)
    col_tiles = cdiv(sizes.k, options["BN"])
    numbers = threshold(sizes.p), sizes.rank, sizes.a_step, sizes.n, dy_stride, sizes.w_stride, chosen
    numbers += sizes.experts, sizes.k, tiles, col_tiles
    names = {"FROM": sizes.rows.dy, "TO": sizes.rows.dx, "MASK": sizes.rows.mask}
    return Launch(place.device, tiles * col_tiles, numbers, **names, **options)


def input_gradient(dy: Tensor, ds: Tensor | None, stack: Stack, tiles: Tiles) -> Tensor:
    """dX [T k, K]; ds from expert_shrink.expand_backward."""
    count, sizes = len(tiles.table), stack.sizes
    launch = _input_gradient_launch(Place.of(dy), sizes, dy.stride(0), tiles.chosen, count)
    dx = torch.empty((len(tiles.slots), sizes.k), dtype=dy.dtype, device=dy.device)
    weight = stack.weight, stack.scales
    launch(_input_gradient_kernel, dx, ds, dy, *weight, stack.a, stack.seed, tiles.slots, tiles.table)
    return dx
