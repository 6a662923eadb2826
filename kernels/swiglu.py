"""SwiGLU gate: h = silu(g) * u, elementwise over g, u [..., F] (Shazeer, 2020, "GLU variants improve transformer").

Saved for backward: g and u. silu(g) is recomputed. With s = sigmoid(g):

    du = dh * g * s        dg = dh * u * s * (1 + g * (1 - s))
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu_ref(g: Tensor, u: Tensor) -> Tensor:
    """The specification: g, u [..., F] -> [..., F]."""
    return F.silu(g) * u


class _SwiGLU(torch.autograd.Function):
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
    return _SwiGLU.apply(g, u)  # pyright: ignore[reportReturnType]


def example(rows: int, f: int, dtype: torch.dtype, device: str = "cpu") -> tuple[tuple[Tensor, Tensor], dict]:
    """Arguments of one call, and the bytes that a perfect forward moves."""
    g, u = (torch.randn(rows, f, device=device, dtype=dtype) for _ in range(2))
    return (g, u), {"bytes": 3 * g.numel() * g.element_size()}
