"""Rotary position embedding, half-split pairing: element i of a head turns with element i + E/2 (Su et al., 2021).

    y[i]       = x[i] * cos[i] - x[i + E/2] * sin[i]
    y[i + E/2] = x[i + E/2] * cos[i] + x[i] * sin[i]

x [T, H, E]; cos, sin [T, E/2] in the dtype of x, made by `rope_angles` from the positions of the batch, so that packed
documents restart. Nothing of x is saved: the backward is the same rotation with -sin.
"""

import torch
from torch import Tensor


def rope_angles(
    positions: Tensor, inverse_frequencies: Tensor, factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin [T, E/2] of positions [T] times inverse_frequencies [E/2]; angles in fp32 or wider, times factor, then cast."""
    angles = torch.outer(positions.to(inverse_frequencies.dtype), inverse_frequencies)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rope_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The specification: x [T, H, E], cos and sin [T, E/2] -> [T, H, E]."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    half = x.shape[-1] // 2
    cos, sin = cos[:, None], sin[:, None]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(x[..., :half], cos, out=y[..., :half]).addcmul_(x[..., half:], sin, value=-sign)
    torch.mul(x[..., half:], cos, out=y[..., half:]).addcmul_(x[..., :half], sin, value=sign)
    return y


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, -1), None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every head of x [T, H, E] by the angles of its token; cos, sin [T, E/2] get no gradient."""
    return _Rope.apply(x, cos, sin)  # pyright: ignore[reportReturnType]


def example(
    tokens: int, heads: int, size: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[tuple[Tensor, ...], dict]:
    """Arguments of one call, and the bytes that a perfect forward moves."""
    x = torch.randn(tokens, heads, size, device=device, dtype=dtype)
    inverse = 10000.0 ** -(torch.arange(0, size, 2, device=device, dtype=torch.float64) / size)
    cos, sin = rope_angles(torch.arange(tokens, device=device), inverse, 1.0, dtype)
    return (x, cos, sin), {"bytes": (2 * x.numel() + 2 * cos.numel()) * x.element_size()}
