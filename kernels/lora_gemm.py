"""The wide products of linear layers with adapters, each output written once: the kernels of lora_linear_group.

    y_j = x W_j^T + b_j + s_j S_j B_j^T         dX = sum over j of dY_j W_j + mask_j(dS_j A_j)

with S_j, dS_j, mask_j and s_j of lora_shrink. The accumulator of a tile starts from the narrow product; then comes the loop over
the wide one. Under masks dX gets its narrow products after the loop. A tile belongs to one projection of the group, so that any
widths go together; tensors of the projections come as tuples. A projection without an adapter has rank 0. A and B are read in fp32 and
rounded to the dtype of x on the way into the tensor cores.
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false

from collections.abc import Sequence

import torch
from torch import Tensor

from minilora.kernels.dispatch import architecture
from minilora.kernels.dropout import keep_mask, philox_key, threshold
from minilora.kernels.lang import (
    INTERPRET,
    INTERPRETED,
    PINNED,
    accum_dtype,
    cdiv,
    jit,
    load,
    quarters,
    rounded,
    rows_of,
    store,
    tl,
)
from minilora.kernels.projection import Adapter, Projection

# by card; 0 is Triton's interpreter. R is the part of a rank that one tl.dot takes
GEMM = {
    0: {"BM": 32, "BN": 32, "BK": 32, "R": 16, "num_warps": 4, "num_stages": 1},
    80: {"BM": 128, "BN": 128, "BK": 32, "R": 16, "num_warps": 4, "num_stages": 4},
    86: {"BM": 128, "BN": 128, "BK": 32, "R": 16, "num_warps": 4, "num_stages": 4},
    90: {"BM": 128, "BN": 256, "BK": 64, "R": 32, "num_warps": 8, "num_stages": 3},
}
SINGLE = {  # S beside the accumulator
    0: GEMM[0],
    80: {"BM": 128, "BN": 128, "BK": 64, "R": 64, "num_warps": 8, "num_stages": 3},
    86: {"BM": 128, "BN": 128, "BK": 32, "R": 64, "num_warps": 8, "num_stages": 3},
    90: {"BM": 128, "BN": 128, "BK": 64, "R": 64, "num_warps": 8, "num_stages": 3},
}
REPEATS = 2  # of S in the single pass, at the most
GROUP_ROWS = 8  # tiles of rows that run side by side, for the second-level cache


def arch(x: Tensor) -> int:
    """0 for the interpreter, 80 or 90 for a card with their shared memory, 86 for any other."""
    found = 0 if INTERPRETED else architecture(x.device)
    return 90 if found in (90, 100, 103) else found if found in (0, 80) else 86


def configuration(table: dict, x: Tensor) -> dict:
    """The launch options of a table for the card that x is on."""
    return {**table[arch(x)], "ACC": accum_dtype(x.dtype), **PINNED}


def launch_options(table: dict, x: Tensor, adapters: Sequence[Adapter]) -> dict:
    """The same for a kernel with the adapters' narrow products."""
    options, width = configuration(table, x), padded_rank(adapters)
    return {**options, "COUNT": len(adapters), "PADDED_R": width, "R": min(options["R"], width)}


def padded_rank(adapters: Sequence[Adapter]) -> int:
    """Columns that every adapter of a group has in S: 16, 32 or a multiple of 64."""
    rank = max(a.a.shape[0] for a in adapters)
    return 16 if rank <= 16 else 32 if rank <= 32 else cdiv(rank, 64) * 64


def dropout_args(adapters: Sequence[Adapter]) -> dict:
    """The arguments of a kernel that draws masks: keys and thresholds; and whether there is anything to draw."""
    return {
        "seeds": tuple(philox_key(a.key) for a in adapters),
        "thresholds": tuple(threshold(a.p) for a in adapters),
        "DROPOUT": any(a.p for a in adapters),
    }


