"""The narrow products of linear layers with adapters, each wide tensor read once: shrink and the gradients of A, B and
S.

    S_j = mask_j(x) A_j^T        dS_j = s_j dY_j B_j        dB_j = s_j dY_j^T S_j        dA_j = dS_j^T mask_j(x)

mask_j(x) is x where the dropout mask of a projection keeps it and 0 elsewhere; s_j = scale_j / (1 - p_j) makes up for
what is dropped. x [T, K] is read once for all projections of the group, each with its own mask; each dY_j [T, N_j] once
for dS_j and dB_j. What several programs add to, dS and dB, and S of few rows, is kept as fp32 partials, which a second
kernel adds up in a fixed order: no atomics, and the number of partials depends only on the shapes. S and dS are [projections, T, padded rank] in
the dtype of x; their columns from the rank on are zero.
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minilora.kernels.dropout import keep_mask, threshold
from minilora.kernels.group import Group, Place, configuration, launch_options
from minilora.kernels.lang import cdiv, jit, load, store, tl
from minilora.kernels.launch import Launch, per_shape
from minilora.kernels.lora_gemm import as_operand, dot, load_operand

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


@jit(do_not_specialize=["rows", "thresholds"])
def _shrink_kernel(
    x_ptr,
    out_ptr,
    a_ptrs,
    seed_ptrs,
    thresholds,
    ranks,
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
                b_xj = tl.where(keep_mask(tl.load(seed_ptrs[j]), thresholds[j], o_x, start_k, BK), b_x, 0.0)
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
    b_ptrs,
    s_ptr,
    ds_ptr,
    db_ptr,
    dy_strides,
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


@jit(do_not_specialize=["rows", "thresholds"])
def _shrink_backward_kernel(
    x_ptr,
    ds_ptr,
    da_ptr,
    seed_ptrs,
    thresholds,
    ranks,
    x_stride,
    rows,
    K,
    blocks,
    COUNT: tl.constexpr,
    DROPOUT: tl.constexpr,
    PADDED_R: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program: BK of the K columns, all rows, R rows of every dA_j [PADDED_R, K]."""
    o_r, i_k = tl.program_id(0) % blocks * R + tl.arange(0, R), tl.program_id(0) // blocks
    o_k = i_k * BK + tl.arange(0, BK)[None, :]
    # from S_j = mask_j(x) A_j^T: dA_j += dS_j^T mask_j(x), every adapter from one tile of x  [R, BM] x [BM, BK]
    sums = (tl.zeros((R, BK), ACC),) * COUNT
    for start_m in range(0, rows, BM):
        o_m = tl.cast(start_m, tl.int64) + tl.arange(0, BM)[:, None]
        m_m = o_m < rows
        b_x = load_operand(x_ptr + o_m * x_stride + o_k, m_m & (o_k < K), ACC)
        news = ()
        for j in tl.static_range(COUNT):
            p_ds = ds_ptr + tl.cast(j, tl.int64) * rows * PADDED_R + o_m * PADDED_R + o_r[None, :]
            b_ds = load_operand(p_ds, m_m & (o_r[None, :] < ranks[j]), ACC)
            if DROPOUT:
                b_xj = tl.where(keep_mask(tl.load(seed_ptrs[j]), thresholds[j], o_m, i_k * BK, BK), b_x, 0.0)
            else:
                b_xj = b_x
            news = news + (dot(tl.trans(b_ds), b_xj, sums[j]),)
        sums = news
    for j in tl.static_range(COUNT):
        store(da_ptr + (j * PADDED_R + o_r[:, None]).to(tl.int64) * K + o_k, sums[j], o_k < K)


