"""The narrow products of linear layers with adapters, each wide tensor read once: shrink and the gradients of A, B and
S.

    S_j = mask_j(x) A_j^T        dS_j = s_j dY_j B_j        dB_j = s_j dY_j^T S_j        dA_j = dS_j^T mask_j(x)

mask_j(x) is x where the dropout mask of a projection keeps it and 0 elsewhere; s_j = scale_j / (1 - p_j) makes up for
what is dropped. x [T, K] is read once for all projections of the group, each with its own mask; each dY_j [T, N_j] once
for dS_j and dB_j. What several programs add to is kept as fp32 partials, which a second kernel adds up in a fixed
order: no atomics, and the number of partials depends only on the shapes. S and dS are [projections, T, padded rank] in
the dtype of x; their columns from the rank on are zero.
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

PROGRAMS = {0: 128, 80: 108, 86: 84, 90: 132}  # that fill a GPU: one for each multiprocessor
# by architecture, as in lora_gemm
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
    """A program: BM rows, `span` of the K columns, R columns of every S_j; out [K / span, COUNT, rows, PADDED_R]."""
    row_tiles = tl.cdiv(rows, BM)
    # programs that read the same x run side by side, so that the second one finds it in the cache; so below, too
    o_r, i_rest = tl.program_id(0) % blocks * R + tl.arange(0, R)[None, :], tl.program_id(0) // blocks
    i_m, i_span = i_rest % row_tiles, i_rest // row_tiles
    o_m = i_m.to(tl.int64) * BM + tl.arange(0, BM)[:, None]
    o_x = tl.minimum(o_m, rows - 1)  # rows beyond the end read the last one: no mask in the loop
    first = i_span * span
    p_x = x_ptr + o_x * x_stride + (first + tl.arange(0, BK))[None, :]
    # shrink: S_j += mask_j(x) A_j^T, every adapter from one tile of x                        [BM, BK] x [BK, R]
    sums = (tl.zeros((BM, R), ACC),) * COUNT
    for start_k in range(first, min(first + span, K), BK):
        o_k = start_k + tl.arange(0, BK)
        b_x = load_operand(p_x, o_k[None, :] < K, ACC)
        p_x += BK
        news = ()
        for j in tl.static_range(COUNT):
            b_a = load(a_ptrs[j] + o_r * K + o_k[:, None], (o_r < ranks[j]) & (o_k[:, None] < K), ACC)
            b_a = as_operand(b_a, x_ptr.dtype.element_ty)
            if DROPOUT:
                b_xj = tl.where(keep_mask(seeds[j], thresholds[j], o_x, start_k, BK), b_x, 0.0)
            else:
                b_xj = b_x
            news = news + (dot(b_xj, b_a, sums[j]),)
        sums = news
    # store the partial sums of this span of K; _sum_kernel adds them up                                 [BM, R]
    for j in tl.static_range(COUNT):
        o_s = (i_span.to(tl.int64) * COUNT + j) * rows * PADDED_R + o_m * PADDED_R + o_r
        store(out_ptr + o_s, sums[j], o_m < rows)


@jit
def _sum_over_warps(b_x, WARPS: tl.constexpr):
    """The sum of a tile [WARPS, R, BN] over its first axis, in one exchange between warps, where tl.sum makes many."""
    shape: tl.constexpr = b_x.shape
    b_x = tl.permute(b_x, (1, 2, 0))
    for i in tl.static_range(1, 4):
        if WARPS >= 2**i:
            b_even, b_odd = tl.split(tl.reshape(b_x, (shape[1], shape[2], WARPS // 2**i, 2)))
            b_x = b_even + b_odd
    return tl.reshape(b_x, (shape[1], shape[2]))


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
    """A program: ROWS rows, `tiles` times BN of the columns of one dY_j, R of the columns of S_j; its warps share the
    rows.

    ds [spans of all projections, rows, PADDED_R], db [row tiles, columns of all projections, PADDED_R]; None where not
    wanted.
    """
    o_r, i_rest = tl.program_id(0) % blocks * R + tl.arange(0, R), tl.program_id(0) // blocks
    i_m, i_span = i_rest % row_tiles, i_rest // row_tiles
    # which projection j the span of columns belongs to: `first` its first span, `before` the columns of those before it
    dy_ptr, dy_stride, b_ptr, scale, n, rank = dy_ptrs[0], dy_strides[0], b_ptrs[0], scales[0], ns[0], ranks[0]
    j, first, before, start, columns = 0, 0, 0, 0, 0
    span = tiles * BN
    for i in tl.static_range(1, COUNT):
        start += tl.cdiv(ns[i - 1], span)
        columns += ns[i - 1]
        here = i_span >= start
        first, before, j = tl.where(here, start, first), tl.where(here, columns, before), tl.where(here, i, j)
        dy_ptr, b_ptr = tl.where(here, dy_ptrs[i], dy_ptr), tl.where(here, b_ptrs[i], b_ptr)
        dy_stride, scale = tl.where(here, dy_strides[i], dy_stride), tl.where(here, scales[i], scale)
        n, rank = tl.where(here, ns[i], n), tl.where(here, ranks[i], rank)
    # [WARPS, rows of a warp, columns]: each warp holds S of its own rows only; the sums for dB meet at the end
    BM: tl.constexpr = ROWS // WARPS
    o_m = (tl.arange(0, WARPS)[:, None] * BM + tl.arange(0, BM)[None, :])[:, :, None] + i_m.to(tl.int64) * ROWS
    m_m, o_r = o_m < rows, o_r[None, None, :]
    b_s = load_operand(s_ptr + tl.cast(j, tl.int64) * rows * PADDED_R + o_m * PADDED_R + o_r, m_m & (o_r < rank), ACC)
    b_ds = tl.zeros((WARPS, BM, R), ACC)
    # from y_j = ... + s_j S_j B_j^T: dS_j = s_j dY_j B_j and dB_j = s_j dY_j^T S_j, both from one read of dY_j
    for start_n in range((i_span - first) * span, min((i_span - first) * span + span, n), BN):
        o_n = start_n + tl.arange(0, BN)
        b_dy = load_operand(dy_ptr + o_m * dy_stride + o_n[None, None, :], m_m & (o_n[None, None, :] < n), ACC)
        # dS_j += dY_j B_j, each warp its own rows                                            [BM, BN] x [BN, R]
        if ds_ptr is not None:
            o_b = o_n[None, :, None].to(tl.int64) * rank + o_r
            b_b = as_operand(load(b_ptr + o_b, (o_n[None, :, None] < n) & (o_r < rank), ACC), s_ptr.dtype.element_ty)
            b_ds = dot(b_dy, tl.broadcast_to(b_b, (WARPS, BN, R)), b_ds)
        # dB_j^T = S_j^T dY_j of these rows; these columns are complete and stored            [R, BM] x [BM, BN]
        if db_ptr is not None:
            b_db = _sum_over_warps(dot(tl.trans(b_s, (0, 2, 1)), b_dy, tl.zeros((WARPS, R, BN), ACC)), WARPS) * scale
            o_db = (i_m.to(tl.int64) * N + before + o_n[None, :]) * PADDED_R + tl.trans(tl.reshape(o_r, (1, R)))
            store(db_ptr + o_db, b_db, o_n[None, :] < n)
    if ds_ptr is not None:
        store(ds_ptr + i_span.to(tl.int64) * rows * PADDED_R + o_m * PADDED_R + o_r, b_ds * scale, m_m)


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
    """A program: BK of the K columns, `span` rows, R rows of every dA_j; out [rows / span, COUNT, PADDED_R, K]."""
    col_tiles = tl.cdiv(K, BK)
    o_r, i_rest = tl.program_id(0) % blocks * R + tl.arange(0, R), tl.program_id(0) // blocks
    i_k, i_span = i_rest % col_tiles, i_rest // col_tiles
    o_k = i_k * BK + tl.arange(0, BK)[None, :]
    # from S_j = mask_j(x) A_j^T: dA_j += dS_j^T mask_j(x), every adapter from one tile of x  [R, BM] x [BM, BK]
    sums = (tl.zeros((R, BK), ACC),) * COUNT
    first = i_span.to(tl.int64) * span
    for start_m in range(0, span, BM):
        o_m = first + start_m + tl.arange(0, BM)[:, None]
        m_m = o_m < rows
        b_x = load_operand(x_ptr + o_m * x_stride + o_k, m_m & (o_k < K), ACC)
        news = ()
        for j in tl.static_range(COUNT):
            p_ds = ds_ptr + tl.cast(j, tl.int64) * rows * PADDED_R + o_m * PADDED_R + o_r[None, :]
            b_ds = load_operand(p_ds, m_m & (o_r[None, :] < ranks[j]), ACC)
            if DROPOUT:
                b_xj = tl.where(keep_mask(seeds[j], thresholds[j], o_m, i_k * BK, BK), b_x, 0.0)
            else:
                b_xj = b_x
            news = news + (dot(tl.trans(b_ds), b_xj, sums[j]),)
        sums = news
    # store the partial sums of this span of rows; _sum_kernel adds them up                              [R, BK]
    for j in tl.static_range(COUNT):
        o_a = ((i_span * COUNT + j) * PADDED_R + o_r[:, None]).to(tl.int64) * K + o_k
        store(out_ptr + o_a, sums[j], o_k < K)


@jit(do_not_specialize=["parts"])
def _sum_kernel(parts_ptr, out_ptr, parts, size, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """out [size] = the sum of parts [parts, size], first to last; size is a multiple of 16, as every padded rank is."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros((BLOCK,), ACC)
    for _ in range(parts):
        b_sum += load(parts_ptr + o_n, o_n < size, ACC)
        parts_ptr += size
    store(out_ptr + o_n, b_sum, o_n < size)


