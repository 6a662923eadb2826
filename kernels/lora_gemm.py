"""The wide products of linear layers with adapters, each output written once: the GEMMs of lora_linear_group.

    y_j = x W_j^T + b_j + s_j S_j B_j^T         dX = sum over j of dY_j W_j + mask_j(dS_j A_j)

S_j, dS_j, mask_j and s_j are those of lora_shrink. The accumulator of a tile starts from the product over R; the loop
over the base weight goes on from there. Under dropout dX gets its products over R after the loop, one mask at a time. A
tile belongs to one projection of the group, so widths may differ; the tensors of the projections come as tuples. A
projection without an adapter has rank 0. A and B are read in fp32 and rounded to the dtype of x on their way into the
tensor cores.
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportAssignmentType=false

from collections.abc import Sequence

import torch
from torch import Tensor

from minilora.kernels.dequantize import FEW, FEW_ROWS, QUANTIZED, WIDE, codes_of, dequantize, scales_of
from minilora.kernels.dropout import keep_mask, threshold
from minilora.kernels.group import Group, Place, Sizes, launch_options, padded_rank, s_index
from minilora.kernels.lang import INTERPRET, cdiv, jit, load, quarters, rounded, store, tl
from minilora.kernels.launch import Launch, per_shape

# by architecture; 0 is Triton's interpreter. R is the part of a rank that one tl.dot takes
GEMM = {
    0: {"BM": 32, "BN": 32, "BK": 32, "R": 16, "num_warps": 4, "num_stages": 1},
    80: {"BM": 128, "BN": 128, "BK": 32, "R": 16, "num_warps": 4, "num_stages": 4},
    86: {"BM": 128, "BN": 128, "BK": 32, "R": 16, "num_warps": 4, "num_stages": 4},
    90: {"BM": 128, "BN": 256, "BK": 64, "R": 32, "num_warps": 8, "num_stages": 3},
}
# W is read along its other axis; on sm_86 four warps would spill at ranks above 16
INPUT_GRADIENT = GEMM | {86: GEMM[86] | {"num_warps": 8}}
SINGLE = {  # S beside the accumulator
    0: GEMM[0],
    80: {"BM": 128, "BN": 128, "BK": 64, "R": 64, "num_warps": 8, "num_stages": 3},
    86: {"BM": 128, "BN": 128, "BK": 32, "R": 64, "num_warps": 8, "num_stages": 3},
    90: {"BM": 128, "BN": 128, "BK": 64, "R": 64, "num_warps": 8, "num_stages": 3},
}
REPEATS = 2  # of S in the single pass, at the most
# EVEN_K: what a loop sums over is a multiple of BK, as in models, and needs no mask
GROUP_ROWS = 8  # tiles of rows that run side by side, for the second-level cache


@per_shape
def single_pass_wins(place: Place, sizes: tuple[Sizes, ...], rates: tuple[float, ...]) -> bool:
    """Whether x A^T inside the loop of x W^T, once a tile of columns, beats a pass over x of its own.

    A pass of its own costs the time to read x. In the loop, every tile of columns pays 2 operations for each value of x
    and each column of S, and these products are bound by operations, so they must not be spent to save bytes. Hence at
    most REPEATS tiles make S, of at most 32 columns: on an A100 that takes less than half of the time to read x (128
    operations at 312 TFLOP/s, 2 bytes at 2.0 TB/s). Masks and a wider S would need more shared memory, so that fewer
    tiles would be in flight.
    """
    if len(sizes) > 1 or any(rates):
        return False
    return cdiv(sizes[0].n, SINGLE[place.arch]["BN"]) <= REPEATS and padded_rank([sizes[0].rank]) <= 32


@jit
def load_operand(ptrs, mask, ACC: tl.constexpr):
    """A tile for tl.dot, as it is in memory, so that the copy is asynchronous; the interpreter widens it (lang.py)."""
    if INTERPRET:
        return load(ptrs, mask, ACC)
    else:
        return tl.load(ptrs, mask=mask, other=0.0)


@jit
def as_operand(x, DTYPE: tl.constexpr):
    """x rounded to DTYPE for tl.dot."""
    if INTERPRET:
        return rounded(x, DTYPE)
    else:
        return x.to(DTYPE)


@jit
def load_weight(p_w, m_w, scales, o_n, first, N, K, FORMAT: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr):
    """A tile of W for tl.dot: as it is in memory, or of a quantised one (dequantize.py) rounded to DTYPE."""
    if FORMAT == "wide":
        return load_operand(p_w, m_w, ACC)
    else:
        b_w = as_operand(dequantize(p_w, m_w, scales, o_n, first, N, K, FORMAT), DTYPE)
        return b_w.to(ACC) if INTERPRET else b_w


@jit
def dot(a, b, acc):
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@jit
def select(values, index, COUNT: tl.constexpr):
    """values[index] of a tuple, for an index that is known only when the kernel runs."""
    value = values[0]
    for i in tl.static_range(1, COUNT):
        value = tl.where(index == i, values[i], value)
    return value


@jit
def swizzle_tile(i_tile, row_tiles, col_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) of a program: GROUP row tiles share their columns while these are in the cache."""
    i_group = i_tile // (GROUP * col_tiles)
    height = min(row_tiles - i_group * GROUP, GROUP)
    within = i_tile % (GROUP * col_tiles)
    return i_group * GROUP + within % height, within // height


