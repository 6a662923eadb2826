"""The narrow products of linear layers with adapters, each wide tensor read once: the kernels of lora_linear_group.

    S_j = mask_j(x) A_j^T        dS_j = s_j dY_j B_j        dB_j = s_j dY_j^T S_j        dA_j = dS_j^T mask_j(x)

mask_j(x) is x where the mask of a projection keeps it and 0 elsewhere; s_j = scale_j / (1 - p_j) makes up for what is dropped.
x [T, K] is read once for all projections of the group, each with its own mask; each dY_j [T, N_j] once for dS_j and dB_j. What
several programs add to is kept as fp32 partials that a second kernel adds up in a fixed order: no atomics, and their number
depends only on the shapes. S and dS are [projections, T, padded rank] in the dtype of x, their columns from the rank on zero.
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false

from collections.abc import Sequence

import torch
from torch import Tensor

from minilora.kernels.dropout import keep_mask
from minilora.kernels.lang import cdiv, jit, load, store, tl
from minilora.kernels.lora_gemm import (
    arch,
    as_operand,
    configuration,
    dot,
    dropout_args,
    launch_options,
    load_operand,
    padded_rank,
)
from minilora.kernels.projection import Adapter

PROGRAMS = {0: 128, 80: 108, 86: 84, 90: 132}  # that fill a card: one for each multiprocessor
# by card, as in lora_gemm
SHRINK = {
    0: {"BM": 16, "BK": 32, "R": 16, "num_warps": 4, "num_stages": 1},
    80: {"BM": 64, "BK": 64, "R": 64, "num_warps": 4, "num_stages": 4},
    86: {"BM": 64, "BK": 32, "R": 64, "num_warps": 4, "num_stages": 4},
    90: {"BM": 64, "BK": 64, "R": 64, "num_warps": 4, "num_stages": 4},
}
EXPAND_BACKWARD = {  # ROWS for 16 ranks, half for 32: their dS stays in registers
    0: {"ROWS": 32, "BN": 16, "R": 16, "num_warps": 2, "num_stages": 1},
    80: {"ROWS": 1024, "BN": 32, "R": 32, "num_warps": 8, "num_stages": 2},
    86: {"ROWS": 512, "BN": 32, "R": 32, "num_warps": 8, "num_stages": 2},
    90: {"ROWS": 1024, "BN": 32, "R": 32, "num_warps": 8, "num_stages": 2},
}
SUM = {arch: {"BLOCK": 1024, "num_warps": 4} for arch in (0, 80, 86, 90)}


@jit(do_not_specialize=["rows", "seeds", "thresholds"])
def _shrink_kernel(
    x_ptr,
    out_ptr,
    a_ptrs,
    ranks,
    seeds,
    thresholds,
    x_stride,
    rows,
    K,
    span,
    blocks,
    COUNT: tl.constexpr,
    DROPOUT: tl.constexpr,
    PADDED_R: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program: BM rows, `span` of the K columns, R of the columns of every S_j; out [K / span, COUNT, rows, PADDED_R]."""
    tiles = tl.cdiv(rows, BM)
    # programs that read the same x run side by side, so that the second one finds it in the cache; so below, too
    r, rest = tl.program_id(0) % blocks * R + tl.arange(0, R)[None, :], tl.program_id(0) // blocks
    tile, part = rest % tiles, rest // tiles
    row = tile.to(tl.int64) * BM + tl.arange(0, BM)[:, None]
    row_in = tl.minimum(row, rows - 1)
    first = part * span
    x_tile = x_ptr + row_in * x_stride + (first + tl.arange(0, BK))[None, :]
    # S_j += mask_j(x) A_j^T of a tile of x, for every adapter                    [BM, BK] x [BK, R]
    sums = (tl.zeros((BM, R), ACC),) * COUNT
    for start in range(first, min(first + span, K), BK):
        k = start + tl.arange(0, BK)
        x = load_operand(x_tile, k[None, :] < K, ACC)
        x_tile += BK
        news = ()
        for j in tl.static_range(COUNT):
            a = load(a_ptrs[j] + r * K + k[:, None], (r < ranks[j]) & (k[:, None] < K), ACC)
            a = as_operand(a, x_ptr.dtype.element_ty)
            if DROPOUT:
                x_j = tl.where(keep_mask(seeds[j], thresholds[j], row_in, start, BK), x, 0.0)
            else:
                x_j = x
            news = news + (dot(x_j, a, sums[j]),)
        sums = news
    # partial sums of this range of K, added up by _sum_kernel in a fixed order
    for j in tl.static_range(COUNT):
        at = (part.to(tl.int64) * COUNT + j) * rows * PADDED_R + row * PADDED_R + r
        store(out_ptr + at, sums[j], row < rows)


