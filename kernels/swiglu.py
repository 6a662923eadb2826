"""SwiGLU gate: h = silu(g) * u, elementwise over g, u [..., F] (Shazeer, 2020, "GLU variants improve transformer").

Saved for backward: g and u. silu(g) is recomputed. With s = sigmoid(g):

    du = dh * g * s        dg = dh * u * s * (1 + g * (1 - s))

A program of the kernels takes one stretch of one row: g and u may be column ranges of one wider matrix.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.kernels.dispatch import use_triton
from minilora.kernels.lang import PINNED, cdiv, jit, load, next_power_of_2, rows_of, store, tl, wide


def swiglu_ref(g: Tensor, u: Tensor) -> Tensor:
    """The specification: g, u [..., F] -> [..., F]."""
    return F.silu(g) * u


@jit
def _fwd_kernel(g_ptr, u_ptr, h_ptr, g_stride, u_stride, F, blocks, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = col < F
    g = load(g_ptr + row * g_stride + col, inside, WIDE)
    u = load(u_ptr + row * u_stride + col, inside, WIDE)
    store(h_ptr + row * F + col, g * _sigmoid(g) * u, inside)


@jit
def _bwd_kernel(
    dh_ptr, g_ptr, u_ptr, dg_ptr, du_ptr, dh_stride, g_stride, u_stride, F, blocks,
    BLOCK: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """dg_ptr or du_ptr is None where that gradient is not wanted."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = col < F
    dh = load(dh_ptr + row * dh_stride + col, inside, WIDE)
    g = load(g_ptr + row * g_stride + col, inside, WIDE)
    s = _sigmoid(g)
    if du_ptr is not None:
        store(du_ptr + row * F + col, dh * g * s, inside)
    if dg_ptr is not None:
        u = load(u_ptr + row * u_stride + col, inside, WIDE)
        store(dg_ptr + row * F + col, dh * u * s * (1 + g * (1 - s)), inside)


@jit
def _sigmoid(x):
    """No infinity on the way: exp of what is not positive."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1 + e)


def _grid(rows: int, f: int) -> tuple[tuple[int], dict[str, int]]:
    """Programs, and what they share: 8 values a thread."""
    block = min(1024, next_power_of_2(f))
    blocks = cdiv(f, block)
    return (rows * blocks,), {"blocks": blocks, "BLOCK": block, "num_warps": 4, **PINNED}


class _OnTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g: Tensor, u: Tensor) -> Tensor:
        ctx.save_for_backward(g, u)
        rows_g, rows_u = rows_of(g), rows_of(u)
        h = torch.empty(g.shape, dtype=g.dtype, device=g.device)
        grid, options = _grid(*rows_g.shape)
        if h.numel():
            with torch.cuda.device_of(g):
                _fwd_kernel[grid](
                    rows_g, rows_u, h, rows_g.stride(0), rows_u.stride(0), g.shape[-1], WIDE=wide(g.dtype), **options
                )
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        g, u = ctx.saved_tensors
        dh, rows_g, rows_u = rows_of(grads[0]), rows_of(g), rows_of(u)
        dg, du = (
            torch.empty(g.shape, dtype=g.dtype, device=g.device) if needed else None for needed in ctx.needs_input_grad
        )
        grid, options = _grid(*rows_g.shape)
        if g.numel():
            with torch.cuda.device_of(g):
                _bwd_kernel[grid](
                    dh, rows_g, rows_u, dg, du, dh.stride(0), rows_g.stride(0), rows_u.stride(0), g.shape[-1],
                    WIDE=wide(g.dtype), **options
                )  # fmt: skip
        return dg, du


class _OnTorch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g: Tensor, u: Tensor) -> Tensor:
        ctx.save_for_backward(g, u)
        return F.silu(g).mul_(u)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (dh,) = grads
        g, u = ctx.saved_tensors
        du = F.silu(g).mul_(dh) if ctx.needs_input_grad[1] else None
        dg = torch.ops.aten.silu_backward(dh * u, g) if ctx.needs_input_grad[0] else None
        return dg, du


def swiglu(g: Tensor, u: Tensor) -> Tensor:
    """silu(g) * u for g, u [..., F] of one dtype."""
    return (_OnTriton if use_triton(g, u) else _OnTorch).apply(g, u)  # pyright: ignore[reportReturnType]


def example(rows: int, f: int, dtype: torch.dtype, device: str = "cpu") -> tuple[tuple[Tensor, Tensor], dict]:
    """Arguments of one call, and the bytes that a perfect forward moves."""
    g, u = (torch.randn(rows, f, device=device, dtype=dtype) for _ in range(2))
    return (g, u), {"bytes": 3 * g.numel() * g.element_size()}