@jit(do_not_specialize=["rows"])
def _forward_kernel(
    x_ptr,
    s_ptr,
    w_ptrs,
    scale_ptrs,
    bias_ptrs,
    b_ptrs,
    y_ptrs,
    scales,
    ns,
    bias_ns,
    ranks,
    s_index,
    w_strides,
    x_stride,
    rows,
    K,
    col_tiles,
    FORMAT: tl.constexpr,
    COUNT: tl.constexpr,
    PADDED_R: tl.constexpr,
    R: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program: BM rows by BN columns of one y_j. The column tiles of all projections are counted through."""
    i_m, i_n = swizzle_tile(tl.program_id(0), tl.cdiv(rows, BM), col_tiles, GROUP)
    # which projection j the column tile belongs to, the first of whose tiles is `first`
    j, start, first, scale = 0, 0, 0, scales[0]
    for i in tl.static_range(1, COUNT):
        start += tl.cdiv(ns[i - 1], BN)
        j, first = tl.where(i_n >= start, i, j), tl.where(i_n >= start, start, first)
        scale = tl.where(i_n >= start, scales[i], scale)
    w_ptr, bias_ptr = select(w_ptrs, j, COUNT), select(bias_ptrs, j, COUNT)
    b_ptr, y_ptr = select(b_ptrs, j, COUNT), select(y_ptrs, j, COUNT)
    rank, i_s = select(ranks, j, COUNT), select(s_index, j, COUNT)
    n, bias_n, w_stride = select(ns, j, COUNT), select(bias_ns, j, COUNT), select(w_strides, j, COUNT)
    w_scales = scales_of(scale_ptrs, j, COUNT, FORMAT)
    # rows beyond the end read the last row, columns the last column: no mask in the loops, only at the store
    top = i_m.to(tl.int64) * BM
    o_m = tl.minimum(top + tl.arange(0, BM), rows - 1)[:, None]
    o_n = (i_n - first) * BN + tl.arange(0, BN)[None, :]
    o_b = tl.minimum(o_n, n - 1).to(tl.int64)
    # expand: y = s_j S_j B_j^T, R ranks at a time                                          [BM, R] x [R, BN]
    b_y = tl.zeros((BM, BN), ACC)
    s_ptr += i_s.to(tl.int64) * rows * PADDED_R
    for start_r in tl.range(0, PADDED_R, R, num_stages=1):
        o_r = start_r + tl.arange(0, R)
        b_s = load_operand(s_ptr + o_m * PADDED_R + o_r[None, :], o_r[None, :] < rank, ACC)
        b_b = load(b_ptr + o_b * rank + o_r[:, None], o_r[:, None] < rank, ACC)
        b_y = dot(b_s, as_operand(b_b, x_ptr.dtype.element_ty), b_y)
    b_y *= scale
    # base GEMM: y += x W_j^T                                                             [BM, BK] x [BK, BN]
    packed: tl.constexpr = 2 if FORMAT == "nf4" else 1
    o_k, o_c = tl.arange(0, BK), tl.arange(0, BK // packed)
    o_w = tl.minimum((i_n - first) * BN + tl.arange(0, BN), n - 1).to(tl.int64)
    p_x, p_w = x_ptr + o_m * x_stride + o_k[None, :], w_ptr + o_w[:, None] * w_stride + o_c[None, :]
    for start_k in range(0, K, BK):
        m_k = (start_k + o_k < K) | EVEN_K
        m_c = (start_k // packed + o_c < codes_of(K, FORMAT)) | EVEN_K
        b_w = load_weight(p_w, m_c[None, :], w_scales, o_w, start_k, n, K, FORMAT, x_ptr.dtype.element_ty, ACC)
        b_y = dot(load_operand(p_x, m_k[None, :], ACC), tl.trans(b_w), b_y)
        p_x += BK
        p_w += BK // packed
    # bias, and the one rounding in the store                                                        [BM, BN]
    b_y += load(bias_ptr + o_n, o_n < bias_n, ACC)
    o_m = tl.arange(0, BM)[:, None]
    store(y_ptr + top * n + o_m * n + o_n, b_y, (o_m < rows - top) & (o_n < n))


@jit
def add_ds_a(
    b_dx, ds_ptr, a_ptr, rank, j, o_m, o_n, rows, K, dx_ptr, PADDED_R: tl.constexpr, R: tl.constexpr, ACC: tl.constexpr
):
    """b_dx + dS_j A_j at its rows o_m and columns o_n."""
    for start_r in tl.range(0, PADDED_R, R, num_stages=1):
        o_r = start_r + tl.arange(0, R)
        p_ds = ds_ptr + tl.cast(j, tl.int64) * rows * PADDED_R + o_m * PADDED_R + o_r[None, :]
        b_ds = load_operand(p_ds, o_r[None, :] < rank, ACC)
        b_a = load(a_ptr + o_r[:, None] * K + o_n, (o_r[:, None] < rank) & (o_n < K), ACC)
        b_dx = dot(b_ds, as_operand(b_a, dx_ptr.dtype.element_ty), b_dx)
    return b_dx


@jit(do_not_specialize=["rows", "thresholds"])
def _input_gradient_kernel(
    dx_ptr,
    ds_ptr,
    dy_ptrs,
    w_ptrs,
    scale_ptrs,
    a_ptrs,
    seed_ptrs,
    thresholds,
    ranks,
    ns,
    dy_strides,
    w_strides,
    rows,
    K,
    col_tiles,
    FORMAT: tl.constexpr,
    COUNT: tl.constexpr,
    ADAPTED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PADDED_R: tl.constexpr,
    R: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program: BM rows by BN of the K columns of dX; its loop runs over the N of every projection, BK at a time."""
    i_m, i_n = swizzle_tile(tl.program_id(0), tl.cdiv(rows, BM), col_tiles, GROUP)
    top = i_m.to(tl.int64) * BM
    o_m = tl.minimum(top + tl.arange(0, BM), rows - 1)[:, None]
    o_n = i_n * BN + tl.arange(0, BN)[None, :]
    # from y_j = x W_j^T + mask_j(x) A_j^T (s_j B_j)^T and dS_j = s_j dY_j B_j:
    #     dX = sum over j of dY_j W_j + mask_j(dS_j A_j)
    # without dropout the second term comes first, dX = dS_j A_j                            [BM, R] x [R, BN]
    b_dx = tl.zeros((BM, BN), ACC)
    if not DROPOUT:
        for j in tl.static_range(ADAPTED):
            b_dx = add_ds_a(b_dx, ds_ptr, a_ptrs[j], ranks[j], j, o_m, o_n, rows, K, dx_ptr, PADDED_R, R, ACC)
    # base GEMM: dX += dY_j W_j, one projection after the other                           [BM, BK] x [BK, BN]
    packed: tl.constexpr = 2 if FORMAT == "nf4" else 1
    o_k, o_c = tl.arange(0, BK), i_n * (BN // packed) + tl.arange(0, BN // packed)[None, :]
    for j in tl.static_range(COUNT):
        p_dy = dy_ptrs[j] + o_m * dy_strides[j] + o_k[None, :]
        p_w = w_ptrs[j] + o_k[:, None].to(tl.int64) * w_strides[j] + o_c
        w_scales = scales_of(scale_ptrs, j, COUNT, FORMAT)
        for start_k in range(0, ns[j], BK):
            m_k = (start_k + o_k < ns[j]) | EVEN_K
            b_dy, m_w = load_operand(p_dy, m_k[None, :], ACC), m_k[:, None] & (o_c < codes_of(K, FORMAT))
            o_w = (start_k + o_k).to(tl.int64)
            b_w = load_weight(p_w, m_w, w_scales, o_w, i_n * BN, ns[j], K, FORMAT, dx_ptr.dtype.element_ty, ACC)
            b_dx = dot(b_dy, b_w, b_dx)
            p_dy += BK
            p_w += tl.cast(BK, tl.int64) * w_strides[j]
    o_row = tl.arange(0, BM)[:, None]
    dx_ptr += top * K
    if DROPOUT:
        # dX += mask_j(dS_j A_j), a quarter of the columns at a time: the product of all, and its mask, would not
        # fit into registers beside the accumulator                                       [BM, R] x [R, BN / 4]
        parts = quarters(b_dx)
        width: tl.constexpr = BN // 4
        for i in tl.static_range(4):
            first = i_n * BN + i * width
            o_n = first + tl.arange(0, width)[None, :]
            b_part = parts[i]
            for j in tl.range(0, ADAPTED, num_stages=1, loop_unroll_factor=1):
                b_ds_a = tl.zeros((BM, width), ACC)
                a_ptr, rank = select(a_ptrs, j, ADAPTED), select(ranks, j, ADAPTED)
                b_ds_a = add_ds_a(b_ds_a, ds_ptr, a_ptr, rank, j, o_m, o_n, rows, K, dx_ptr, PADDED_R, R, ACC)
                seed, threshold = tl.load(select(seed_ptrs, j, ADAPTED)), select(thresholds, j, ADAPTED)
                b_part += tl.where(keep_mask(seed, threshold, o_m, first, width), b_ds_a, 0.0)
            store(dx_ptr + o_row * K + o_n, b_part, (o_row < rows - top) & (o_n < K))
    else:
        store(dx_ptr + o_row * K + o_n, b_dx, (o_row < rows - top) & (o_n < K))


@jit(do_not_specialize=["rows"])
def _single_pass_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    a_ptr,
    b_ptr,
    y_ptr,
    s_ptr,
    scale,
    N,
    bias_n,
    rank,
    w_stride,
    x_stride,
    rows,
    K,
    col_tiles,
    PADDED_R: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
):
    """One projection without dropout. Every tile of columns makes S for itself, and the first one stores it."""
    i_m, i_n = swizzle_tile(tl.program_id(0), tl.cdiv(rows, BM), col_tiles, GROUP)
    top = i_m.to(tl.int64) * BM
    o_m = tl.minimum(top + tl.arange(0, BM), rows - 1)[:, None]
    o_n = i_n * BN + tl.arange(0, BN)[None, :]
    o_w = tl.minimum(o_n, N - 1).to(tl.int64)
    o_r, o_k = tl.arange(0, PADDED_R), tl.arange(0, BK)
    p_x, p_w = x_ptr + o_m * x_stride + o_k[None, :], w_ptr + o_w * w_stride + o_k[:, None]
    p_a = a_ptr + o_r[None, :] * K + o_k[:, None]
    # base GEMM and shrink from one read of x: y = x W^T, S = x A^T                  [BM, BK] x [BK, BN + R]
    b_y, b_s = tl.zeros((BM, BN), ACC), tl.zeros((BM, PADDED_R), ACC)
    for start_k in range(0, K, BK):
        m_k = (start_k + o_k < K) | EVEN_K
        b_x = load_operand(p_x, m_k[None, :], ACC)
        b_y = dot(b_x, load_operand(p_w, m_k[:, None], ACC), b_y)
        b_a = load(p_a, m_k[:, None] & (o_r[None, :] < rank), ACC)
        b_s = dot(b_x, as_operand(b_a, x_ptr.dtype.element_ty), b_s)
        p_x += BK
        p_w += BK
        p_a += BK
    # S is rounded here as the two-pass plan rounds it                                        [BM, PADDED_R]
    b_s = as_operand(b_s, x_ptr.dtype.element_ty)
    o_m = tl.arange(0, BM)[:, None]
    if i_n == 0:
        store(s_ptr + top * PADDED_R + o_m * PADDED_R + o_r[None, :], b_s, o_m < rows - top)
    # expand: y += s S B^T                                                                  [BM, R] x [R, BN]
    b_b = load(b_ptr + o_w * rank + o_r[:, None], o_r[:, None] < rank, ACC)
    b_y += dot(b_s, as_operand(b_b, x_ptr.dtype.element_ty), tl.zeros((BM, BN), ACC)) * scale
    b_y += load(bias_ptr + o_n, o_n < bias_n, ACC)
    store(y_ptr + top * N + o_m * N + o_n, b_y, (o_m < rows - top) & (o_n < N))


@per_shape
def _forward_launch(
    place: Place, rows: int, k: int, x_stride: int, sizes: tuple[Sizes, ...], weight_format: str
) -> Launch:
    tiles = GEMM if weight_format == WIDE else FEW if rows <= FEW_ROWS else QUANTIZED
    options = launch_options(tiles, place, [p.rank for p in sizes])
    options |= {"FORMAT": weight_format, "GROUP": GROUP_ROWS, "enable_fp_fusion": weight_format == WIDE}
    options["EVEN_K"] = k % options["BK"] == 0
    col_tiles = sum(cdiv(p.n, options["BN"]) for p in sizes)
    ns, w_strides, bias_ns, ranks, scales = zip(*sizes, strict=True)
    numbers = scales, ns, bias_ns, ranks, s_index(sizes), w_strides, x_stride, rows, k, col_tiles
    return Launch(place.device, cdiv(rows, options["BM"]) * col_tiles, numbers, **options)


def forward(x: Tensor, s: Tensor, group: Group) -> list[Tensor]:
    """y_j [T, N_j] of every projection; s from lora_shrink.shrink, which is not read where none has an adapter."""
    rows, k = x.shape
    launch = _forward_launch(Place.of(x), rows, k, x.stride(0), group.sizes, group.format)
    ys = [torch.empty((rows, size.n), dtype=x.dtype, device=x.device) for size in group.sizes]
    launch(_forward_kernel, x, s, group.weights, group.scales, group.biases, group.wide_bs, tuple(ys))
    return ys


@per_shape
def _input_gradient_launch(
    place: Place,
    rows: int,
    k: int,
    dy_strides: tuple[int, ...],
    sizes: tuple[Sizes, ...],
    ranks: tuple[int, ...],
    rates: tuple[float, ...],
    weight_format: str,
) -> Launch:
    options = launch_options(INPUT_GRADIENT if weight_format == WIDE else QUANTIZED, place, ranks)
    options |= {"COUNT": len(sizes), "ADAPTED": len(ranks), "DROPOUT": any(rates)}
    options |= {"FORMAT": weight_format, "GROUP": GROUP_ROWS, "enable_fp_fusion": weight_format == WIDE}
    options["EVEN_K"] = all(size.n % options["BK"] == 0 for size in sizes)
    col_tiles = cdiv(k, options["BN"])
    ns, w_strides = tuple(size.n for size in sizes), tuple(size.w_stride for size in sizes)
    numbers = tuple(map(threshold, rates)), ranks, ns, dy_strides, w_strides, rows, k, col_tiles
    return Launch(place.device, cdiv(rows, options["BM"]) * col_tiles, numbers, **options)


def input_gradient(dys: Sequence[Tensor], ds: Tensor, group: Group) -> Tensor:
    """dX [T, K]; ds from lora_shrink.expand_backward."""
    rows, k = dys[0].shape[0], group.a[0].shape[1]
    strides = tuple([dy.stride(0) for dy in dys])
    launch = _input_gradient_launch(Place.of(ds), rows, k, strides, group.sizes, group.ranks, group.rates, group.format)
    dx = torch.empty((rows, k), dtype=ds.dtype, device=ds.device)
    launch(_input_gradient_kernel, dx, ds, tuple(dys), group.weights, group.scales, group.a, group.seeds)
    return dx


@per_shape
def _single_pass_launch(place: Place, rows: int, k: int, x_stride: int, size: Sizes) -> tuple[Launch, int]:
    """And the padded rank."""
    options = launch_options(SINGLE, place, [size.rank])
    del options["R"], options["COUNT"]
    options["EVEN_K"] = k % options["BK"] == 0
    col_tiles = cdiv(size.n, options["BN"])
    numbers = size.scale, size.n, size.bias_n, size.rank, size.w_stride, x_stride, rows, k, col_tiles
    launch = Launch(place.device, cdiv(rows, options["BM"]) * col_tiles, numbers, GROUP=GROUP_ROWS, **options)
    return launch, options["PADDED_R"]


def single_pass(x: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """y [T, N] and S [1, T, padded rank] of a single projection whose adapter drops nothing; x read once."""
    (rows, k), (size,) = x.shape, group.sizes
    launch, width = _single_pass_launch(Place.of(x), rows, k, x.stride(0), size)
    y = torch.empty((rows, size.n), dtype=x.dtype, device=x.device)
    s = torch.empty((1, rows, width), dtype=x.dtype, device=x.device)
    launch(_single_pass_kernel, x, *group.weights, *group.biases, *group.a, *group.b, y, s)
    return y, s