@jit
def _add_up(parts_ptr, out_ptr, i_n, parts, size, width, rank, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """BLOCK values of the sum of parts [parts, size], first to last; out has `rank` of each `width` values, size is a multiple of 16."""
    o_n = i_n.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros((BLOCK,), ACC)
    for _ in range(parts):
        b_sum += load(parts_ptr + o_n, o_n < size, ACC)
        parts_ptr += size
    store(out_ptr + o_n // width * rank + o_n % width, b_sum, (o_n < size) & (o_n % width < rank))


@jit(do_not_specialize=["parts", "more_parts"])
def _sum_kernel(
    parts_ptr,
    out_ptr,
    more_ptr,
    more_out_ptr,
    parts,
    size,
    more_parts,
    more_size,
    more_width,
    more_rank,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """out [COUNT, size], row j the sum of the next parts[j] of [sum of parts, size]; and one more sum, or None, without padding."""
    tiles = tl.cdiv(size, BLOCK)
    j, i_n = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if j < COUNT:
        first, count = 0, parts[0]
        for i in tl.static_range(1, COUNT):
            first, count = tl.where(j >= i, first + parts[i - 1], first), tl.where(j == i, parts[i], count)
        parts_ptr += tl.cast(first, tl.int64) * size
        _add_up(parts_ptr, out_ptr + j.to(tl.int64) * size, i_n, count, size, 1, 1, BLOCK, ACC)
    elif more_ptr is not None:
        i_more = tl.program_id(0) - COUNT * tiles
        _add_up(more_ptr, more_out_ptr, i_more, more_parts, more_size, more_width, more_rank, BLOCK, ACC)


@per_shape
def _shrink_launch(
    place: Place, rows: int, k: int, x_stride: int, ranks: tuple[int, ...], rates: tuple[float, ...]
) -> tuple[Launch, int, int]:
    """And the number of parts of K, and the padded rank."""
    options = launch_options(SHRINK, place, ranks)
    options |= _many(rates, options["R"])
    blocks = options["PADDED_R"] // options["R"]
    parts, span = split(options, rows, k, blocks, place)
    numbers = tuple(map(threshold, rates)), ranks, x_stride, rows, k, span, blocks
    programs = cdiv(rows, options["BM"]) * blocks * parts
    return Launch(place.device, programs, numbers, DROPOUT=any(rates), **options), parts, options["PADDED_R"]


def shrink(x: Tensor, group: Group) -> Tensor:
    """S [adapters, T, padded rank] for x [T, K]."""
    place, (rows, k) = Place.of(x), x.shape
    launch, parts, width = _shrink_launch(place, rows, k, x.stride(0), group.ranks, group.rates)
    s, out = sums(x, (len(group.a), rows, width), parts)
    launch(_shrink_kernel, x, out, group.a, group.seeds)
    add_up(place, out, s, parts)
    return s


def sums(x: Tensor, shape: tuple[int, ...], parts: int) -> tuple[Tensor, Tensor]:
    """Memory for sums in the dtype of x, and for so many parts of them: the same where there is one."""
    s = torch.empty(shape, dtype=x.dtype, device=x.device)
    return s, s if parts == 1 else torch.empty((parts, *shape), dtype=wide_dtype(x.dtype), device=x.device)


def add_up(place: Place, parts: Tensor, s: Tensor, count: int) -> None:
    """Write the sums of the parts into s, where there are several."""
    if count > 1:
        _sum_launch(place, (count,), s.numel())(_sum_kernel, parts, s, None, None)


class _ExpandBackward(NamedTuple):
    launch: Launch
    sums: Launch  # of the partial sums of dS and dB, those that are wanted
    ranges: int  # of columns, of all projections
    row_tiles: int


def _db_columns(ranks: Sequence[int], width: int, needs_ds: bool) -> int:
    """Of the sum of dB: without padding where the ranks are one, so that autograd takes a gradient as it is, without a copy."""
    return ranks[0] if needs_ds and len(set(ranks)) == 1 else width


@per_shape
def _expand_backward_launch(
    place: Place,
    rows: int,
    strides: tuple[int, ...],
    ns: tuple[int, ...],
    ranks: tuple[int, ...],
    factors: tuple[float, ...],
    needs_ds: bool,
    needs_db: bool,
) -> _ExpandBackward:
    options, programs = launch_options(EXPAND_BACKWARD, place, ranks), PROGRAMS[place.arch]
    options["ROWS"] = _row_tile(rows, sum(ns), options["ROWS"] * 16 // options["R"], programs)
    width, columns = options["PADDED_R"], [cdiv(n, options["BN"]) for n in ns]
    row_tiles, blocks = cdiv(rows, options["ROWS"]), width // options["R"]
    # one program fills a multiprocessor here, so a few too many would take as long again
    most = max(programs // (row_tiles * blocks), len(ns))
    tiles = next(
        t for t in range(cdiv(sum(columns), most), max(columns) + 1) if sum(cdiv(c, t) for c in columns) <= most
    )
    ranges = tuple(cdiv(c, tiles) for c in columns)
    numbers = strides, factors, ns, ranks, rows, row_tiles, tiles, blocks, sum(ns)
    grid = row_tiles * blocks * sum(ranges)
    launch = Launch(place.device, grid, numbers, WARPS=options["num_warps"], **options)
    of_db = row_tiles, sum(ns) * width, width, _db_columns(ranks, width, needs_ds)
    if needs_ds:
        sums = _sum_launch(place, ranges, rows * width, *(of_db if needs_db else ()))
    else:
        sums = _sum_launch(place, of_db[:1], of_db[1])
    return _ExpandBackward(launch, sums, sum(ranges), row_tiles)


def expand_backward(
    dys: Sequence[Tensor], s: Tensor, group: Group, needs_ds: bool, needs_db: bool
) -> tuple[Tensor | None, Sequence[Tensor | None]]:
    """dS [adapters, T, padded rank] and dB [N_j, R_j] of every adapter in fp32, each where it is wanted; dys are those of adapters."""
    if not needs_ds and not needs_db:
        return None, [None] * len(dys)
    (_, rows, width), ns, device = s.shape, tuple([b.shape[0] for b in group.b]), s.device
    strides = tuple([dy.stride(0) for dy in dys])
    launch, adding, ranges, row_tiles = _expand_backward_launch(
        Place.of(s), rows, strides, ns, group.ranks, group.factors, needs_ds, needs_db
    )
    wide, ds, db, ds_parts, db_parts = wide_dtype(s.dtype), None, None, None, None
    if needs_ds:
        ds_parts = torch.empty((ranges, rows, width), dtype=wide, device=device)
        ds = torch.empty(s.shape, dtype=s.dtype, device=device)
    if needs_db:
        db_parts = torch.empty((row_tiles, sum(ns), width), dtype=wide, device=device)
        db = torch.empty((sum(ns), _db_columns(group.ranks, width, needs_ds)), dtype=wide, device=device)
    launch(_expand_backward_kernel, tuple(dys), group.b, s, ds_parts, db_parts)
    if ds is None:
        adding(_sum_kernel, db_parts, db, None, None)
    else:
        adding(_sum_kernel, ds_parts, ds, db_parts, db)
    if db is None:
        return ds, [None] * len(dys)
    return ds, [d if r == db.shape[1] else d[:, :r] for d, r in zip(db.split(ns), group.ranks, strict=True)]


@per_shape
def _shrink_backward_launch(
    place: Place, rows: int, k: int, x_stride: int, ranks: tuple[int, ...], rates: tuple[float, ...]
) -> Launch:
    options = launch_options(SHRINK, place, ranks)
    columns = len(ranks) * options["R"]
    if place.arch == 86 and any(rates):
        options["num_stages"] = 3 if columns <= 48 else 2  # beside masks the offsets of more spill there
    many = _many(rates, options["R"])
    options |= many | ({"num_stages": 2} if many and any(rates) else {})  # masks take the registers of a third
    blocks = options["PADDED_R"] // options["R"]
    if options["BK"] > 32 and cdiv(k, options["BK"]) * blocks < PROGRAMS[place.arch]:
        # few columns: narrower tiles, of which twice as many are on their way where registers hold as much of dS
        options |= {"BK": 32, "num_stages": options["num_stages"] * (2 if columns <= 48 else 1)}
    numbers = tuple(map(threshold, rates)), ranks, x_stride, rows, k, blocks
    return Launch(place.device, cdiv(k, options["BK"]) * blocks, numbers, DROPOUT=any(rates), **options)


def shrink_backward(x: Tensor, ds: Tensor, group: Group) -> list[Tensor]:
    """dA [R_j, K] of every adapter in fp32."""
    place, (rows, k), (count, _, width) = Place.of(x), x.shape, ds.shape
    launch = _shrink_backward_launch(place, rows, k, x.stride(0), group.ranks, group.rates)
    da = torch.empty((count, width, k), dtype=wide_dtype(x.dtype), device=x.device)
    launch(_shrink_backward_kernel, x, ds, da, group.seeds)
    return [d if r == width else d[:r] for d, r in zip(da.unbind(), group.ranks, strict=True)]


@per_shape
def _sum_launch(
    place: Place,
    parts: tuple[int, ...],
    size: int,
    more_parts: int = 0,
    more_size: int = 0,
    more_width: int = 1,
    more_rank: int = 1,
) -> Launch:
    options = configuration(SUM, place)
    programs = len(parts) * cdiv(size, options["BLOCK"]) + cdiv(more_size, options["BLOCK"])
    numbers = parts, size, more_parts, more_size, more_width, more_rank
    return Launch(place.device, programs, numbers, COUNT=len(parts), **options)


def _many(rates: Sequence[float], r: int) -> dict:
    """Options for many columns in registers, r of every projection; masks take registers too."""
    masked = any(rates)
    if len(rates) * r <= (64 if masked else 96):
        return {}
    return {"num_warps": 8, "num_stages": 3, "R": 16 if masked and len(rates) == 3 else 32}


def split(options: dict, rows: int, k: int, blocks: int, place: Place) -> tuple[int, int]:
    """(parts, span of a part) of K for kernels that sum over it, in whole tiles.

    Parts must be added up by one more launch. So the tiles in `options` get fewer rows first, until a quarter of the
    multiprocessors has one; only then, for some hundred rows, there are parts, about a program for each.
    """
    programs = PROGRAMS[place.arch]
    while options["BM"] > 16 and 4 * cdiv(rows, options["BM"]) * blocks < programs:
        options["BM"] //= 2
    others = cdiv(rows, options["BM"]) * blocks
    span = cdiv(cdiv(k, options["BK"]), programs // others if 4 * others < programs else 1) * options["BK"]
    return cdiv(k, span), span


def _row_tile(rows: int, n: int, most: int, programs: int) -> int:
    """Rows of a program, `most` or half of it, whichever makes fewer partials: n of dB a tile, programs of dS a row."""
    return min(most, most // 2, key=lambda size: cdiv(rows, size) * n + programs * size)


@per_shape
def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
