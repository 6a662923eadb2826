"""Linear layer with a low-rank adapter on a frozen weight (LoRA: Hu et al., 2021).

    y = x W^T + b + s * (dropout(x) A^T) B^T        x [T, K], W [N, K], b [N], A [R, K], B [N, R] -> y [T, N]

x is read in its own dtype and never copied to fp32: A and B, which are kept in fp32, are cast instead. The wide product
x W^T is written once and the narrow one is added into it by the same GEMM call's accumulate. Saved for backward: x and
S = dropout(x) A^T [T, R]; the dropout mask is drawn again from its key. With dS = s * dY B:

    dX = dY W + mask(dS A)        dA = dS^T dropout(x)        dB = s * dY^T S

W and b are frozen and get no gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import DropoutKey, dropout, dropout_mask, dropped

NO_DROPOUT = DropoutKey(0, 0, 0, 0)


def lora_linear_ref(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float,
    p: float = 0.0, key: DropoutKey = NO_DROPOUT,
) -> Tensor:  # fmt: skip
    """The specification, term by term."""
    low = dropout(x, p, key) @ a.to(x.dtype).T
    return F.linear(x, w, bias) + scale * (low @ b.to(x.dtype).T)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias, a, b, scale, p, key) -> Tensor:
        s = dropout(x, p, key) @ a.to(x.dtype).T
        ctx.save_for_backward(x, w, a, b, s)
        ctx.scale, ctx.p, ctx.key = scale, p, key
        return F.linear(x, w, bias).addmm_(s, _scaled(b, scale, x.dtype).T)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (dy,) = grads
        x, w, a, b, s = ctx.saved_tensors
        scale, p, key = ctx.scale, ctx.p, ctx.key
        dx = da = db = None
        if ctx.needs_input_grad[4]:
            db = (dy.T @ s).to(b.dtype).mul_(scale)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
            ds = dy @ _scaled(b, scale, dy.dtype)
            mask = None if p == 0 else dropout_mask((x.shape[0], x.shape[1]), p, key, x.device)
            if ctx.needs_input_grad[3]:
                da = (ds.T @ dropped(x, mask, p)).to(a.dtype)
            if ctx.needs_input_grad[0]:
                dx = dy @ w
                low = a.to(dy.dtype)
                dx = dx.addmm_(ds, low) if mask is None else dx.add_(dropped(ds @ low, mask, p))
        return dx, None, None, da, db, None, None, None


def _scaled(b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale * b in a dtype, multiplied in the wider one of the two."""
    return (b.to(torch.promote_types(b.dtype, dtype)) * scale).to(dtype)


def lora_linear(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float,
    p: float = 0.0, key: DropoutKey = NO_DROPOUT,
) -> Tensor:  # fmt: skip
    """F.linear(x, w, bias) + scale * (dropout(x) A^T) B^T for x [T, K]; p is the dropout rate, key its mask's name."""
    assert not w.requires_grad, "the base weight of an adapter is frozen"
    return _LoRALinear.apply(x, w, bias, a, b, scale, p, key)  # pyright: ignore[reportReturnType]


def example(tokens: int, k: int, n: int, r: int, dtype: torch.dtype, device: str = "cpu") -> tuple[tuple, dict]:
    """Arguments of one call, and the flops and bytes that a perfect forward needs."""
    x, w = (
        torch.randn(tokens, k, device=device, dtype=dtype),
        torch.randn(n, k, device=device, dtype=dtype) * k**-0.5,
    )
    bias = torch.randn(n, device=device, dtype=dtype)
    a, b = torch.randn(r, k, device=device) * k**-0.5, torch.randn(n, r, device=device)
    size = x.element_size()
    cost = {
        "flops": 2 * tokens * (k * n + r * (k + n)),
        "bytes": size * (tokens * (k + n) + k * n) + 4 * r * (k + n),
    }
    return (x, w, bias, a, b, 2.0), cost
