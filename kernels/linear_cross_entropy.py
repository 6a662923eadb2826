"""Cross-entropy of a linear head without the [M, V] logits: the sum over rows of -log softmax(x head^T)[target].

    loss = F.cross_entropy((x @ head.T).float(), targets, reduction="sum")     x [M, D], head [V, D], targets [M]

The caller drops the rows without a target before the last norm, so that none reaches the head; a target of -100 among
the rest is left out all the same. Rows are processed in chunks, and only one chunk's logits exist at a time. The
forward makes the gradient, where the logits already are, and the backward scales it: with P = softmax(logits) -
onehot(target),

    dx = P head        dhead = P^T x (only if the head is trained, added up in fp32)

Saved for backward: dx (and dhead). The kernels go over a chunk three times, 8 bytes for a 16-bit logit:

    _logits_kernel   logits = x head^T, written once, and a log-sum-exp of each half tile, without the true class
    _softmax_kernel  the true class's logit in fp32, unrounded; the loss from both, and P in place of the logits (see
                     cross_entropy.py for formulas and rounding)
    torch.mm         dx = P head

The softmax is that of the rounded logits, which the gradient sees, with the true one exact. Without a gradient no logit
is written at all. The head is read twice a chunk: chunks of 4096 rows keep that to once for 2048 targets. Where the
library's GEMM is asked for, and on a GPU where x has not 16 bits or D or V is not a multiple of 16, torch.mm and the
kernel of cross_entropy.py replace the first two: 10 bytes a logit.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.kernels import cross_entropy as ce
from minilora.kernels.cross_entropy import IGNORED, Softmax, blocks_of, check_targets
from minilora.kernels.dispatch import architecture, check_same, gemm_form, once_differentiable, recording, use_triton
from minilora.kernels.frozen_linear import add_input_gradient, frozen_linear
from minilora.kernels.lang import (
    INTERPRET,
    INTERPRETED,
    PINNED,
    accum_dtype,
    cdiv,
    halves,
    jit,
    load,
    next_power_of_2,
    quarters,
    rounded,
    store,
    tl,
)

CHUNK_ROWS = 256  # rows whose logits exist at a time, on the CPU
CHUNK_ROWS_CUDA = 4096
_IGNORED, _LOWEST = tl.constexpr(IGNORED), tl.constexpr(-3e38)


class Tile(NamedTuple):
    """What one program of a GEMM makes: rows x columns, in steps of `inner`; its warps; its loads in flight."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


TILES = {
    80: Tile(128, 128, 32, 4, 4),
    90: Tile(128, 256, 64, 8, 3),
}  # that of sm_80 fits sm_86 and sm_89 too: 64 KiB of operands
TILE_INTERPRETED = Tile(32, 512, 64, 4, 1)


def tile_for(architecture: int) -> Tile:
    return TILES[max((known for known in TILES if known <= architecture), default=80)]


