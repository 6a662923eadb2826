"""RMS norm: y = (offset + w) * x / sqrt(mean(x^2) + eps), rows of x [..., N], w [N] (Zhang and Sennrich, 2019).

The statistics and the normalised row n are fp32 (fp64 for fp64 input). The families round in two orders:

    round_once=False    y = (offset + w) * cast(n)      n is rounded, then the product: Qwen, GLM in transformers
    round_once=True     y = cast((offset + w) * n)      only the product is: ChatGLM2/3, GLM-4-9B (offset 1: Qwen3.5)

`add_rms_norm` normalises the sum s = x + residual, rounded to their dtype, and returns s too: what a pre-norm block
does between its halves. Saved for backward: x (or s) and rstd = 1/rms, one number a row; n is recomputed. With
g = (offset + w) * dy:

    dx = (g - n * mean(g * n)) * rstd + ds      dw = sum over rows of dy * n

ds is the gradient of s from elsewhere; x and residual share one dx. A perfect forward moves each row twice (four times
with the sum: x, residual, s, y), a perfect backward three times (four: dy, ds, s, dx).

A program of the kernels holds whole rows, a few short ones or one long one at a time. For dw each program adds up its
own rows in fp32, and torch adds up the programs: no atomics, and the number of programs depends only on the shape.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.kernels.dispatch import check_same, once_differentiable, recording, use_triton
from minilora.kernels.lang import PINNED, accum_dtype, cdiv, jit, load, next_power_of_2, rounded, rows_of, store, tl
from minilora.kernels.launch import Launch, per_shape

MAX_WIDTH = 8192  # of the rows that a program can hold without spilling
MAX_PARTIALS = 264  # of dw: two programs for each multiprocessor of an H100


def rms_norm_ref(x: Tensor, w: Tensor, eps: float, offset: float = 0.0, round_once: bool = False) -> Tensor:
    """The specification: x [..., N], w [N] -> [..., N] in the dtype of x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    n = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    n = n if round_once else n.to(x.dtype)
    return ((offset + w.to(n.dtype)) * n).to(x.dtype)


def add_rms_norm_ref(
    x: Tensor, residual: Tensor, w: Tensor, eps: float, offset: float = 0.0, round_once: bool = False
) -> tuple[Tensor, Tensor]:
    """The specification: x, residual [..., N], w [N] -> the norm of their sum, and the sum."""
    s = x + residual
    return rms_norm_ref(s, w, eps, offset, round_once), s


@jit(do_not_specialize=["rows"])
def _fwd_kernel(
    x_ptr,
    residual_ptr,
    w_ptr,
    s_ptr,
    y_ptr,
    rstd_ptr,
    x_stride,
    residual_stride,
    rows,
    N,
    eps,
    offset,
    ROUND_ONCE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program: ROWS rows. residual_ptr and s_ptr are None where nothing is added."""
    o_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_n = tl.arange(0, BLOCK)[None, :]
    m_mn = (o_m < rows) & (o_n < N)
    # load x, add the residual                                                                   [ROWS, BLOCK]
    b_x = load(x_ptr + o_m * x_stride + o_n, m_mn, ACC)
    if residual_ptr is not None:
        b_x = rounded(b_x + load(residual_ptr + o_m * residual_stride + o_n, m_mn, ACC), s_ptr.dtype.element_ty)
        store(s_ptr + o_m * N + o_n, b_x, m_mn)
    b_w = load(w_ptr + o_n, o_n < N, ACC) + offset
    # 1 / rms of each row                                                                            [ROWS, 1]
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1, keep_dims=True) / N + eps)
    store(rstd_ptr + o_m, b_rstd, o_m < rows)
    # normalise, scale, store                                                                    [ROWS, BLOCK]
    b_n = b_x * b_rstd
    if not ROUND_ONCE:
        b_n, b_w = rounded(b_n, y_ptr.dtype.element_ty), rounded(b_w, y_ptr.dtype.element_ty)
    store(y_ptr + o_m * N + o_n, b_n * b_w, m_mn)


@jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["tiles"])
def _bwd_kernel(
    dy_ptr,
    ds_ptr,
    x_ptr,
    w_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
    dy_stride,
    ds_stride,
    x_stride,
    rows,
    N,
    offset,
    tiles,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program: `tiles` times ROWS rows. dx_ptr, partial_ptr: None where not wanted; ds_ptr: None without ds."""
    i_program = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK)[None, :]
    b_dw = tl.zeros((ROWS, BLOCK), ACC)
    for i_tile in range(tiles):
        # load dy, recompute n                                                                   [ROWS, BLOCK]
        o_m = (i_program * tiles + i_tile) * ROWS + tl.arange(0, ROWS)[:, None]
        m_mn = (o_m < rows) & (o_n < N)
        b_dy = load(dy_ptr + o_m * dy_stride + o_n, m_mn, ACC)
        b_rstd = load(rstd_ptr + o_m, o_m < rows, ACC)
        b_n = load(x_ptr + o_m * x_stride + o_n, m_mn, ACC) * b_rstd
        # y = (offset + w) n, so dw += dy n
        if partial_ptr is not None:
            b_dw += b_dy * b_n
        # and dn = g; n = x rstd with d rstd / dx = -rstd^3 x / N, so dx = rstd g - rstd^3 x sum(g x) / N
        #                                                                = rstd (g - n mean(g n))
        if dx_ptr is not None:
            b_g = b_dy * (load(w_ptr + o_n, o_n < N, ACC) + offset)
            b_mean = tl.sum(b_g * b_n, 1, keep_dims=True) / N
            b_dx = (b_g - b_n * b_mean) * b_rstd
            if ds_ptr is not None:
                b_dx += load(ds_ptr + o_m * ds_stride + o_n, m_mn, ACC)
            store(dx_ptr + o_m * N + o_n, b_dx, m_mn)
    if partial_ptr is not None:
        store(partial_ptr + i_program * N + o_n, tl.sum(b_dw, 0, keep_dims=True), o_n < N)


