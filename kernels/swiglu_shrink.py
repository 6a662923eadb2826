"""The passes over h = silu(g) * u that SwiGLU and the adapter of down, which reads h, make together.

    h, S = mask(h) A^T                                          forward: g and u read, h written, once each
    dg = dh u s (1 + g (1 - s)),  du = dh g s,  dA = dS^T mask(h)       backward: dh, g, u read, dg, du written; h is not

with s = sigmoid(g) (swiglu.py), and S, dS, dA and mask of lora_shrink. h has the bits of its dtype in all of them.
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false

from collections.abc import Sequence

import torch
from torch import Tensor

from minilora.kernels import lora_shrink
from minilora.kernels.dropout import keep_mask, threshold
from minilora.kernels.group import Group, Place, launch_options
from minilora.kernels.lang import cdiv, jit, load, store, tl
from minilora.kernels.launch import Launch, per_shape
from minilora.kernels.lora_gemm import as_operand, dot, load_operand
from minilora.kernels.swiglu import halves, sigmoid

# by architecture, as in lora_gemm
FORWARD = {
    0: {"BM": 16, "BK": 32, "R": 16, "num_warps": 4, "num_stages": 1},
    80: {"BM": 64, "BK": 64, "R": 64, "num_warps": 8, "num_stages": 3},
    86: {"BM": 64, "BK": 32, "R": 64, "num_warps": 8, "num_stages": 3},
    90: {"BM": 64, "BK": 64, "R": 64, "num_warps": 8, "num_stages": 3},
}
BACKWARD = {
    0: {"BM": 16, "BK": 32, "R": 16, "num_warps": 4, "num_stages": 1},
    80: {"BM": 32, "BK": 64, "R": 64, "num_warps": 4, "num_stages": 4},
    86: {"BM": 32, "BK": 64, "R": 64, "num_warps": 4, "num_stages": 3},
    90: {"BM": 32, "BK": 64, "R": 64, "num_warps": 4, "num_stages": 4},
}


@jit(do_not_specialize=["rows", "thresholds"])
def _fwd_kernel(
    g_ptr,
    u_ptr,
    h_ptr,
    out_ptr,
    a_ptr,
    seed_ptrs,
    thresholds,
    rank,
    g_stride,
    u_stride,
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
    """A program: BM rows, `span` of the K columns, R columns of S; out [K / span, rows, PADDED_R]. The first R write h."""
    row_tiles = tl.cdiv(rows, BM)
    i_r, i_rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    i_m, i_span = i_rest % row_tiles, i_rest // row_tiles
    o_r = i_r * R + tl.arange(0, R)[None, :]
    o_m = i_m.to(tl.int64) * BM + tl.arange(0, BM)[:, None]
    o_x = tl.minimum(o_m, rows - 1)  # rows beyond the end read the last one
    first = i_span * span
    b_s = tl.zeros((BM, R), ACC)
    for start_k in range(first, min(first + span, K), BK):
        o_k = start_k + tl.arange(0, BK)
        m_k = o_k[None, :] < K
        # h = silu(g) u, rounded as it is stored                                                     [BM, BK]
        b_g = load_operand(g_ptr + o_x * g_stride + o_k[None, :], m_k, ACC).to(ACC)
        b_u = load_operand(u_ptr + o_x * u_stride + o_k[None, :], m_k, ACC).to(ACC)
        b_h = as_operand(b_g * sigmoid(b_g) * b_u, h_ptr.dtype.element_ty)
        if i_r == 0:
            store(h_ptr + o_m * K + o_k[None, :], b_h, m_k & (o_m < rows))
        # S += mask(h) A^T                                                              [BM, BK] x [BK, R]
        b_a = load(a_ptr + o_r * K + o_k[:, None], (o_r < rank) & (o_k[:, None] < K), ACC)
        if DROPOUT:
            b_h = tl.where(keep_mask(tl.load(seed_ptrs[0]), thresholds[0], o_x, start_k, BK), b_h, 0.0)
        b_s = dot(b_h, as_operand(b_a, h_ptr.dtype.element_ty), b_s)
    store(out_ptr + i_span.to(tl.int64) * rows * PADDED_R + o_m * PADDED_R + o_r, b_s, o_m < rows)


@jit(do_not_specialize=["rows", "thresholds"])
def _bwd_kernel(
    dh_ptr,
    g_ptr,
    u_ptr,
    dg_ptr,
    du_ptr,
    ds_ptr,
    da_ptr,
    seed_ptrs,
    thresholds,
    rank,
    g_stride,
    u_stride,
    d_stride,
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
    """A program: BK of the K columns, all rows, R rows of dA [PADDED_R, K]. The first R write dg and du."""
    i_r, i_k = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    o_r, o_k = i_r * R + tl.arange(0, R), i_k * BK + tl.arange(0, BK)[None, :]
    b_da = tl.zeros((R, BK), ACC)
    for start_m in range(0, rows, BM):
        o_m = tl.cast(start_m, tl.int64) + tl.arange(0, BM)[:, None]
        m_mk = (o_m < rows) & (o_k < K)
        b_dh = load_operand(dh_ptr + o_m * K + o_k, m_mk, ACC).to(ACC)
        b_g = load_operand(g_ptr + o_m * g_stride + o_k, m_mk, ACC).to(ACC)
        b_u = load_operand(u_ptr + o_m * u_stride + o_k, m_mk, ACC).to(ACC)
        # h = g s u, so du = dh g s and dg = dh u s (1 + g (1 - s))                                  [BM, BK]
        b_s = sigmoid(b_g)
        if i_r == 0:
            store(du_ptr + o_m * d_stride + o_k, b_dh * b_g * b_s, m_mk)
            store(dg_ptr + o_m * d_stride + o_k, b_dh * b_u * b_s * (1 + b_g * (1 - b_s)), m_mk)
        # from S = mask(h) A^T: dA += dS^T mask(h)                                       [R, BM] x [BM, BK]
        b_h = as_operand(b_g * b_s * b_u, g_ptr.dtype.element_ty)
        if DROPOUT:
            b_h = tl.where(keep_mask(tl.load(seed_ptrs[0]), thresholds[0], o_m, i_k * BK, BK), b_h, 0.0)
        m_r = o_r[None, :] < rank
        b_ds = load_operand(ds_ptr + o_m * PADDED_R + o_r[None, :], (o_m < rows) & m_r, ACC)
        b_da = dot(tl.trans(b_ds), b_h, b_da)
    store(da_ptr + o_r[:, None].to(tl.int64) * K + o_k, b_da, o_k < K)


@per_shape
def _forward_launch(
    place: Place, rows: int, k: int, strides: tuple[int, int], ranks: tuple[int, ...], rates: tuple[float, ...]
) -> tuple[Launch, int, int]:
    """And the number of parts of K, and the padded rank."""
    options = launch_options(FORWARD, place, ranks)
    if any(rates) and options["R"] > 32:
        options["BM"] = 32  # beside masks a larger tile would spill
    blocks = options["PADDED_R"] // options["R"]
    parts, span = lora_shrink.split(options, rows, k, blocks, place)
    numbers = tuple(map(threshold, rates)), *ranks, *strides, rows, k, span, blocks
    programs = cdiv(rows, options["BM"]) * blocks * parts
    return Launch(place.device, programs, numbers, DROPOUT=any(rates), **options), parts, options["PADDED_R"]


def forward(g: Tensor, u: Tensor | None, group: Group) -> tuple[Tensor, Tensor]:
    """h [T, F] and S [1, T, padded rank] of g and u, or of a g that holds both; group: down alone."""
    rows_g, rows_u = halves(g, u)
    place, (rows, k) = Place.of(g), rows_g.shape
    strides = rows_g.stride(0), rows_u.stride(0)
    launch, parts, width = _forward_launch(place, rows, k, strides, group.ranks, group.rates)
    h = torch.empty((rows, k), dtype=g.dtype, device=g.device)
    s, out = lora_shrink.sums(h, (1, rows, width), parts)
    launch(_fwd_kernel, rows_g, rows_u, h, out, *group.a, group.seeds)
    lora_shrink.add_up(place, out, s, parts)
    return h, s


@per_shape
def _backward_launch(
    place: Place, rows: int, k: int, strides: tuple[int, int, int], ranks: tuple[int, ...], rates: tuple[float, ...]
) -> Launch:
    options = launch_options(BACKWARD, place, ranks)
    if options["R"] > 32:  # a wider dA would spill in four warps; without masks, in four stages too
        options |= {"num_warps": 8, "num_stages": options["num_stages"] if any(rates) else 3}
    blocks = options["PADDED_R"] // options["R"]
    numbers = tuple(map(threshold, rates)), *ranks, *strides, rows, k, blocks
    return Launch(place.device, cdiv(k, options["BK"]) * blocks, numbers, DROPOUT=any(rates), **options)


def backward(
    dh: Tensor, g: Tensor, u: Tensor | None, ds: Tensor, group: Group
) -> tuple[list[Tensor], Sequence[Tensor]]:
    """[dg, du], or one gradient that holds both, and [dA]; dh [T, F] without gaps, ds from lora_shrink.expand_backward."""
    (rows_g, rows_u), (_, _, width) = halves(g, u), ds.shape
    rows, k = rows_g.shape
    dgu = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in ((g,) if u is None else (g, u))]
    to_g, to_u = halves(dgu[0], None) if u is None else dgu
    strides = rows_g.stride(0), rows_u.stride(0), to_g.stride(0)
    da = torch.empty((width, k), dtype=lora_shrink.wide_dtype(g.dtype), device=g.device)
    launch = _backward_launch(Place.of(g), rows, k, strides, group.ranks, group.rates)
    launch(_bwd_kernel, dh, rows_g, rows_u, to_g, to_u, ds, da, group.seeds)
    return dgu, [da if width == group.ranks[0] else da[: group.ranks[0]]]