def linear_cross_entropy_ref(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """The specification: the summed loss, a scalar in fp32 or wider."""
    logits = (x @ head.T).to(torch.promote_types(x.dtype, torch.float32))
    return F.cross_entropy(logits, targets, reduction="sum")


@jit(do_not_specialize=["rows", "row_tiles"], do_not_specialize_on_alignment=["parts"])
def _logits_kernel(
    x_ptr,
    head_ptr,
    targets_ptr,
    logits_ptr,
    partial_ptr,
    x_stride,
    head_stride,
    rows,
    V,
    D,
    row_tiles,
    parts,
    EVEN_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program: one tile of logits; the tiles that read the same rows of the head run one after the other.

    partial_ptr [rows, parts] gets the log-sum-exp of each half tile without the true class; logits_ptr is None where no
    gradient follows.
    """
    i_m, i_n = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles
    top, left = (i_m * ROWS).to(tl.int64), rows - i_m * ROWS
    o_m = tl.arange(0, ROWS)
    o_n, o_k = tl.arange(0, COLUMNS), tl.arange(0, INNER)
    m_m, m_n = o_m < left, o_n < V - i_n * COLUMNS
    # int64 up to the tile, int32 inside: wider offsets for each value would not fit the registers
    p_x = x_ptr + top * x_stride
    p_head = head_ptr + (i_n * COLUMNS).to(tl.int64) * head_stride
    o_x = o_m[:, None] * x_stride + o_k[None, :]
    o_head = o_n[None, :] * head_stride + o_k[:, None]
    # logits of the tile: z = x head^T                                        [ROWS, INNER] x [INNER, COLUMNS]
    b_z = tl.zeros((ROWS, COLUMNS), ACC)
    for k in range(0, D, INNER):
        m_k = (o_k < D - k) | EVEN_K
        b_x = tl.load(p_x + k + o_x, mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_head = tl.load(p_head + k + o_head, mask=m_n[None, :] & m_k[:, None], other=0.0)
        if INTERPRET:
            b_x, b_head = b_x.to(ACC), b_head.to(ACC)
        b_z = tl.dot(b_x, b_head, b_z, input_precision="ieee", out_dtype=ACC)
    # round the logits as the reference does; store them if a gradient will be made of them      [ROWS, COLUMNS]
    b_target = tl.load(targets_ptr + top + o_m, mask=m_m, other=_IGNORED)
    b_true = (b_target - i_n * COLUMNS).to(tl.int32)
    b_z = rounded(b_z, x_ptr.dtype.element_ty)
    if logits_ptr is not None:
        logits_ptr += top * V + i_n * COLUMNS
        store(logits_ptr + o_m[:, None] * V + o_n[None, :], b_z, m_m[:, None] & m_n[None, :])
    # log-sum-exp without the true class, which _softmax_kernel adds in fp32; half of the tile at a time, since
    # the registers hold all of it once                                                                   [ROWS]
    b_z = tl.where(m_n[None, :] & (o_n[None, :] != b_true[:, None]), b_z, -float("inf"))
    left_half, right_half = halves(b_z)
    for half in tl.static_range(2):  # pyright: ignore[reportGeneralTypeIssues]
        b_z = left_half if half == 0 else right_half
        b_max = tl.maximum(tl.max(b_z, 1), _LOWEST)
        b_sum = tl.sum(tl.exp(b_z - b_max[:, None]), 1)
        b_lse = tl.where(b_sum == 0, -float("inf"), b_max + tl.log(tl.where(b_sum == 0, 1.0, b_sum)))
        store(partial_ptr + (top + o_m) * parts + 2 * i_n + half, b_lse, m_m)


@jit
def _true_logit(row_ptr, head_ptr, target, head_stride, V, D, ACC: tl.constexpr):
    """One row of x times the head's row of its target; NaN for a class that does not exist."""
    exists = (target >= 0) & (target < V)
    head_ptr += tl.where(exists, target, 0) * head_stride
    b_z = tl.zeros((1024,), ACC)
    for start in range(0, D, 1024):
        o_k = start + tl.arange(0, 1024)
        b_z += load(row_ptr + o_k, o_k < D, ACC) * load(head_ptr + o_k, o_k < D, ACC)
    return tl.where(exists, tl.sum(b_z, 0), float("nan"))


@jit(do_not_specialize_on_alignment=["parts"])
def _softmax_kernel(
    logits_ptr,
    partial_ptr,
    x_ptr,
    head_ptr,
    targets_ptr,
    loss_ptr,
    x_stride,
    head_stride,
    V,
    D,
    parts,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program: one row. The gradient replaces the logits; logits_ptr is None where none is wanted."""
    i_m = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + i_m)
    if logits_ptr is not None:
        logits_ptr += i_m * V
    if target == _IGNORED:
        store(loss_ptr + i_m, tl.zeros((), ACC), True)
        if logits_ptr is not None:
            ce.store_zeros(logits_ptr, V, 0, V, BLOCK, ACC)
    else:
        # the loss, from the log-sum-exp of each half tile and the true class's logit                    [PARTS]
        o_n = tl.arange(0, PARTS)
        b_lse = tl.load(partial_ptr + i_m * parts + o_n, mask=o_n < parts, other=-float("inf"))
        true = _true_logit(x_ptr + i_m * x_stride, head_ptr, target, head_stride, V, D, ACC)
        peak = tl.maximum(tl.maximum(tl.max(b_lse, 0), _LOWEST), true)
        others = tl.sum(tl.exp(b_lse - peak), 0)
        store(loss_ptr + i_m, ce.loss_of(others, true - peak), True)
        # P = softmax - onehot, in place of the logits                                                       [V]
        if logits_ptr is not None:
            ce.store_gradient(logits_ptr, logits_ptr, target, V, peak, others, true, 1.0, 0, V, BLOCK, ACC)


@jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["column_tiles"])
def _dhead_kernel(
    p_ptr,
    x_ptr,
    dhead_ptr,
    x_stride,
    rows,
    V,
    D,
    column_tiles,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    ACC: tl.constexpr,
):
    """dhead [V, D] += P^T x. A program: one tile of dhead."""
    top = (tl.program_id(0) // column_tiles).to(tl.int64) * ROWS
    first = tl.program_id(0) % column_tiles * COLUMNS
    o_m, o_n, o_k = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, INNER)
    m_m, m_n = o_m < V - top, o_n < D - first
    p_p = p_ptr + top + o_m[:, None] + o_k[None, :] * V
    p_x = x_ptr + first + o_k[:, None] * x_stride + o_n[None, :]
    # logits = x head^T, so dhead = P^T x over the rows of the chunk          [ROWS, INNER] x [INNER, COLUMNS]
    b_dhead = tl.zeros((ROWS, COLUMNS), ACC)
    for k in range(0, rows, INNER):
        b_p = tl.load(p_p, mask=m_m[:, None] & (o_k[None, :] < rows - k), other=0.0)
        b_x = tl.load(p_x, mask=(o_k[:, None] < rows - k) & m_n[None, :], other=0.0)
        if INTERPRET:
            b_p, b_x = b_p.to(ACC), b_x.to(ACC)
        b_dhead = tl.dot(b_p, b_x, b_dhead, input_precision="ieee", out_dtype=ACC)
        p_p += tl.cast(INNER, tl.int64) * V
        p_x += tl.cast(INNER, tl.int64) * x_stride
    # add to dhead, a quarter of the columns at a time, since the registers hold all of the tile once
    parts = quarters(b_dhead)
    dhead_ptr += top * D + first + o_m[:, None] * D
    for i in tl.static_range(4):  # pyright: ignore[reportGeneralTypeIssues]
        o_n = i * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)[None, :]
        m_mn = m_m[:, None] & (o_n < D - first)
        store(dhead_ptr + o_n, parts[i] + load(dhead_ptr + o_n, m_mn, ACC), m_mn)


def _launch(tile: Tile, dtype: torch.dtype) -> dict[str, Any]:
    shape = {"ROWS": tile.rows, "COLUMNS": tile.columns, "INNER": tile.inner, "ACC": accum_dtype(dtype)}
    return {**shape, "num_warps": tile.warps, "num_stages": tile.stages, **PINNED}


def _within_reach(x: Tensor) -> Tensor:
    """x with contiguous rows, the rows of a tile within int32 of each other; a copy only where x is not so."""
    return x if x.stride(1) == 1 and x.stride(0) * 256 < 2**31 else x.contiguous()


class _OnTorch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, head: Tensor, targets: Tensor, chunk_rows: int = CHUNK_ROWS_CUDA) -> Tensor:
        keep = torch.promote_types(x.dtype, torch.float32)
        needs_x, needs_head = ctx.needs_input_grad[:2]
        dx = torch.zeros(x.shape, dtype=x.dtype, device=x.device) if needs_x else None
        dhead = torch.zeros(head.shape, dtype=keep, device=x.device) if needs_head else None
        loss = torch.zeros((), dtype=torch.float64, device=x.device)
        for start in range(0, x.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = frozen_linear(x[rows], head)
            loss += _to_gradient(logits, targets[rows], needs_x or needs_head)
            if dx is not None:
                add_input_gradient(dx[rows], logits, head)
            if dhead is not None:
                dhead += logits.T @ x[rows]
            del logits  # before those of the next chunk are made
        ctx.save_for_backward(dx, dhead)
        ctx.head_dtype = head.dtype
        return loss.to(keep)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        (scale,) = grads
        dx, dhead = ctx.saved_tensors
        # scale has no dimensions, so torch neither widens dx for it nor rounds it to the dtype of dx first
        dx = None if dx is None else dx * scale
        dhead = None if dhead is None else (dhead * scale).to(ctx.head_dtype)
        return dx, dhead, None, None


def _to_gradient(logits: Tensor, targets: Tensor, wanted: bool) -> Tensor:
    """The loss of some rows, summed in fp64; where wanted, their logits become softmax - onehot."""
    loss = torch.zeros((), dtype=torch.float64, device=logits.device)
    for block, target in blocks_of(logits, targets):
        softmax = Softmax(block.to(torch.promote_types(block.dtype, torch.float32)), target)  # in place where wide
        loss += softmax.loss
        if wanted:
            block.copy_(softmax.gradient())
    return loss


class _OnTriton(_OnTorch):
    @staticmethod
    def forward(ctx, x: Tensor, head: Tensor, targets: Tensor, chunk_rows: int = CHUNK_ROWS_CUDA) -> Tensor:
        x, head, targets = _within_reach(x), _within_reach(head), targets.contiguous()
        (m, d), v, device = x.shape, head.shape[0], x.device
        keep = torch.promote_types(x.dtype, torch.float32)
        needs_x, needs_head = ctx.needs_input_grad[:2]
        # an odd size is loaded value by value, which takes more registers than there are
        even = all(n % 16 == 0 for n in (d, v, x.stride(0), head.stride(0)))
        on_cores = INTERPRETED or (x.element_size() == 2 and even)
        fused, gradient = on_cores and gemm_form("logits", d, v) == "triton", needs_x or needs_head
        tile = TILE_INTERPRETED if INTERPRETED else tile_for(architecture(device))
        size, parts = min(chunk_rows, m), 2 * cdiv(v, tile.columns)
        dx = torch.empty((m, d), dtype=x.dtype, device=device) if needs_x else None
        dhead = torch.zeros((v, d), dtype=keep, device=device) if needs_head else None
        written = gradient or not fused
        buffer = torch.empty((size if written else 0, v), dtype=x.dtype, device=device)
        partial = torch.empty((size, parts), dtype=keep, device=device) if fused else None
        losses = torch.empty((m,), dtype=keep, device=device)
        options = {"ACC": accum_dtype(x.dtype), **ce.row_tile(v, ce.BLOCK)}
        for start in range(0, m, chunk_rows):
            part = slice(start, start + chunk_rows)
            rows, target, loss = x[part], targets[part], losses[part]
            n = rows.shape[0]
            logits = buffer[:n]
            with torch.cuda.device_of(x):
                if fused:
                    kept = logits if gradient else None
                    row_tiles = cdiv(n, tile.rows)
                    _logits_kernel[(row_tiles * parts // 2,)](
                        rows,
                        head,
                        target,
                        kept,
                        partial,
                        x.stride(0),
                        head.stride(0),
                        n,
                        v,
                        d,
                        row_tiles,
                        parts,
                        EVEN_K=d % tile.inner == 0,
                        **_launch(tile, x.dtype),
                    )
                    _softmax_kernel[(n,)](
                        kept,
                        partial,
                        rows,
                        head,
                        target,
                        loss,
                        x.stride(0),
                        head.stride(0),
                        v,
                        d,
                        parts,
                        PARTS=next_power_of_2(parts),
                        **options,
                    )
                else:
                    torch.mm(rows, head.T, out=logits)
                    dlogits = logits if gradient else None
                    ce._fwd_kernel[(n,)](logits, target, loss, None, dlogits, None, v, v, **options)
                if dx is not None:
                    torch.mm(logits, head, out=dx[part])
                if dhead is not None and on_cores:
                    column_tiles = cdiv(d, tile.columns)
                    _dhead_kernel[(cdiv(v, tile.rows) * column_tiles,)](
                        logits, rows, dhead, x.stride(0), n, v, d, column_tiles, **_launch(tile, x.dtype)
                    )
                elif dhead is not None:
                    dhead += logits.T @ rows
        ctx.save_for_backward(dx, dhead)
        ctx.head_dtype = head.dtype
        return losses.sum(dtype=torch.float64).to(keep)


def linear_cross_entropy(x: Tensor, head: Tensor, targets: Tensor, chunk_rows: int | None = None) -> Tensor:
    """Summed cross-entropy of rows x [M, D] under head [V, D] against targets [M] int64; a scalar, fp32 or wider.

    The head may be stored in another dtype than x; it is then widened a piece at a time, and the products are
    PyTorch's. With no rows, or none with a target, the loss is 0 and still connected to x. The rows of a chunk
    (CHUNK_ROWS, on a GPU CHUNK_ROWS_CUDA) change rounding only. A target that is neither a class nor -100 is a
    ValueError; on a GPU, where that would need a sync, the loss is NaN.
    """
    if x.dim() != 2 or head.dim() != 2 or x.shape[1] != head.shape[1] or not x.shape[1] or not head.shape[0]:
        raise ValueError(
            f"linear_cross_entropy: x [M, D], head [V, D] expected, not {list(x.shape)}, {list(head.shape)}"
        )
    check_same("linear_cross_entropy", x=x)
    if head.device != x.device or not head.is_floating_point():
        raise ValueError(
            f"linear_cross_entropy: x is on {x.device}, head {head.dtype} on {head.device}; both on one device"
        )
    check_targets("linear_cross_entropy", targets, x, head.shape[0])
    if chunk_rows is None:
        chunk_rows = CHUNK_ROWS_CUDA if x.is_cuda else CHUNK_ROWS
    if chunk_rows < 1:
        raise ValueError(f"linear_cross_entropy: chunks of {chunk_rows} rows")
    on = _OnTriton if use_triton(x) and head.dtype == x.dtype else _OnTorch
    return recording(on)(x, head, targets, chunk_rows)


def example(rows: int, width: int, vocab: int, dtype: torch.dtype, device: str = "cpu") -> tuple[tuple, dict]:
    """Arguments of one call; the flops of forward and dx together, and the least bytes: what goes in, and dx."""
    x = torch.randn(rows, width, device=device, dtype=dtype)
    head = torch.randn(vocab, width, device=device, dtype=dtype) * width**-0.5
    cost = {"flops": 4 * rows * width * vocab, "bytes": (2 * rows + vocab) * width * x.element_size()}
    return (x, head, torch.randint(vocab, (rows,), device=device)), cost