def shrink(x: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """S [projections, T, padded rank] of x [T, K]."""
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
    """dS [projections, T, padded rank] and dB [N_j, R_j] of every projection in fp32, each only where it is needed."""
    (_, rows, width), ns, options = s.shape, [dy.shape[1] for dy in dys], launch_options(EXPAND_BACKWARD, s, adapters)
    options["ROWS"] = _row_tile(rows, sum(ns), options["ROWS"] * 16 // options["R"], PROGRAMS[arch(s)])
    row_tiles, blocks = cdiv(rows, options["ROWS"]), width // options["R"]
    col_tiles = [cdiv(n, options["BN"]) for n in ns]
    # one program fills a multiprocessor, so a few more programs than multiprocessors would take twice as long
    most = max(PROGRAMS[arch(s)] // (row_tiles * blocks), len(ns))
    tiles = next(
        t for t in range(cdiv(sum(col_tiles), most), max(col_tiles) + 1) if sum(cdiv(c, t) for c in col_tiles) <= most
    )
    spans = [cdiv(c, tiles) for c in col_tiles]
    ds = db = None
    if needs_ds:
        ds = torch.empty((sum(spans), rows, width), dtype=_accum_dtype(s), device=s.device)
    if needs_db:
        db = torch.empty((row_tiles, sum(ns), width), dtype=_accum_dtype(s), device=s.device)
    _expand_backward_kernel[(row_tiles * blocks * sum(spans),)](
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
        for part, out in zip(ds.split(spans), whole, strict=True):
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
        options["num_stages"] = 3  # with masks, the offsets of a fourth stage spill there
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
    """Options for many columns in registers, r of every projection; masks take registers too."""
    masked = any(a.p for a in adapters)
    if len(adapters) * r <= (64 if masked else 96):
        return {}
    return {"num_warps": 8, "num_stages": 3, "R": 16 if masked and len(adapters) == 3 else 32}


def _sum(parts: Tensor, out: Tensor) -> Tensor:
    options = configuration(SUM, parts)
    _sum_kernel[(cdiv(out.numel(), options["BLOCK"]),)](parts, out, parts.shape[0], out.numel(), **options)
    return out


def _split(size: int, block: int, others: int, x: Tensor) -> tuple[int, int]:
    """(parts, span of a part) of a size, in whole blocks: so many parts that parts * others is about PROGRAMS."""
    span = cdiv(cdiv(size, block), max(1, PROGRAMS[arch(x)] // others)) * block
    return cdiv(size, span), span


def _row_tile(rows: int, n: int, most: int, programs: int) -> int:
    """Rows of a program, `most` or half of it, whichever makes fewer partials: n of dB a tile, programs of dS a row."""
    return min(most, most // 2, key=lambda size: cdiv(rows, size) * n + programs * size)


def _accum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