def per_projection_args(projections: Sequence[Projection]) -> dict:
    """What a kernel adds to x W^T, by projection; one without bias or adapter has none of its columns or ranks."""
    some = next(p.adapter.b for p in projections if p.adapter)
    b = [p.adapter.b.contiguous() if p.adapter else some for p in projections]
    adapted = [p.adapter is not None for p in projections]
    return {
        "bias_ptrs": tuple(p.weight if p.bias is None else p.bias.contiguous() for p in projections),
        "b_ptrs": tuple(b),
        "scales": tuple(p.adapter.factor if p.adapter else 0.0 for p in projections),
        "bias_ns": tuple(0 if p.bias is None else p.weight.shape[0] for p in projections),
        "ranks": tuple(p.adapter.b.shape[1] if p.adapter else 0 for p in projections),
        "s_index": tuple(sum(adapted[:j]) for j in range(len(adapted))),
    }


def single_pass_wins(n: int, adapter: Adapter, x: Tensor) -> bool:
    """Whether x A^T inside the loop of x W^T, once a tile of columns, beats a pass over x of its own.

    The pass costs the time to read x; in the loop it is 2 operations more, for each column of S, for each value of x and every tile of columns. These
    products are bound by operations, so that bytes are not to be bought with them: at most REPEATS tiles make S again, of at most
    32 columns, which takes less than half of the time to read x on an A100 (128 operations at 312 TFLOP/s, 2 bytes at 2.0 TB/s).
    Masks and wider S ask for more of shared memory than the tensor cores wait for.
    """
    return adapter.p == 0 and cdiv(n, SINGLE[arch(x)]["BN"]) <= REPEATS and padded_rank([adapter]) <= 32


@jit
def operand(ptrs, mask, ACC: tl.constexpr):
    """What tl.dot takes: 16 bits as they lie in memory, so that the copy is asynchronous; widened where bits lie (lang)."""
    if INTERPRET:
        return load(ptrs, mask, ACC)
    else:
        return tl.load(ptrs, mask=mask, other=0.0)


@jit
def narrowed(x, DTYPE: tl.constexpr):
    """x rounded to DTYPE for tl.dot."""
    if INTERPRET:
        return rounded(x, DTYPE)
    else:
        return x.to(DTYPE)


@jit
def dot(a, b, acc):
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@jit
def select(values, index, COUNT: tl.constexpr):
    """values[index] of a tuple, for a projection that is known only when the kernel runs."""
    value = values[0]
    for j in tl.static_range(1, COUNT):
        value = tl.where(index == j, values[j], value)
    return value


