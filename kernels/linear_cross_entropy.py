"""Cross-entropy of a linear head without the [M, V] logits: the sum over rows of -log softmax(x head^T)[target].

    loss = F.cross_entropy((x @ head.T).float(), targets, reduction="sum")     x [M, D], head [V, D], targets [M]

The caller drops the rows without a target before the last norm, so that none reaches the head; a target of -100 among the rest
counts for nothing all the same. Rows go through in chunks; one chunk's logits are the only ones that exist. The gradient is
made in the forward pass, where the logits already are, and scaled in the backward: with P = softmax(logits) - onehot(target),

    dx = P head        dhead = P^T x (only if the head is trained, added up in fp32)

Saved for backward: dx (and dhead). The kernels go over a chunk three times, 8 bytes for a 16-bit logit:

    _logits_kernel   logits = x head^T, written once; of each tile of them a log-sum-exp without the true class, and the true
                     class's logit in fp32, unrounded
    _softmax_kernel  from these the loss and the true class's p - 1 (formulas and rounding: cross_entropy.py); P over the logits
    torch.mm         dx = P head

The softmax is that of the rounded logits, which the gradient sees, with the true one exact. Without a gradient no logit is
written at all. The head is read twice a chunk: chunks of 4096 rows keep that to once for 2048 targets. Where the library's GEMM
is asked for, and on a GPU for what has not 16 bits or a D or V that is no multiple of 16, the first two are torch.mm and the
kernel of cross_entropy.py: 10 bytes a logit.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.kernels import cross_entropy as ce
from minilora.kernels.cross_entropy import IGNORED, Softmax, blocks_of, check_targets
from minilora.kernels.dispatch import architecture, check_same, library_gemm, recording, use_triton
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
    """What one program of a GEMM makes: rows x columns, by steps of `inner`; warps; loads in flight."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


TILES = {
    80: Tile(128, 128, 32, 4, 4),
    90: Tile(128, 256, 64, 8, 3),
}  # sm_80's fits sm_86 and sm_89 too: 64 KiB of operands
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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    ACC: tl.constexpr,
):
    """One tile of logits a program; the tiles that read the same rows of the head run one after the other.

    partial_ptr [rows, parts] takes log-sum-exp of half a tile without the true class, true_ptr [rows] the true logit; logits_ptr is
    None where no gradient follows.
    """
    row_tile, tile = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles
    first, left = (row_tile * ROWS).to(tl.int64), rows - row_tile * ROWS
    row = tl.arange(0, ROWS)
    column, inner = tl.arange(0, COLUMNS), tl.arange(0, INNER)
    inside, within = row < left, column < V - tile * COLUMNS
    # int64 up to the tile, int32 inside: wider offsets for each value would not fit the registers
    a_ptr = x_ptr + first * x_stride
    b_ptr = head_ptr + (tile * COLUMNS).to(tl.int64) * head_stride
    a_offsets = row[:, None] * x_stride + inner[None, :]
    b_offsets = column[None, :] * head_stride + inner[:, None]
    # logits of the tile: z = x head^T                            [ROWS, INNER] x [INNER, COLUMNS]
    z = tl.zeros((ROWS, COLUMNS), ACC)
    for k in range(0, D, INNER):
        a = tl.load(a_ptr + k + a_offsets, mask=inside[:, None] & (inner[None, :] < D - k), other=0.0)
        b = tl.load(b_ptr + k + b_offsets, mask=within[None, :] & (inner[:, None] < D - k), other=0.0)
        if INTERPRET:
            a, b = a.to(ACC), b.to(ACC)
        z = tl.dot(a, b, z, input_precision="ieee", out_dtype=ACC)
    # rounded as the reference has them, and stored where a gradient will be made of them
    target = tl.load(targets_ptr + first + row, mask=inside, other=_IGNORED)
    place = (target - tile * COLUMNS).to(tl.int32)
    z = rounded(z, x_ptr.dtype.element_ty)
    if logits_ptr is not None:
        logits_ptr += first * V + tile * COLUMNS
        store(logits_ptr + row[:, None] * V + column[None, :], z, inside[:, None] & within[None, :])
    # the true class is left out of the log-sum-exp: _softmax_kernel adds it in fp32
    z = tl.where(within[None, :] & (column[None, :] != place[:, None]), z, -float("inf"))
    # half of the tile at a time: the registers hold all of it once
    left_half, right_half = halves(z)
    for half in tl.static_range(2):  # pyright: ignore[reportGeneralTypeIssues]
        z = left_half if half == 0 else right_half
        top = tl.maximum(tl.max(z, 1), _LOWEST)
        total = tl.sum(tl.exp(z - top[:, None]), 1)
        partial = tl.where(total == 0, -float("inf"), top + tl.log(tl.where(total == 0, 1.0, total)))
        store(partial_ptr + (first + row) * parts + 2 * tile + half, partial, inside)