@jit
def _over_warps(x, WARPS: tl.constexpr):
    """The sum of x [WARPS, R, BN] over its first axis, in one exchange between the warps; tl.sum makes one for every few values."""
    shape: tl.constexpr = x.shape
    x = tl.permute(x, (1, 2, 0))
    for i in tl.static_range(1, 4):
        if WARPS >= 2**i:
            one, other = tl.split(tl.reshape(x, (shape[1], shape[2], WARPS // 2**i, 2)))
            x = one + other
    return tl.reshape(x, (shape[1], shape[2]))


@jit(do_not_specialize=["rows", "row_tiles", "tiles"])
def _expand_backward_kernel(
    dy_ptrs,
    dy_strides,
    b_ptrs,
    s_ptr,
    ds_ptr,
    db_ptr,
    scales,
    ns,
    ranks,
    rows,
    row_tiles,
    tiles,
    blocks,
    N,
    COUNT: tl.constexpr,
    PADDED_R: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    WARPS: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program: ROWS rows, `tiles` times BN of the columns of one dY_j, R of the columns of S_j; its warps share out the rows.

    ds [ranges of all projections, rows, PADDED_R], db [row tiles, columns of all projections, PADDED_R]; None where it is not wanted.
    """
    r, rest = tl.program_id(0) % blocks * R + tl.arange(0, R), tl.program_id(0) // blocks
    tile, part = rest % row_tiles, rest // row_tiles
    # which projection the range of columns belongs to; `before` counts the columns of those before it
    dy_ptr, dy_stride, b_ptr, scale, n, rank = dy_ptrs[0], dy_strides[0], b_ptrs[0], scales[0], ns[0], ranks[0]
    index, first, before, start, columns = 0, 0, 0, 0, 0
    span = tiles * BN
    for j in tl.static_range(1, COUNT):
        start += tl.cdiv(ns[j - 1], span)
        columns += ns[j - 1]
        here = part >= start
        first, before, index = tl.where(here, start, first), tl.where(here, columns, before), tl.where(here, j, index)
        dy_ptr, b_ptr = tl.where(here, dy_ptrs[j], dy_ptr), tl.where(here, b_ptrs[j], b_ptr)
        dy_stride, scale = tl.where(here, dy_strides[j], dy_stride), tl.where(here, scales[j], scale)
        n, rank = tl.where(here, ns[j], n), tl.where(here, ranks[j], rank)
    # [WARPS, rows of a warp, columns]: each warp holds its own rows of S alone, and their sums for dB meet at the end
    own: tl.constexpr = ROWS // WARPS
    row = (tl.arange(0, WARPS)[:, None] * own + tl.arange(0, own)[None, :])[:, :, None] + tile.to(tl.int64) * ROWS
    inside, r = row < rows, r[None, None, :]
    s = load_operand(s_ptr + tl.cast(index, tl.int64) * rows * PADDED_R + row * PADDED_R + r, inside & (r < rank), ACC)
    ds = tl.zeros((WARPS, own, R), ACC)
    for start_n in range((part - first) * span, min((part - first) * span + span, n), BN):
        col = start_n + tl.arange(0, BN)
        dy = load_operand(dy_ptr + row * dy_stride + col[None, None, :], inside & (col[None, None, :] < n), ACC)
        # dS_j += dY_j B_j                                             [own, BN] x [BN, R], a warp its own rows
        if ds_ptr is not None:
            at = col[None, :, None].to(tl.int64) * rank + r
            b = as_operand(load(b_ptr + at, (col[None, :, None] < n) & (r < rank), ACC), s_ptr.dtype.element_ty)
            ds = dot(dy, tl.broadcast_to(b, (WARPS, BN, R)), ds)
        # dB_j^T = S_j^T dY_j of these rows, its columns stored at once             [R, own] x [own, BN]
        if db_ptr is not None:
            db = _over_warps(dot(tl.trans(s, (0, 2, 1)), dy, tl.zeros((WARPS, R, BN), ACC)), WARPS) * scale
            at = (tile.to(tl.int64) * N + before + col[None, :]) * PADDED_R + tl.trans(tl.reshape(r, (1, R)))
            store(db_ptr + at, db, col[None, :] < n)
    if ds_ptr is not None:
        store(ds_ptr + part.to(tl.int64) * rows * PADDED_R + row * PADDED_R + r, ds * scale, inside)


@jit(do_not_specialize=["rows", "seeds", "thresholds", "span"])
def _shrink_backward_kernel(
    x_ptr,
    ds_ptr,
    out_ptr,
    ranks,
    seeds,
    thresholds,
    x_stride,
    rows,
    K,
    span,
    blocks,
    COUNT: tl.constexpr,
    DROPOUT: tl.constexpr,
    PADDED_R: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program: BK of the K columns, `span` rows, R of the rows of every dA_j; out [rows / span, COUNT, PADDED_R, K]."""
    tiles = tl.cdiv(K, BK)
    r, rest = tl.program_id(0) % blocks * R + tl.arange(0, R), tl.program_id(0) // blocks
    tile, part = rest % tiles, rest // tiles
    k = tile * BK + tl.arange(0, BK)[None, :]
    # dA_j += dS_j^T mask_j(x) of a tile of x, for every adapter                  [R, BM] x [BM, BK]
    sums = (tl.zeros((R, BK), ACC),) * COUNT
    first = part.to(tl.int64) * span
    for start in range(0, span, BM):
        row = first + start + tl.arange(0, BM)[:, None]
        inside = row < rows
        x = load_operand(x_ptr + row * x_stride + k, inside & (k < K), ACC)
        news = ()
        for j in tl.static_range(COUNT):
            at = ds_ptr + tl.cast(j, tl.int64) * rows * PADDED_R + row * PADDED_R + r[None, :]
            ds = load_operand(at, inside & (r[None, :] < ranks[j]), ACC)
            if DROPOUT:
                x_j = tl.where(keep_mask(seeds[j], thresholds[j], row, tile * BK, BK), x, 0.0)
            else:
                x_j = x
            news = news + (dot(tl.trans(ds), x_j, sums[j]),)
        sums = news
    for j in tl.static_range(COUNT):
        at = ((part * COUNT + j) * PADDED_R + r[:, None]).to(tl.int64) * K + k
        store(out_ptr + at, sums[j], k < K)


@jit(do_not_specialize=["parts"])
def _sum_kernel(parts_ptr, out_ptr, parts, size, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """out [size] = the sum of parts [parts, size], first to last; size is a multiple of 16, as every padded rank is."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), ACC)
    for _ in range(parts):
        total += load(parts_ptr + at, at < size, ACC)
        parts_ptr += size
    store(out_ptr + at, total, at < size)


def shrink(x: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """S [projections, T, padded rank] for x [T, K]."""
    (rows, k), width, options = x.shape, padded_rank(adapters), launch_options(SHRINK, x, adapters)
    options |= _many(adapters, options["R"])
    row_tiles, blocks = cdiv(rows, options["BM"]), width // options["R"]
    parts, span = _split(k, options["BK"], row_tiles * blocks, x)
    s = torch.empty((len(adapters), rows, width), dtype=x.dtype, device=x.device)
    out = s if parts == 1 else torch.empty((parts, *s.shape), dtype=_accum_dtype(x), device=x.device)
    _shrink_kernel[(row_tiles * blocks * parts,)](
        x,
        out,
        tuple(a.a.contiguous() for a in adapters),
        tuple(a.a.shape[0] for a in adapters),
        x_stride=x.stride(0),
        rows=rows,
        K=k,
        span=span,
        blocks=blocks,
        **dropout_args(adapters),
        **options,
    )
    return s if parts == 1 else _sum(out, s)


def expand_backward(
    dys: Sequence[Tensor], s: Tensor, adapters: Sequence[Adapter], needs_ds: bool, needs_db: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dS [projections, T, padded rank] and dB [N_j, R_j] of every projection in fp32, each where it is wanted."""
    (_, rows, width), ns, options = s.shape, [dy.shape[1] for dy in dys], launch_options(EXPAND_BACKWARD, s, adapters)
    options["ROWS"] = _row_tile(rows, sum(ns), options["ROWS"] * 16 // options["R"], PROGRAMS[arch(s)])
    row_tiles, blocks, columns = (
        cdiv(rows, options["ROWS"]),
        width // options["R"],
        [cdiv(n, options["BN"]) for n in ns],
    )
    # one program fills a multiprocessor here, so a few too many would take as long again
    most = max(PROGRAMS[arch(s)] // (row_tiles * blocks), len(ns))
    tiles = next(
        t for t in range(cdiv(sum(columns), most), max(columns) + 1) if sum(cdiv(c, t) for c in columns) <= most
    )
    ranges = [cdiv(c, tiles) for c in columns]
    ds = db = None
    if needs_ds:
        ds = torch.empty((sum(ranges), rows, width), dtype=_accum_dtype(s), device=s.device)
    if needs_db:
        db = torch.empty((row_tiles, sum(ns), width), dtype=_accum_dtype(s), device=s.device)
    _expand_backward_kernel[(row_tiles * blocks * sum(ranges),)](
        tuple(dys),
        tuple(dy.stride(0) for dy in dys),
        tuple(a.b.contiguous() for a in adapters),
        s,
        ds,
        db,
        tuple(a.factor for a in adapters),
        tuple(ns),
        tuple(a.a.shape[0] for a in adapters),
        rows,
        row_tiles,
        tiles,
        blocks,
        sum(ns),
        WARPS=options["num_warps"],
        **options,
    )
    if ds is not None:
        whole = torch.empty(s.shape, dtype=s.dtype, device=s.device)
        for part, out in zip(ds.split(ranges), whole, strict=True):
            _sum(part, out)
        ds = whole
    if db is None:
        return ds, [None] * len(adapters)
    whole = _sum(db, torch.empty(tuple(db.shape[1:]), dtype=db.dtype, device=db.device))
    return ds, [d[:, : a.b.shape[1]] for d, a in zip(whole.split(ns), adapters, strict=True)]


def shrink_backward(x: Tensor, ds: Tensor, adapters: Sequence[Adapter]) -> list[Tensor]:
    """dA [R_j, K] of every projection in fp32."""
    (rows, k), (count, _, width), options = x.shape, ds.shape, launch_options(SHRINK, x, adapters)
    if arch(x) == 86 and any(a.p for a in adapters):
        options["num_stages"] = 3  # beside masks the offsets of a fourth spill there
    options |= _many(adapters, options["R"])
    tiles, blocks = cdiv(k, options["BK"]), width // options["R"]
    parts, span = _split(rows, options["BM"], tiles * blocks, x)
    out = torch.empty((parts, count, width, k), dtype=_accum_dtype(x), device=x.device)
    _shrink_backward_kernel[(tiles * blocks * parts,)](
        x,
        ds,
        out,
        tuple(a.a.shape[0] for a in adapters),
        x_stride=x.stride(0),
        rows=rows,
        K=k,
        span=span,
        blocks=blocks,
        **dropout_args(adapters),
        **options,
    )
    whole = out[0] if parts == 1 else _sum(out, torch.empty(tuple(out.shape[1:]), dtype=out.dtype, device=out.device))
    return [d[: a.a.shape[0]] for d, a in zip(whole, adapters, strict=True)]


def _many(adapters: Sequence[Adapter], r: int) -> dict:
    """The options that keep r columns of every projection in registers, where they are many; masks take registers too."""
    masked = any(a.p for a in adapters)
    if len(adapters) * r <= (64 if masked else 96):
        return {}
    return {"num_warps": 8, "num_stages": 3, "R": 16 if masked and len(adapters) == 3 else 32}


def _sum(parts: Tensor, out: Tensor) -> Tensor:
    options = configuration(SUM, parts)
    _sum_kernel[(cdiv(out.numel(), options["BLOCK"]),)](parts, out, parts.shape[0], out.numel(), **options)
    return out


def _split(size: int, block: int, others: int, x: Tensor) -> tuple[int, int]:
    """(parts, span of a part): whole blocks of a size, as many parts as bring `others` programs near PROGRAMS."""
    span = cdiv(cdiv(size, block), max(1, PROGRAMS[arch(x)] // others)) * block
    return cdiv(size, span), span


def _row_tile(rows: int, n: int, most: int, programs: int) -> int:
    """Rows of a program, `most` or half as many: the partials of dB take n a tile of rows, those of dS `programs` a row of it."""
    return min(most, most // 2, key=lambda size: cdiv(rows, size) * n + programs * size)


def _accum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