@jit
def swizzle_tile(tile, row_tiles, col_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) of a program: GROUP row tiles share their columns while these are in the cache."""
    group = tile // (GROUP * col_tiles)
    height = min(row_tiles - group * GROUP, GROUP)
    within = tile % (GROUP * col_tiles)
    return group * GROUP + within % height, within // height


@jit(do_not_specialize=["rows"])
def _forward_kernel(
    x_ptr,
    s_ptr,
    w_ptrs,
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
    COUNT: tl.constexpr,
    PADDED_R: tl.constexpr,
    R: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
):
    row_tile, col_tile = swizzle_tile(tl.program_id(0), tl.cdiv(rows, BM), col_tiles, GROUP)
    # which projection the column tile belongs to, and what is its own: tiles of all projections lie in a row
    index, start, first, scale = 0, 0, 0, scales[0]
    for j in tl.static_range(1, COUNT):
        start += tl.cdiv(ns[j - 1], BN)
        index, first = tl.where(col_tile >= start, j, index), tl.where(col_tile >= start, start, first)
        scale = tl.where(col_tile >= start, scales[j], scale)
    w_ptr, bias_ptr = select(w_ptrs, index, COUNT), select(bias_ptrs, index, COUNT)
    b_ptr, y_ptr = select(b_ptrs, index, COUNT), select(y_ptrs, index, COUNT)
    rank, which_s = select(ranks, index, COUNT), select(s_index, index, COUNT)
    n, bias_n, w_stride = select(ns, index, COUNT), select(bias_ns, index, COUNT), select(w_strides, index, COUNT)
    # rows beyond the end read the last row, columns the last column: no mask in the loops, only at the store
    top = row_tile.to(tl.int64) * BM
    row = tl.minimum(top + tl.arange(0, BM), rows - 1)[:, None]
    col = (col_tile - first) * BN + tl.arange(0, BN)[None, :]
    col_in = tl.minimum(col, n - 1).to(tl.int64)
    # expand: acc = s_j S_j B_j^T, R ranks at a time                              [BM, R] x [R, BN]
    acc = tl.zeros((BM, BN), ACC)
    s_ptr += which_s.to(tl.int64) * rows * PADDED_R
    for start_r in tl.range(0, PADDED_R, R, num_stages=1):
        r = start_r + tl.arange(0, R)
        s = operand(s_ptr + row * PADDED_R + r[None, :], r[None, :] < rank, ACC)
        b = load(b_ptr + col_in * rank + r[:, None], r[:, None] < rank, ACC)
        acc = dot(s, narrowed(b, x_ptr.dtype.element_ty), acc)
    acc *= scale
    # the base GEMM goes on from there: acc += x W_j^T                           [BM, BK] x [BK, BN]
    k = tl.arange(0, BK)
    x_ptrs, w_tile = x_ptr + row * x_stride + k[None, :], w_ptr + col_in * w_stride + k[:, None]
    for start_k in range(0, K, BK):
        inside = start_k + k < K
        acc = dot(operand(x_ptrs, inside[None, :], ACC), operand(w_tile, inside[:, None], ACC), acc)
        x_ptrs += BK
        w_tile += BK
    # bias, and the one rounding
    acc += load(bias_ptr + col, col < bias_n, ACC)
    at = tl.arange(0, BM)[:, None]
    store(y_ptr + top * n + at * n + col, acc, (at < rows - top) & (col < n))


@jit
def _add_ds_a(
    acc, ds_ptr, a_ptr, rank, j, row, col, rows, K, dx_ptr, PADDED_R: tl.constexpr, R: tl.constexpr, ACC: tl.constexpr
):
    """acc + dS_j A_j of the rows and columns of acc."""
    for start_r in tl.range(0, PADDED_R, R, num_stages=1):
        r = start_r + tl.arange(0, R)
        ds = operand(
            ds_ptr + tl.cast(j, tl.int64) * rows * PADDED_R + row * PADDED_R + r[None, :], r[None, :] < rank, ACC
        )
        a = load(a_ptr + r[:, None] * K + col, (r[:, None] < rank) & (col < K), ACC)
        acc = dot(ds, narrowed(a, dx_ptr.dtype.element_ty), acc)
    return acc


@jit(do_not_specialize=["rows", "seeds", "thresholds"])
def _input_gradient_kernel(
    dx_ptr,
    ds_ptr,
    dy_ptrs,
    w_ptrs,
    ns,
    dy_strides,
    w_strides,
    a_ptrs,
    ranks,
    seeds,
    thresholds,
    rows,
    K,
    col_tiles,
    COUNT: tl.constexpr,
    ADAPTED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PADDED_R: tl.constexpr,
    R: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
):
    """A tile of dX is BM rows by BN of the K columns; the loop runs over the N of every projection, BK at a time."""
    row_tile, col_tile = swizzle_tile(tl.program_id(0), tl.cdiv(rows, BM), col_tiles, GROUP)
    top = row_tile.to(tl.int64) * BM
    row = tl.minimum(top + tl.arange(0, BM), rows - 1)[:, None]
    col = col_tile * BN + tl.arange(0, BN)[None, :]
    # dS_j A_j of every adapter first, where no mask stands between it and dX
    acc = tl.zeros((BM, BN), ACC)
    if not DROPOUT:
        for j in tl.static_range(ADAPTED):
            acc = _add_ds_a(acc, ds_ptr, a_ptrs[j], ranks[j], j, row, col, rows, K, dx_ptr, PADDED_R, R, ACC)
    # dX += dY_j W_j, one projection after the other                              [BM, BK] x [BK, BN]
    k = tl.arange(0, BK)
    for j in tl.static_range(COUNT):
        dy_tile = dy_ptrs[j] + row * dy_strides[j] + k[None, :]
        w_tile = w_ptrs[j] + k[:, None].to(tl.int64) * w_strides[j] + col
        for start_k in range(0, ns[j], BK):
            inside = start_k + k < ns[j]
            dy = operand(dy_tile, inside[None, :], ACC)
            acc = dot(dy, operand(w_tile, inside[:, None] & (col < K), ACC), acc)
            dy_tile += BK
            w_tile += tl.cast(BK, tl.int64) * w_strides[j]
    at = tl.arange(0, BM)[:, None]
    dx_ptr += top * K
    if DROPOUT:
        # a quarter of the columns in turn: the narrow product of all, and its mask, would not fit beside the accumulator
        parts = quarters(acc)
        width: tl.constexpr = BN // 4
        for i in tl.static_range(4):
            first = col_tile * BN + i * width
            col = first + tl.arange(0, width)[None, :]
            dx = parts[i]
            for j in tl.range(0, ADAPTED, num_stages=1, loop_unroll_factor=1):
                product = tl.zeros((BM, width), ACC)
                a_ptr, rank = select(a_ptrs, j, ADAPTED), select(ranks, j, ADAPTED)
                product = _add_ds_a(product, ds_ptr, a_ptr, rank, j, row, col, rows, K, dx_ptr, PADDED_R, R, ACC)
                seed, threshold = select(seeds, j, ADAPTED), select(thresholds, j, ADAPTED)
                dx += tl.where(keep_mask(seed, threshold, row, first, width), product, 0.0)
            store(dx_ptr + at * K + col, dx, (at < rows - top) & (col < K))
    else:
        store(dx_ptr + at * K + col, acc, (at < rows - top) & (col < K))


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
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
):
    """One projection without dropout; every tile of columns makes S for itself, the first one stores it."""
    row_tile, col_tile = swizzle_tile(tl.program_id(0), tl.cdiv(rows, BM), col_tiles, GROUP)
    top = row_tile.to(tl.int64) * BM
    row = tl.minimum(top + tl.arange(0, BM), rows - 1)[:, None]
    col = col_tile * BN + tl.arange(0, BN)[None, :]
    col_in = tl.minimum(col, N - 1).to(tl.int64)
    r, k = tl.arange(0, PADDED_R), tl.arange(0, BK)
    x_ptrs, w_tile = x_ptr + row * x_stride + k[None, :], w_ptr + col_in * w_stride + k[:, None]
    a_tile = a_ptr + r[None, :] * K + k[:, None]
    # one read of x for both products: acc = x W^T, product = x A^T
    acc, product = tl.zeros((BM, BN), ACC), tl.zeros((BM, PADDED_R), ACC)
    for start_k in range(0, K, BK):
        inside = start_k + k < K
        x = operand(x_ptrs, inside[None, :], ACC)
        acc = dot(x, operand(w_tile, inside[:, None], ACC), acc)
        a = load(a_tile, inside[:, None] & (r[None, :] < rank), ACC)
        product = dot(x, narrowed(a, x_ptr.dtype.element_ty), product)
        x_ptrs += BK
        w_tile += BK
        a_tile += BK
    # S is rounded as the two-pass plan rounds it, then expanded: acc += s S B^T
    s = narrowed(product, x_ptr.dtype.element_ty)
    at = tl.arange(0, BM)[:, None]
    if col_tile == 0:
        store(s_ptr + top * PADDED_R + at * PADDED_R + r[None, :], s, at < rows - top)
    b = load(b_ptr + col_in * rank + r[:, None], r[:, None] < rank, ACC)
    acc += dot(s, narrowed(b, x_ptr.dtype.element_ty), tl.zeros((BM, BN), ACC)) * scale
    acc += load(bias_ptr + col, col < bias_n, ACC)
    store(y_ptr + top * N + at * N + col, acc, (at < rows - top) & (col < N))


def forward(x: Tensor, s: Tensor, projections: Sequence[Projection]) -> list[Tensor]:
    """y_j [T, N_j] of every projection, at least one with an adapter; s from lora_shrink.shrink."""
    adapters = [p.adapter for p in projections if p.adapter is not None]
    (rows, k), options = x.shape, launch_options(GEMM, x, adapters)
    options["COUNT"] = len(projections)
    ys = [torch.empty((rows, p.weight.shape[0]), dtype=x.dtype, device=x.device) for p in projections]
    weights = [rows_of(p.weight) for p in projections]
    col_tiles = sum(cdiv(w.shape[0], options["BN"]) for w in weights)
    _forward_kernel[(cdiv(rows, options["BM"]) * col_tiles,)](
        x,
        s,
        tuple(weights),
        y_ptrs=tuple(ys),
        ns=tuple(w.shape[0] for w in weights),
        **per_projection_args(projections),
        w_strides=tuple(w.stride(0) for w in weights),
        x_stride=x.stride(0),
        rows=rows,
        K=k,
        col_tiles=col_tiles,
        GROUP=GROUP_ROWS,
        **options,
    )
    return ys


def input_gradient(dys: Sequence[Tensor], ds: Tensor, projections: Sequence[Projection]) -> Tensor:
    """dX [T, K]; ds from lora_shrink.expand_backward."""
    adapters = [p.adapter for p in projections if p.adapter is not None]
    weights = [rows_of(p.weight) for p in projections]
    rows, k = dys[0].shape[0], weights[0].shape[1]
    masks = dropout_args(adapters)
    options = launch_options(GEMM, ds, adapters)
    options["COUNT"], options["ADAPTED"] = len(projections), len(adapters)
    dx = torch.empty((rows, k), dtype=ds.dtype, device=ds.device)
    col_tiles = cdiv(k, options["BN"])
    _input_gradient_kernel[(cdiv(rows, options["BM"]) * col_tiles,)](
        dx,
        ds,
        tuple(dys),
        tuple(weights),
        tuple(w.shape[0] for w in weights),
        tuple(dy.stride(0) for dy in dys),
        tuple(w.stride(0) for w in weights),
        tuple(a.a.contiguous() for a in adapters),
        tuple(a.a.shape[0] for a in adapters),
        rows=rows,
        K=k,
        col_tiles=col_tiles,
        GROUP=GROUP_ROWS,
        **masks,
        **options,
    )
    return dx


def single_pass(x: Tensor, projection: Projection, a: Adapter) -> tuple[Tensor, Tensor]:
    """y [T, N] and S [1, T, padded rank] of one projection with the adapter a, which drops nothing; x read once."""
    weight, bias = rows_of(projection.weight), projection.bias
    (rows, k), n = x.shape, weight.shape[0]
    options = launch_options(SINGLE, x, [a])
    del options["R"], options["COUNT"]
    y = torch.empty((rows, n), dtype=x.dtype, device=x.device)
    s = torch.empty((1, rows, options["PADDED_R"]), dtype=x.dtype, device=x.device)
    col_tiles = cdiv(n, options["BN"])
    _single_pass_kernel[(cdiv(rows, options["BM"]) * col_tiles,)](
        x,
        weight,
        weight if bias is None else bias.contiguous(),
        a.a.contiguous(),
        a.b.contiguous(),
        y,
        s,
        scale=a.factor,
        N=n,
        bias_n=0 if bias is None else n,
        rank=a.a.shape[0],
        w_stride=weight.stride(0),
        x_stride=x.stride(0),
        rows=rows,
        K=k,
        col_tiles=col_tiles,
        GROUP=GROUP_ROWS,
        **options,
    )
    return y, s