def _tile(n: int) -> dict[str, int]:
    """Rows of n columns in a program, and its warps: 16 values a thread, up to 16 warps."""
    block = next_power_of_2(n)
    rows = max(1, 2048 // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(16, max(4, rows * block // 512)), **PINNED}


@per_shape
def _fwd_launch(
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    n: int,
    strides: tuple[int, int],
    eps: float,
    offset: float,
    round_once: bool,
) -> Launch:
    tile = _tile(n)
    numbers = *strides, rows, n, eps, offset
    return Launch(device, cdiv(rows, tile["ROWS"]), numbers, ROUND_ONCE=round_once, ACC=accum_dtype(dtype), **tile)


@per_shape
def _bwd_launch(
    device: torch.device, dtype: torch.dtype, rows: int, n: int, strides: tuple[int, int, int], offset: float, dw: bool
) -> Launch:
    """dw: whether the weight is trained, for which a program adds up its rows; one takes a tile where it is not."""
    tile = _tile(n)
    tiles = cdiv(rows, tile["ROWS"])
    each = cdiv(tiles, MAX_PARTIALS) if dw else 1
    numbers = *strides, rows, n, offset, each
    return Launch(device, cdiv(tiles, max(each, 1)), numbers, ACC=accum_dtype(dtype), **tile)


class _OnTriton(torch.autograd.Function):
    """residual is None for rms_norm; with one the sum is a second output."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, eps: float, offset: float, round_once: bool, residual: Tensor | None):
        ctx.set_materialize_grads(False)
        rows, w = rows_of(x), w.contiguous()
        added = None if residual is None else rows_of(residual)
        count, n = rows.shape
        strides = rows.stride(0), 0 if added is None else added.stride(0)
        launch = _fwd_launch(x.device, x.dtype, count, n, strides, eps, offset, round_once)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        s = None if added is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rstd = torch.empty(count, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        if count:
            with torch.cuda.device_of(x):
                launch(_fwd_kernel, rows, added, w, s, y, rstd)
        ctx.save_for_backward(x if s is None else s, w, rstd)
        ctx.offset = offset
        return y if s is None else (y, s)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None):
        x, w, rstd = ctx.saved_tensors
        dy, ds = grads if len(grads) == 2 else (grads[0], None)
        if dy is None:  # only the sum was used
            return _gradients(ctx, ds, None)
        dy, rows = rows_of(dy), rows_of(x)
        ds = None if ds is None else rows_of(ds)
        dx = partial = None
        count, n = rows.shape
        strides = dy.stride(0), 0 if ds is None else ds.stride(0), rows.stride(0)
        launch = _bwd_launch(x.device, x.dtype, count, n, strides, ctx.offset, ctx.needs_input_grad[1])
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[5]:
            dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if ctx.needs_input_grad[1]:
            partial = torch.empty((launch.grid, n), dtype=rstd.dtype, device=x.device)
        if launch.grid:
            with torch.cuda.device_of(x):
                launch(_bwd_kernel, dy, ds, rows, w, rstd, dx, partial)
        dw = None if partial is None else partial.sum(0).to(w.dtype)
        return _gradients(ctx, dx, dw)


class _OnTorch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, eps: float, offset: float, round_once: bool, residual: Tensor | None):
        ctx.set_materialize_grads(False)
        s = x if residual is None else x + residual
        wide = torch.promote_types(x.dtype, torch.float32)
        # vector_norm accumulates in fp32 without an fp32 copy of x
        norm = torch.linalg.vector_norm(s, dim=-1, keepdim=True, dtype=wide)
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(s, w, rstd)
        ctx.offset = offset
        n = torch.mul(s, rstd)
        n = n if round_once else n.to(x.dtype)
        y = n.mul_(w.to(n.dtype) + offset if offset else w).to(x.dtype)
        return y if residual is None else (y, s)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        dy, ds = grads if len(grads) == 2 else (grads[0], None)
        if dy is None:
            return _gradients(ctx, ds, None)
        x, w, rstd = ctx.saved_tensors
        n = torch.mul(x, rstd)
        dx = dw = None
        if ctx.needs_input_grad[1]:  # dw = sum over rows of dy n
            dw = torch.mul(dy, n).flatten(0, -2).sum(0).to(w.dtype)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[5]:  # dx = (g - n mean(g n)) rstd + ds
            g = torch.mul(dy, w.to(n.dtype) + ctx.offset)
            mean = torch.linalg.vecdot(g, n).div_(x.shape[-1]).unsqueeze(-1)
            dx = g.addcmul_(n, mean, value=-1).mul_(rstd)
            dx = (dx if ds is None else dx.add_(ds)).to(x.dtype)
        return _gradients(ctx, dx, dw)


def _gradients(ctx, dx: Tensor | None, dw: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients in the order of forward's arguments: x and residual both get dx, if they need it."""
    needs_x, needs_residual = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
    return dx if needs_x else None, dw, None, None, None, dx if needs_residual else None


def rms_norm(x: Tensor, w: Tensor, eps: float, offset: float = 0.0, round_once: bool = False) -> Tensor:
    """Normalise each row of x [..., N] to unit mean square and scale it by offset + w [N]; result in the dtype of x.

    `round_once` leaves the normalised row unrounded until it is scaled. ValueError unless x and w have one dtype and
    one N.
    """
    if _torch_serves(x, w, offset):
        return F.rms_norm(x, w.shape, w, eps)
    check_same("rms_norm", x=x, w=w)
    _check_width("rms_norm", x, w)
    return recording(_on(x, w))(x, w, eps, offset, round_once, None)


def add_rms_norm(
    x: Tensor, residual: Tensor, w: Tensor, eps: float, offset: float = 0.0, round_once: bool = False
) -> tuple[Tensor, Tensor]:
    """The norm of x + residual (both [..., N]) as rms_norm gives it, and the sum, in one pass."""
    if _torch_serves(x, w, offset) and x.shape == residual.shape:
        s = x + residual
        return F.rms_norm(s, w.shape, w, eps), s
    check_same("add_rms_norm", x=x, residual=residual, w=w)
    _check_width("add_rms_norm", x, w)
    if x.shape != residual.shape:
        raise ValueError(f"add_rms_norm: x {list(x.shape)} and residual {list(residual.shape)} must have one shape")
    return recording(_on(x, w))(x, w, eps, offset, round_once, residual)


def _torch_serves(x: Tensor, w: Tensor, offset: float) -> bool:
    """Whether torch's own norm serves: in inference (a recomputed block needs the same bits) and fp32 (no rounding)."""
    fp32 = x.dtype == torch.float32 and w.dtype == torch.float32
    return torch.is_inference_mode_enabled() and fp32 and not offset and not use_triton(x)


def _check_width(op: str, x: Tensor, w: Tensor) -> None:
    if w.dim() != 1 or x.shape[-1:] != w.shape:
        raise ValueError(f"{op}: x {list(x.shape)}, w {list(w.shape)}; it takes [..., N] and [N]")


def _on(x: Tensor, w: Tensor) -> type[torch.autograd.Function]:
    return _OnTriton if use_triton(x, w) and x.shape[-1] <= MAX_WIDTH else _OnTorch


def example(
    rows: int, n: int, dtype: torch.dtype, device: str = "cpu", offset: float = 0.0, round_once: bool = False
) -> tuple[tuple[Tensor, Tensor, float, float, bool], dict]:
    """Arguments of one call, and the bytes that a perfect forward moves."""
    x = torch.randn(rows, n, device=device, dtype=dtype)
    w = 1 - offset + 0.1 * torch.randn(n, device=device, dtype=dtype)
    return (x, w, 1e-6, offset, round_once), {"bytes": (2 * rows * n + n) * x.element_size()}


def add_example(
    rows: int, n: int, dtype: torch.dtype, device: str = "cpu", offset: float = 0.0, round_once: bool = False
) -> tuple[tuple[Tensor, Tensor, Tensor, float, float, bool], dict]:
    """Arguments of one add_rms_norm, and the bytes that a perfect forward moves."""
    (x, w, eps, *_), _ = example(rows, n, dtype, device, offset, round_once)
    residual = torch.randn(rows, n, device=device, dtype=dtype)
    return (x, residual, w, eps, offset, round_once), {"bytes": (4 * rows * n + n) * x.element_size()}
