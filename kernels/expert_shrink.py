"""The low-rank products of the experts of a mixture, over slots sorted by expert (expert_tiles.py).

    S = mask(x) A_e^T        dS = f dY B_e              of every slot, with the A and B of its expert e
    dA_e = dS^T mask(x)      dB_e = f (weight dY)^T S   summed over the slots of e; zero without slots

f and mask are those of lora_shrink.py; only down has routing weights. One kernel sums over columns, one over slots. A program of
the second has all slots of an expert, so that no two programs add to one sum; if all experts share a factor, a program has a
span of the slots, and lora_shrink adds the partial sums in a fixed order. S and dS are [T k, padded rank], sorted by expert.
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false

import torch
from torch import Tensor

from minilora.kernels.dropout import keep_mask, threshold
from minilora.kernels.expert_tiles import Sizes, Stack, Tiles, buffer_rows, tile_at
from minilora.kernels.group import Place, launch_options
from minilora.kernels.lang import cdiv, jit, load, store, tl
from minilora.kernels.launch import Launch, per_shape
from minilora.kernels.lora_gemm import as_operand, dot, load_operand
from minilora.kernels.lora_shrink import PROGRAMS, SHRINK, add_up, wide_dtype


@jit(do_not_specialize=["threshold"])
def _over_columns_kernel(
    x_ptr,
    factor_ptr,
    out_ptr,
    seed_ptr,
    slots_ptr,
    tiles_ptr,
    threshold,
    scale,
    rank,
    r_stride,
    k_stride,
    step,
    x_stride,
    chosen,
    K,
    blocks,
    FROM: tl.constexpr,
    MASK: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED_R: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program: BM slots of a tile of ROWS, R columns of out [slots, PADDED_R] = scale * mask(x) F_e^T, F_e [R, K]."""
    o_r, i_rest = tl.program_id(0) % blocks * R + tl.arange(0, R)[None, :], tl.program_id(0) // blocks
    expert, first, end = tile_at(tiles_ptr, i_rest // (ROWS // BM))
    first += i_rest % (ROWS // BM) * BM
    if first >= end:
        return
    o_i = tl.minimum(first + tl.arange(0, BM), end - 1)
    p_x = x_ptr + buffer_rows(slots_ptr, o_i, chosen, FROM)[:, None] * x_stride + tl.arange(0, BK)[None, :]
    factor_ptr += expert * step
    if seed_ptr is not None:
        o_mask, seed = buffer_rows(slots_ptr, o_i, chosen, MASK)[:, None], tl.load(seed_ptr)
    b_s = tl.zeros((BM, R), ACC)
    for start_k in range(0, K, BK):
        o_k = start_k + tl.arange(0, BK)
        b_x = load_operand(p_x, o_k[None, :] < K, ACC)
        p_x += BK
        # S += mask(x) F_e^T                                                                [BM, BK] x [BK, R]
        p_f, m_f = factor_ptr + o_r * r_stride + o_k[:, None] * k_stride, (o_r < rank) & (o_k[:, None] < K)
        b_f = as_operand(load(p_f, m_f, ACC), x_ptr.dtype.element_ty)
        if seed_ptr is not None:
            b_x = tl.where(keep_mask(seed, threshold, o_mask, start_k, BK), b_x, 0.0)
        b_s = dot(b_x, b_f, b_s)
    o_m = tl.arange(0, BM)[:, None]
    store(out_ptr + (first + o_m).to(tl.int64) * PADDED_R + o_r, b_s * scale, o_m < end - first)


@jit(do_not_specialize=["threshold", "slots", "span"])
def _over_slots_kernel(
    s_ptr,
    x_ptr,
    out_ptr,
    weights_ptr,
    seed_ptr,
    slots_ptr,
    starts_ptr,
    threshold,
    scale,
    rank,
    r_stride,
    k_stride,
    x_stride,
    chosen,
    K,
    slots,
    span,
    blocks,
    FROM: tl.constexpr,
    MASK: tl.constexpr,
    PADDED_R: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program: the slots of an expert, or `span` of all where starts is None, BK of the K columns, R rows of out
    [experts or spans, R, K] = scale * (weight S)^T mask(x)."""
    o_r, i_rest = tl.program_id(0) % blocks * R + tl.arange(0, R), tl.program_id(0) // blocks
    col_tiles = tl.cdiv(K, BK)
    i_k, part = i_rest % col_tiles, i_rest // col_tiles
    if starts_ptr is None:
        first = part * span
        end = tl.minimum(first + span, slots)
    else:
        first, end = tl.load(starts_ptr + part), tl.load(starts_ptr + part + 1)
    o_k = i_k * BK + tl.arange(0, BK)[None, :]
    b_sum = tl.zeros((R, BK), ACC)
    for start in range(first, end, BM):
        # rows beyond the end read the last one, and S of them is none
        o_i = start + tl.arange(0, BM)
        m_i, o_i = (o_i < end)[:, None], tl.minimum(o_i, end - 1)
        b_x = load_operand(x_ptr + buffer_rows(slots_ptr, o_i, chosen, FROM)[:, None] * x_stride + o_k, o_k < K, ACC)
        if seed_ptr is not None:
            o_mask = buffer_rows(slots_ptr, o_i, chosen, MASK)[:, None]
            b_x = tl.where(keep_mask(tl.load(seed_ptr), threshold, o_mask, i_k * BK, BK), b_x, 0.0)
        p_s = s_ptr + o_i[:, None].to(tl.int64) * PADDED_R + o_r[None, :]
        b_s = load_operand(p_s, m_i & (o_r[None, :] < rank), ACC)
        if weights_ptr is not None:
            b_weights = tl.load(weights_ptr + tl.load(slots_ptr + o_i)).to(ACC)
            b_s = as_operand(b_s.to(ACC) * b_weights[:, None], s_ptr.dtype.element_ty)
        # out += (weight S)^T mask(x)                                                       [R, BM] x [BM, BK]
        b_sum = dot(tl.trans(b_s), b_x, b_sum)
    o_r = o_r[:, None]
    out_ptr += part.to(tl.int64) * rank * K
    store(out_ptr + o_r * r_stride + o_k * k_stride, b_sum * scale, (o_r < rank) & (o_k < K))


@per_shape
def _over_columns_launch(
    place: Place, sizes: Sizes, of_b: bool, x_stride: int, chosen: int, tiles: int, rows: int
) -> tuple[Launch, int]:
    """The launch, and the padded rank. of_b: dS with B, else S with A."""
    options = launch_options(SHRINK, place, [sizes.rank])
    del options["COUNT"]
    options["BM"] = min(options["BM"], rows)
    blocks = options["PADDED_R"] // options["R"]
    names = {"FROM": sizes.rows.dy if of_b else sizes.rows.x, "MASK": sizes.rows.mask, "ROWS": rows}
    # the places of B [N, R] where an F [R, N] would have them, and the numbers beside it
    factor = (
        (sizes.factor, sizes.rank, 1, sizes.rank, sizes.b_step) if of_b else (1.0, sizes.rank, sizes.k, 1, sizes.a_step)
    )
    numbers = threshold(sizes.p), *factor, x_stride, chosen, sizes.n if of_b else sizes.k, blocks
    programs = tiles * (rows // options["BM"]) * blocks
    return Launch(place.device, programs, numbers, **names, **options), options["PADDED_R"]


def shrink(x: Tensor, stack: Stack, tiles: Tiles) -> Tensor:
    """S [T k, padded rank] of x."""
    return _over_columns(x, stack, tiles, False)


def expand_backward(dy: Tensor, stack: Stack, tiles: Tiles) -> Tensor:
    """dS [T k, padded rank] of dY."""
    return _over_columns(dy, stack, tiles, True)


def _over_columns(x: Tensor, stack: Stack, tiles: Tiles, of_b: bool) -> Tensor:
    launch, width = _over_columns_launch(
        Place.of(x), stack.sizes, of_b, x.stride(0), tiles.chosen, len(tiles.table), tiles.rows
    )
    out = torch.empty((len(tiles.slots), width), dtype=x.dtype, device=x.device)
    factor, seed = (stack.b, None) if of_b else (stack.a, stack.seed)
    launch(_over_columns_kernel, x, factor, out, seed, tiles.slots, tiles.table)
    return out


@per_shape
def _over_slots_launch(
    place: Place, sizes: Sizes, of_b: bool, x_stride: int, chosen: int, slots: int
) -> tuple[Launch, int]:
    """The launch, and the number of sums: one per expert, or one per span of the slots."""
    options = launch_options(SHRINK, place, [sizes.rank])
    del options["COUNT"]
    k, step = (sizes.n, sizes.b_step) if of_b else (sizes.k, sizes.a_step)
    blocks = options["PADDED_R"] // options["R"]
    col_tiles = cdiv(k, options["BK"])
    if step:
        sums, span = sizes.experts, slots
    else:
        span = cdiv(cdiv(slots, options["BM"]), max(1, PROGRAMS[place.arch] // (col_tiles * blocks))) * options["BM"]
        sums = cdiv(slots, span)
    names = {"FROM": sizes.rows.dy if of_b else sizes.rows.x, "MASK": sizes.rows.mask}
    factor = (sizes.factor, sizes.rank, 1, sizes.rank) if of_b else (1.0, sizes.rank, k, 1)
    numbers = threshold(sizes.p), *factor, x_stride, chosen, k, slots, span, blocks
    return Launch(place.device, sums * col_tiles * blocks, numbers, **names, **options), sums


def shrink_backward(x: Tensor, ds: Tensor, stack: Stack, tiles: Tiles) -> Tensor:
    """dA [E or 1, R, K] in fp32."""
    assert stack.a is not None, stack.sizes
    return _over_slots(ds, x, stack.a, None, stack, tiles, False)


def expand_factor_backward(dy: Tensor, s: Tensor, weights: Tensor | None, stack: Stack, tiles: Tiles) -> Tensor:
    """dB [E or 1, N, R] in fp32; weights [T k] indexed by slot."""
    assert stack.b is not None, stack.sizes
    return _over_slots(s, dy, stack.b, weights, stack, tiles, True)


def _over_slots(
    s: Tensor, x: Tensor, factor: Tensor, weights: Tensor | None, stack: Stack, tiles: Tiles, of_b: bool
) -> Tensor:
    place = Place.of(x)
    launch, sums = _over_slots_launch(place, stack.sizes, of_b, x.stride(0), tiles.chosen, len(tiles.slots))
    out = torch.empty((sums, *factor.shape[1:]), dtype=wide_dtype(x.dtype), device=x.device)
    own = len(factor) > 1
    seed = None if of_b else stack.seed
    launch(_over_slots_kernel, s, x, out, weights, seed, tiles.slots, tiles.starts if own else None)
    if own or sums == 1:
        return out
    total = torch.empty(tuple(factor.shape), dtype=out.dtype, device=x.device)
    add_up(place, out, total, sums)
    return total
