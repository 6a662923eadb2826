"""Rotary position embedding, half-split pairing: element i of a head turns with element i + E/2 (Su et al., 2021).

    y[i]       = x[i] * cos[i] - x[i + E/2] * sin[i]
    y[i + E/2] = x[i + E/2] * cos[i] + x[i] * sin[i]

x [T, H, E]; cos, sin [T, E/2] in the dtype of x, made by `rope_angles` from the positions of the batch, so that packed
documents restart. Nothing of x is saved: the backward is the same rotation with -sin. A program of the kernel turns some
heads of one token.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.kernels.dispatch import use_triton
from minilora.kernels.lang import PINNED, cdiv, jit, load, next_power_of_2, store, tl, wide


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


@jit
def _turn_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, token_stride, head_stride, H, HALF, groups,
    SIGN: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """SIGN is 1 for the forward, -1 for the backward."""
    token = (tl.program_id(0) // groups).to(tl.int64)
    head = (tl.program_id(0) % groups).to(tl.int64) * HEADS + tl.arange(0, HEADS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = (head < H) & (col < HALF)
    cos = load(cos_ptr + token * HALF + col, col < HALF, WIDE)
    sin = load(sin_ptr + token * HALF + col, col < HALF, WIDE) * SIGN
    x = x_ptr + token * token_stride + head * head_stride + col
    first, second = load(x, inside, WIDE), load(x + HALF, inside, WIDE)
    y = y_ptr + (token * H + head) * (2 * HALF) + col
    store(y, first * cos - second * sin, inside)
    store(y + HALF, second * cos + first * sin, inside)


def _tile(heads: int, half: int) -> dict[str, int]:
    """Heads a program, and warps: 8 pairs a thread."""
    block = next_power_of_2(half)
    some = min(next_power_of_2(heads), max(1, 1024 // block))
    return {"HEADS": some, "BLOCK": block, "num_warps": min(4, max(1, some * block // 256)), **PINNED}


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    tokens, heads, size = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = _tile(heads, size // 2)
    groups = cdiv(heads, tile["HEADS"])
    if tokens:
        with torch.cuda.device_of(x):
            _turn_kernel[(tokens * groups,)](
                x, cos, sin, y, x.stride(0), x.stride(1), heads, size // 2, groups,
                SIGN=sign, WIDE=wide(x.dtype), **tile
            )  # fmt: skip
    return y


class _OnTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, sin, -1), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    half = x.shape[-1] // 2
    cos, sin = cos[:, None], sin[:, None]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(x[..., :half], cos, out=y[..., :half]).addcmul_(x[..., half:], sin, value=-sign)
    torch.mul(x[..., half:], cos, out=y[..., half:]).addcmul_(x[..., :half], sin, value=sign)
    return y


class _OnTorch(torch.autograd.Function):
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
    return (_OnTriton if use_triton(x, cos, sin) else _OnTorch).apply(x, cos, sin)  # pyright: ignore[reportReturnType]


def example(
    tokens: int, heads: int, size: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[tuple[Tensor, ...], dict]:
    """Arguments of one call, and the bytes that a perfect forward moves."""
    x = torch.randn(tokens, heads, size, device=device, dtype=dtype)
    inverse = 10000.0 ** -(torch.arange(0, size, 2, device=device, dtype=torch.float64) / size)
    cos, sin = rope_angles(torch.arange(tokens, device=device), inverse, 1.0, dtype)
    return (x, cos, sin), {"bytes": (2 * x.numel() + 2 * cos.numel()) * x.element_size()}
