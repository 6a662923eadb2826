"""RMS norm: y = w * cast(x / sqrt(mean(x^2) + eps)), rows of x [..., N], w [N] (Zhang and Sennrich, 2019).

The statistics and the normalised row are fp32 (fp64 for fp64 input); the row is rounded to the dtype of x before it is
multiplied by w, which is the rounding order of Qwen and of GLM in transformers. Saved for backward: x and 1/rms, one
number a row; the normalised row is recomputed. With g = w * dy and n = x / rms:

    dx = (g - n * mean(g * n)) / rms        dw = sum over rows of dy * n

The kernels hold whole rows, a few short ones or one long one at a time. For dw each program adds up its own run of rows in
fp32, and torch adds up the programs: no atomics, and the number of programs hangs on the shape alone.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.kernels.dispatch import use_triton
from minilora.kernels.lang import PINNED, cdiv, jit, load, next_power_of_2, rounded, rows_of, store, tl, wide

MAX_WIDTH = 8192  # of a row that a program can hold without spilling
MAX_PARTIALS = 264  # of dw: two programs for each multiprocessor of an H100


def rms_norm_ref(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """The specification: x [..., N], w [N] -> [..., N] in the dtype of x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return w * (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


@jit(do_not_specialize=["rows"])
def _fwd_kernel(
    x_ptr, w_ptr, y_ptr, rstd_ptr, x_stride, rows, N, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (col < N)
    x = load(x_ptr + row * x_stride + col, inside, WIDE)
    w = load(w_ptr + col, col < N, WIDE)
    rstd = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / N + eps)
    store(rstd_ptr + row, rstd, row < rows)
    store(y_ptr + row * N + col, rounded(x * rstd, y_ptr.dtype.element_ty) * w, inside)


@jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["tiles"])
def _bwd_kernel(
    dy_ptr, x_ptr, w_ptr, rstd_ptr, dx_ptr, partial_ptr, dy_stride, x_stride, rows, N, tiles,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """`tiles` times ROWS rows a program; dx_ptr or partial_ptr is None where that gradient is not wanted."""
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)[None, :]
    dw = tl.zeros((ROWS, BLOCK), WIDE)
    for tile in range(tiles):
        row = (program * tiles + tile) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (col < N)
        dy = load(dy_ptr + row * dy_stride + col, inside, WIDE)
        rstd = load(rstd_ptr + row, row < rows, WIDE)
        n = load(x_ptr + row * x_stride + col, inside, WIDE) * rstd
        if partial_ptr is not None:
            dw += dy * n
        if dx_ptr is not None:
            g = dy * load(w_ptr + col, col < N, WIDE)
            mean = tl.sum(g * n, 1, keep_dims=True) / N
            store(dx_ptr + row * N + col, (g - n * mean) * rstd, inside)
    if partial_ptr is not None:
        store(partial_ptr + program * N + col, tl.sum(dw, 0, keep_dims=True), col < N)


def _tile(n: int) -> dict[str, int]:
    """Rows of n columns a program, and warps: 16 values a thread, up to 16 warps."""
    block = next_power_of_2(n)
    rows = max(1, 2048 // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(16, max(4, rows * block // 512)), **PINNED}


class _OnTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, eps: float) -> Tensor:
        rows, w = rows_of(x), w.contiguous()
        (count, n), tile = rows.shape, _tile(x.shape[-1])
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rstd = torch.empty(count, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        if count:
            with torch.cuda.device_of(x):
                _fwd_kernel[(cdiv(count, tile["ROWS"]),)](
                    rows, w, y, rstd, rows.stride(0), count, n, eps, WIDE=wide(x.dtype), **tile
                )
        ctx.save_for_backward(x, w, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        x, w, rstd = ctx.saved_tensors
        dy, rows = rows_of(grads[0]), rows_of(x)
        (count, n), tile = rows.shape, _tile(x.shape[-1])
        tiles = cdiv(count, tile["ROWS"])
        each = cdiv(tiles, MAX_PARTIALS) if ctx.needs_input_grad[1] else 1
        programs = cdiv(tiles, max(each, 1))
        dx = partial = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if ctx.needs_input_grad[1]:
            partial = torch.empty((programs, n), dtype=rstd.dtype, device=x.device)
        if programs:
            with torch.cuda.device_of(x):
                _bwd_kernel[(programs,)](
                    dy, rows, w, rstd, dx, partial, dy.stride(0), rows.stride(0), count, n, each,
                    WIDE=wide(x.dtype), **tile
                )  # fmt: skip
        return dx, None if partial is None else partial.sum(0).to(w.dtype), None


class _OnTorch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        # vector_norm accumulates in fp32 without an fp32 copy of x
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, w, rstd)
        return torch.mul(x, rstd).to(x.dtype).mul_(w)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (dy,) = grads
        x, w, rstd = ctx.saved_tensors
        n = torch.mul(x, rstd)
        dx = dw = None
        if ctx.needs_input_grad[1]:
            dw = torch.mul(dy, n.to(x.dtype)).flatten(0, -2).sum(0, dtype=n.dtype).to(w.dtype)
        if ctx.needs_input_grad[0]:
            g = torch.mul(dy, w).to(n.dtype)
            mean = torch.linalg.vecdot(g, n).div_(x.shape[-1]).unsqueeze(-1)
            dx = g.addcmul_(n, mean, value=-1).mul_(rstd).to(x.dtype)
        return dx, dw, None


def rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """Normalise each row of x [..., N] to unit mean square and scale it by w [N]; result in the dtype of x."""
    on = _OnTriton if use_triton(x, w) and x.shape[-1] <= MAX_WIDTH else _OnTorch
    return on.apply(x, w, eps)  # pyright: ignore[reportReturnType]


def example(rows: int, n: int, dtype: torch.dtype, device: str = "cpu") -> tuple[tuple[Tensor, Tensor, float], dict]:
    """Arguments of one call, and the bytes that a perfect forward moves."""
    x = torch.randn(rows, n, device=device, dtype=dtype)
    w = 1 + 0.1 * torch.randn(n, device=device, dtype=dtype)
    return (x, w, 1e-6), {"bytes": (2 * rows * n + n) * x.element_size()}