@jit
def _true_logit(row_ptr, head_ptr, target, head_stride, V, D, ACC: tl.constexpr):
    """One row of x times the head's row of its target; NaN for a class that does not exist."""
    exists = (target >= 0) & (target < V)
    head_ptr += tl.where(exists, target, 0) * head_stride
    z = tl.zeros((1024,), ACC)
    for start in range(0, D, 1024):
        col = start + tl.arange(0, 1024)
        z += load(row_ptr + col, col < D, ACC) * load(head_ptr + col, col < D, ACC)
    return tl.where(exists, tl.sum(z, 0), float("nan"))


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
    """One row a program; logits_ptr, overwritten with the gradient, is None where none is wanted."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    if logits_ptr is not None:
        logits_ptr += row * V
    if target == _IGNORED:
        store(loss_ptr + row, tl.zeros((), ACC), True)
        if logits_ptr is not None:
            ce.store_zeros(logits_ptr, V, 0, V, BLOCK, ACC)
    else:
        # log-sum-exp of the row: of its tiles, and of the true class
        part = tl.arange(0, PARTS)
        partial = tl.load(partial_ptr + row * parts + part, mask=part < parts, other=-float("inf"))
        true = _true_logit(x_ptr + row * x_stride, head_ptr, target, head_stride, V, D, ACC)
        top = tl.maximum(tl.maximum(tl.max(partial, 0), _LOWEST), true)
        others = tl.sum(tl.exp(partial - top), 0)
        store(loss_ptr + row, ce.loss_of(others, true - top), True)
        # softmax - onehot, over the logits
        if logits_ptr is not None:
            ce.store_gradient(logits_ptr, logits_ptr, target, V, top, others, true, 1.0, 0, V, BLOCK, ACC)


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
    """dhead [V, D] += P^T x, one tile a program."""
    first = (tl.program_id(0) // column_tiles).to(tl.int64) * ROWS
    start = tl.program_id(0) % column_tiles * COLUMNS
    row, column, inner = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, INNER)
    inside, within = row < V - first, column < D - start
    p_ptrs = p_ptr + first + row[:, None] + inner[None, :] * V
    x_ptrs = x_ptr + start + inner[:, None] * x_stride + column[None, :]
    # dhead += P^T x                                              [ROWS, INNER] x [INNER, COLUMNS]
    z = tl.zeros((ROWS, COLUMNS), ACC)
    for k in range(0, rows, INNER):
        p = tl.load(p_ptrs, mask=inside[:, None] & (inner[None, :] < rows - k), other=0.0)
        x = tl.load(x_ptrs, mask=(inner[:, None] < rows - k) & within[None, :], other=0.0)
        if INTERPRET:
            p, x = p.to(ACC), x.to(ACC)
        z = tl.dot(p, x, z, input_precision="ieee", out_dtype=ACC)
        p_ptrs += tl.cast(INNER, tl.int64) * V
        x_ptrs += tl.cast(INNER, tl.int64) * x_stride
    # a quarter of the columns at a time: the registers hold all of the tile once
    parts = quarters(z)
    dhead_ptr += first * D + start + row[:, None] * D
    for i in tl.static_range(4):  # pyright: ignore[reportGeneralTypeIssues]
        column = i * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)[None, :]
        both = inside[:, None] & (column < D - start)
        store(dhead_ptr + column, parts[i] + load(dhead_ptr + column, both, ACC), both)


def _launch(tile: Tile, dtype: torch.dtype) -> dict[str, Any]:
    shape = {"ROWS": tile.rows, "COLUMNS": tile.columns, "INNER": tile.inner, "ACC": accum_dtype(dtype)}
    return {**shape, "num_warps": tile.warps, "num_stages": tile.stages, **PINNED}


def _within_reach(x: Tensor) -> Tensor:
    """x with neighbours side by side and a tile's rows within int32 of each other; a copy only where they are not."""
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
            for block, target in blocks_of(logits, targets[rows]):
                softmax = Softmax(block.to(keep), target)  # in place where the logits are wide
                loss += softmax.loss
                if needs_x or needs_head:
                    block.copy_(softmax.gradient())
            if dx is not None:
                add_input_gradient(dx[rows], logits, head)
            if dhead is not None:
                dhead += logits.T @ x[rows]
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


class _OnTriton(_OnTorch):
    @staticmethod
    def forward(ctx, x: Tensor, head: Tensor, targets: Tensor, chunk_rows: int = CHUNK_ROWS_CUDA) -> Tensor:
        x, head, targets = _within_reach(x), _within_reach(head), targets.contiguous()
        (m, d), v, device = x.shape, head.shape[0], x.device
        keep = torch.promote_types(x.dtype, torch.float32)
        needs_x, needs_head = ctx.needs_input_grad[:2]
        # an odd size is loaded value by value, in more registers than there are
        even = all(n % 16 == 0 for n in (d, v, x.stride(0), head.stride(0)))
        on_cores = INTERPRETED or (x.element_size() == 2 and even)
        fused, gradient = on_cores and not library_gemm(), needs_x or needs_head
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

    The head may be stored in another dtype than x; it is then widened a piece at a time, and the products are PyTorch's.
    With no rows, or none with a target, the loss is 0 and still connected to x. The number of rows a chunk (CHUNK_ROWS, on a
    GPU CHUNK_ROWS_CUDA) changes rounding only. A target that is neither a class nor -100 is a ValueError; on a GPU, where it
    cannot be seen in time, the loss becomes NaN.
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
