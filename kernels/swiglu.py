"""SwiGLU gate: h = silu(g) * u, elementwise over g, u [..., F] (Shazeer, 2020, "GLU variants improve transformer").

Saved for backward: g and u. silu(g) is recomputed. With s = sigmoid(g):

    du = dh * g * s        dg = dh * u * s * (1 + g * (1 - s))

`swiglu_fused` takes both side by side in one matrix, g first, as GLM's fused projection writes them; its gradient comes
back as one such matrix, written once. A perfect forward moves three values for each of h, a perfect backward five.

A program of the kernels takes BLOCK columns of one row: g and u may be column ranges of one wider matrix.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.kernels.dispatch import check_same, once_differentiable, recording, use_triton
from minilora.kernels.lang import PINNED, accum_dtype, cdiv, jit, load, next_power_of_2, rows_of, store, tl
from minilora.kernels.launch import Launch, per_shape


def swiglu_ref(g: Tensor, u: Tensor) -> Tensor:
    """The specification: g, u [..., F] -> [..., F]."""
    return F.silu(g) * u


def swiglu_fused_ref(gu: Tensor) -> Tensor:
    """The specification: gu [..., 2F] -> [..., F]."""
    return swiglu_ref(*gu.chunk(2, dim=-1))


@jit
def _fwd_kernel(g_ptr, u_ptr, h_ptr, g_stride, u_stride, F, blocks, BLOCK: tl.constexpr, ACC: tl.constexpr):
    i_m = (tl.program_id(0) // blocks).to(tl.int64)
    o_n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < F
    b_g = load(g_ptr + i_m * g_stride + o_n, m_n, ACC)
    b_u = load(u_ptr + i_m * u_stride + o_n, m_n, ACC)
    store(h_ptr + i_m * F + o_n, b_g * sigmoid(b_g) * b_u, m_n)


@jit
def _bwd_kernel(
    dh_ptr,
    g_ptr,
    u_ptr,
    dg_ptr,
    du_ptr,
    h_ptr,
    dh_stride,
    g_stride,
    u_stride,
    d_stride,
    F,
    blocks,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """A pointer is None where it is not wanted what it is for; h_ptr may be dh_ptr. d_stride: of the rows of dg and du."""
    i_m = (tl.program_id(0) // blocks).to(tl.int64)
    o_n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < F
    b_dh = load(dh_ptr + i_m * dh_stride + o_n, m_n, ACC)
    b_g = load(g_ptr + i_m * g_stride + o_n, m_n, ACC)
    b_s = sigmoid(b_g)
    # h = g s u, so du = dh g s
    if du_ptr is not None:
        store(du_ptr + i_m * d_stride + o_n, b_dh * b_g * b_s, m_n)
    # ds / dg = s (1 - s), so d(g s) / dg = s + g s (1 - s)
    if dg_ptr is not None or h_ptr is not None:
        b_u = load(u_ptr + i_m * u_stride + o_n, m_n, ACC)
        if dg_ptr is not None:
            store(dg_ptr + i_m * d_stride + o_n, b_dh * b_u * b_s * (1 + b_g * (1 - b_s)), m_n)
        if h_ptr is not None:
            store(h_ptr + i_m * F + o_n, b_g * b_s * b_u, m_n)


@jit
def sigmoid(x):
    """Stable: exp of numbers that are never positive, so that none becomes infinite."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1 + e)


@per_shape
def _launch(device: torch.device, dtype: torch.dtype, rows: int, f: int, *strides: int) -> Launch:
    """Of both kernels: 8 values a thread."""
    block = min(1024, next_power_of_2(f))
    blocks = cdiv(f, block)
    options = {"BLOCK": block, "ACC": accum_dtype(dtype), "num_warps": 4, **PINNED}
    return Launch(device, rows * blocks, (*strides, f, blocks), **options)


