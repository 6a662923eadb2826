"""RMS norm: y = w * cast(x / sqrt(mean(x^2) + eps)), rows of x [..., N], w [N] (Zhang and Sennrich, 2019).

The statistics and the normalised row are fp32 (fp64 for fp64 input); the row is rounded to the dtype of x before it is
multiplied by w, which is the rounding order of Qwen and of GLM in transformers. Saved for backward: x and 1/rms, one
number a row; the normalised row is recomputed. With g = w * dy and n = x / rms:

    dx = (g - n * mean(g * n)) / rms        dw = sum over rows of dy * n
"""

import torch
from torch import Tensor


def rms_norm_ref(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """The specification: x [..., N], w [N] -> [..., N] in the dtype of x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return w * (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
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
    return _RMSNorm.apply(x, w, eps)  # pyright: ignore[reportReturnType]


def example(rows: int, n: int, dtype: torch.dtype, device: str = "cpu") -> tuple[tuple[Tensor, Tensor, float], dict]:
    """Arguments of one call, and the bytes that a perfect forward moves."""
    x = torch.randn(rows, n, device=device, dtype=dtype)
    w = 1 + 0.1 * torch.randn(n, device=device, dtype=dtype)
    return (x, w, 1e-6), {"bytes": (2 * rows * n + n) * x.element_size()}
