"""The wide products of a group in the form that was chosen for their shapes; S and dS are those of lora_shrink.

A form is chosen for y and for dX by itself: what they need from each other, S and dS, is the same in all.

    triton      one launch, accumulators that start from the low-rank part      lora_gemm.py
    library     the library's GEMM, then one more for the low-rank part         library_gemm.py
    augmented   the library's GEMM, the low-rank part in its operands           augmented.py

Augmented without a matrix that holds the weights is library. With quantised weights few rows are Triton's, which makes W in
its loop, and more are the library's, for which W is widened (dequantize.py).
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false

from collections.abc import Sequence

from torch import Tensor

from minilora.kernels import library_gemm, lora_gemm
from minilora.kernels.augmented import Augmented
from minilora.kernels.dequantize import WIDE, in_the_loop
from minilora.kernels.dropout import keep_mask, threshold
from minilora.kernels.group import Group, Place, launch_options
from minilora.kernels.lang import cdiv, jit, load, store, tl
from minilora.kernels.launch import Launch, per_shape
from minilora.kernels.lora_gemm import as_operand, dot, load_operand, select
from minilora.kernels.projection import Projection

DROPPED = {  # by architecture, as in lora_gemm
    0: {"BM": 32, "BN": 32, "R": 16, "num_warps": 4, "num_stages": 1},
    80: {"BM": 64, "BN": 64, "R": 32, "num_warps": 4, "num_stages": 1},
    86: {"BM": 64, "BN": 64, "R": 32, "num_warps": 4, "num_stages": 1},
    90: {"BM": 64, "BN": 64, "R": 32, "num_warps": 4, "num_stages": 1},
}


def in_one_pass(x: Tensor, group: Group) -> bool:
    """Whether y and S of x are made in one pass over x (lora_gemm.single_pass)."""
    own = group.format == WIDE and group.forms.y == "triton"
    return own and lora_gemm.single_pass_wins(Place.of(x), group.sizes, group.rates)


def forward(x: Tensor, s: Tensor, group: Group) -> list[Tensor]:
    """y_j [T, N_j] of every projection, at least one with an adapter; s from lora_shrink.shrink."""
    if _on_triton(group.forms.y, x, group):
        return lora_gemm.forward(x, s, group)
    shrunk = _unpadded(s, group)
    whole = Augmented.of(group.projections, x) if group.forms.y == "augmented" else None
    if whole is not None:
        return whole.forward(x, shrunk, group.projections)
    return library_gemm.forward(x, shrunk, group.projections)


def input_gradient(dys: Sequence[Tensor], ds: Tensor, group: Group) -> Tensor:
    """dX [T, K]; ds from lora_shrink.expand_backward."""
    if _on_triton(group.forms.dx, dys[0], group):
        return lora_gemm.input_gradient(dys, ds, group)
    masked = any(group.rates)
    dx = on_torch(group.forms.dx, dys, None if masked else _unpadded(ds, group), group.projections)
    if masked:
        _add_dropped(dx, ds, group)
    return dx


def _on_triton(form: str, x: Tensor, group: Group) -> bool:
    """Whether lora_gemm makes the product of x, or dY: of quantised weights by the number of rows alone."""
    if group.format == WIDE:
        return form == "triton"
    return in_the_loop(len(x), group.a[0].shape[1], {group.format})


def on_torch(
    form: str, dys: Sequence[Tensor], ds: Sequence[Tensor] | None, projections: Sequence[Projection]
) -> Tensor:
    """dX by the library's GEMM; the part of the adapters, masked, is still to be added where ds is None."""
    whole = Augmented.of(projections, dys[0]) if form == "augmented" else None
    if whole is not None:
        return whole.input_gradient(dys, ds)
    return library_gemm.input_gradient(dys, ds, projections)


def _unpadded(s: Tensor, group: Group) -> list[Tensor]:
    """S_j [T, R_j] of every adapter."""
    return [one[:, :rank] for one, rank in zip(s.unbind(), group.ranks, strict=True)]


@jit(do_not_specialize=["rows", "thresholds"])
def _dropped_kernel(
    dx_ptr,
    ds_ptr,
    a_ptrs,
    seed_ptrs,
    thresholds,
    ranks,
    rows,
    K,
    COUNT: tl.constexpr,
    PADDED_R: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ACC: tl.constexpr,
):
    """dX += sum over j of mask_j(dS_j A_j). A program: BM rows by BN columns."""
    col_tiles = tl.cdiv(K, BN)
    top, first = (tl.program_id(0) // col_tiles).to(tl.int64) * BM, tl.program_id(0) % col_tiles * BN
    o_m, o_n = top + tl.arange(0, BM)[:, None], first + tl.arange(0, BN)[None, :]
    m_m, m_n = o_m < rows, o_n < K
    b_dx = load(dx_ptr + o_m * K + o_n, m_m & m_n, ACC)
    for j in tl.range(0, COUNT, num_stages=1, loop_unroll_factor=1):
        # one adapter: dS_j A_j, R ranks at a time                                          [BM, R] x [R, BN]
        b_ds_a = tl.zeros((BM, BN), ACC)
        a_ptr, rank = select(a_ptrs, j, COUNT), select(ranks, j, COUNT)
        for start_r in tl.range(0, PADDED_R, R, num_stages=1):
            o_r = start_r + tl.arange(0, R)
            p_ds = ds_ptr + tl.cast(j, tl.int64) * rows * PADDED_R + o_m * PADDED_R + o_r[None, :]
            b_ds = load_operand(p_ds, m_m & (o_r[None, :] < rank), ACC)
            b_a = load(a_ptr + o_r[:, None] * K + o_n, (o_r[:, None] < rank) & m_n, ACC)
            b_ds_a = dot(b_ds, as_operand(b_a, dx_ptr.dtype.element_ty), b_ds_a)
        seed, least = tl.load(select(seed_ptrs, j, COUNT)), select(thresholds, j, COUNT)
        b_dx += tl.where(keep_mask(seed, least, o_m, first, BN), b_ds_a, 0.0)
    store(dx_ptr + o_m * K + o_n, b_dx, m_m & m_n)


@per_shape
def _dropped_launch(place: Place, rows: int, k: int, ranks: tuple[int, ...], rates: tuple[float, ...]) -> Launch:
    options = launch_options(DROPPED, place, ranks)
    numbers = tuple(map(threshold, rates)), ranks, rows, k
    return Launch(place.device, cdiv(rows, options["BM"]) * cdiv(k, options["BN"]), numbers, **options)


def _add_dropped(dx: Tensor, ds: Tensor, group: Group) -> None:
    """dX [T, K] += mask_j(dS_j A_j) of every adapter, in place; a pass over dX of its own."""
    launch = _dropped_launch(Place.of(ds), *dx.shape, group.ranks, group.rates)
    launch(_dropped_kernel, dx, ds, group.a, group.seeds)