def halves(g: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows of g and of u; where u is None, g holds both."""
    rows = rows_of(g)
    first, second = rows.chunk(2, dim=1) if u is None else (rows, rows_of(u))
    return first, second


def _forward_on_triton(g: Tensor, u: Tensor | None) -> Tensor:
    rows_g, rows_u = halves(g, u)
    count, f = rows_g.shape
    h = torch.empty((*g.shape[:-1], f), dtype=g.dtype, device=g.device)
    if h.numel():
        launch = _launch(g.device, g.dtype, count, f, rows_g.stride(0), rows_u.stride(0))
        with torch.cuda.device_of(g):
            launch(_fwd_kernel, rows_g, rows_u, h)
    return h


def _backward_on_triton(
    dh: Tensor, g: Tensor, u: Tensor | None, wanted: Sequence[bool], h: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    dh, (rows_g, rows_u) = rows_of(dh), halves(g, u)
    count, f = rows_g.shape
    dg, du = (torch.empty(g.shape, dtype=g.dtype, device=g.device) if needed else None for needed in wanted)
    to_g, to_u = (dg, du) if dg is None or u is not None else halves(dg, None)
    if g.numel():
        strides = dh.stride(0), rows_g.stride(0), rows_u.stride(0), f if u is not None else 2 * f
        launch = _launch(g.device, g.dtype, count, f, *strides)
        with torch.cuda.device_of(g):
            launch(_bwd_kernel, dh, rows_g, rows_u, to_g, to_u, h)
    return dg, du


class _OnTriton(torch.autograd.Function):
    """u is None for swiglu_fused."""

    @staticmethod
    def forward(ctx, g: Tensor, u: Tensor | None) -> Tensor:
        ctx.save_for_backward(g, u)
        return _forward_on_triton(g, u)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        (dh,), (g, u) = grads, ctx.saved_tensors
        return _backward_on_triton(dh, g, u, ctx.needs_input_grad)


def _forward_on_torch(g: Tensor, u: Tensor | None) -> Tensor:
    first, second = (g, u) if u is not None else g.chunk(2, dim=-1)
    return F.silu(first).mul_(second)


class _OnTorch(torch.autograd.Function):
    """u is None for swiglu_fused."""

    @staticmethod
    def forward(ctx, g: Tensor, u: Tensor | None) -> Tensor:
        ctx.save_for_backward(g, u)
        return _forward_on_torch(g, u)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        (dh,) = grads
        g, u = ctx.saved_tensors
        if u is None:
            dgu = torch.empty_like(g, memory_format=torch.contiguous_format)
            (gate, up), (to_gate, to_up) = g.chunk(2, dim=-1), dgu.chunk(2, dim=-1)
            torch.mul(F.silu(gate), dh, out=to_up)
            torch.ops.aten.silu_backward(dh * up, gate, grad_input=to_gate)
            return dgu, None
        du = F.silu(g).mul_(dh) if ctx.needs_input_grad[1] else None  # dh g s
        dg = torch.ops.aten.silu_backward(dh * u, g) if ctx.needs_input_grad[0] else None  # dh u s (1 + g (1 - s))
        return dg, du


def swiglu_forward(g: Tensor, u: Tensor | None, on_triton: bool) -> Tensor:
    """h of g and u, or of a g that holds both, without a record for autograd."""
    return (_forward_on_triton if on_triton else _forward_on_torch)(g, u)


def swiglu_backward(dh: Tensor, g: Tensor, u: Tensor | None, on_triton: bool) -> tuple[list[Tensor], Tensor]:
    """[dg, du], or one gradient that holds both, and h once more. The memory of dh, [T, F] without gaps, is used up."""
    if on_triton:
        found = _backward_on_triton(dh, g, u, (True, u is not None), h=dh)
        return [d for d in found if d is not None], dh
    whole = torch.empty_like(g, memory_format=torch.contiguous_format) if u is None else None
    first, second = halves(g, u)
    to_g, to_u = (dh, torch.empty_like(dh)) if whole is None else halves(whole, None)
    silu = F.silu(first)
    torch.mul(silu, dh, out=to_u)
    torch.ops.aten.silu_backward(dh.mul_(second), first, grad_input=to_g)
    return [to_g, to_u] if whole is None else [whole], silu.mul_(second)


def swiglu(g: Tensor, u: Tensor) -> Tensor:
    """silu(g) * u for g, u [..., F] of one dtype; ValueError otherwise."""
    check_same("swiglu", g=g, u=u)
    if g.shape != u.shape:
        raise ValueError(f"swiglu: g {list(g.shape)} and u {list(u.shape)} must have one shape")
    return recording(_OnTriton if use_triton(g, u) else _OnTorch)(g, u)


def swiglu_fused(gu: Tensor) -> Tensor:
    """silu(g) * u [..., F] of gu [..., 2F], whose first F columns are g; ValueError for an odd number of columns."""
    check_same("swiglu_fused", gu=gu)
    if gu.dim() == 0 or gu.shape[-1] % 2:
        raise ValueError(f"swiglu_fused: gu {list(gu.shape)}; it takes [..., 2F]")
    return recording(_OnTriton if use_triton(gu) else _OnTorch)(gu, None)


def example(rows: int, f: int, dtype: torch.dtype, device: str = "cpu") -> tuple[tuple[Tensor, Tensor], dict]:
    """Arguments of one call, and the bytes that a perfect forward moves."""
    g, u = (torch.randn(rows, f, device=device, dtype=dtype) for _ in range(2))
    return (g, u), {"bytes": 3 * g.numel() * g.element_size()}


def fused_example(rows: int, f: int, dtype: torch.dtype, device: str = "cpu") -> tuple[tuple[Tensor], dict]:
    """The argument of one swiglu_fused, and the bytes that a perfect forward moves."""
    (g, u), cost = example(rows, f, dtype, device)
    return (torch.cat((g, u), dim=-1),), cost
