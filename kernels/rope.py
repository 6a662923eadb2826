"""Rotary position embedding: pairs of a head's elements rotate by the angle of their token (Su et al., 2021).

    y1 = x1 * cos - x2 * sin        y2 = x2 * cos + x1 * sin

x [T, H, E]; cos, sin [T, P/2] in the dtype of x, made by `rope_angles` from the positions of the batch, so that packed
documents restart. The first P <= E elements of a head rotate, the rest are copied. Angle i rotates the pair
(i, i + P/2) (half-split, GPT-NeoX), or (2i, 2i + 1) when interleaved (GPT-J). With cos, sin [T, R, P/2] a head has R
sections of E/R elements, each with its own row of cos and sin: the 2-D positions of ChatGLM-6B are R = 2 and P = E/2.

x is not saved: the backward is the same rotation with -sin. A program of the kernel rotates one section of some heads
of one token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minilora.kernels.dispatch import check_same, once_differentiable, recording, use_triton
from minilora.kernels.lang import PINNED, accum_dtype, cdiv, jit, load, next_power_of_2, store, tl
from minilora.kernels.launch import Launch, per_shape


def rope_angles(
    positions: Tensor, inverse_frequencies: Tensor, factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin [T, P/2] ([T, R, P/2]) of positions [T] ([T, R]) times inverse_frequencies [P/2].

    Angles are made in the dtype of inverse_frequencies (fp32 or wider), cos and sin are scaled by factor, then cast.
    """
    angles = positions.to(inverse_frequencies.dtype).unsqueeze(-1) * inverse_frequencies
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rope_ref(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """The specification: x [T, H, E], cos and sin [T, P/2] or [T, R, P/2] -> [T, H, E]."""
    if cos.dim() == 3:
        sections = x.chunk(cos.shape[1], dim=-1)
        rotated = [rope_ref(s, cos[:, i], sin[:, i], interleaved) for i, s in enumerate(sections)]
        return torch.cat(rotated, dim=-1)
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    rotary, rest = x[..., : 2 * half], x[..., 2 * half :]
    first, second = rotary.unflatten(-1, (half, 2)).unbind(-1) if interleaved else rotary.chunk(2, dim=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1), rest), dim=-1)


@jit
def _rotate_kernel(
    x_ptr,
    y_ptr,
    other_ptr,
    other_y_ptr,
    cos_ptr,
    sin_ptr,
    token_stride,
    head_stride,
    H,
    other_token_stride,
    other_head_stride,
    other_H,
    R,
    SIZE,
    HALF,
    groups,
    other_groups,
    SIGN: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    ACC: tl.constexpr,
):
    """SIGN is 1 for the forward, -1 for the backward; a section has SIZE elements, of which 2 * HALF rotate.

    other_ptr is None where there is only one stream.
    """
    all_groups = groups + other_groups
    i_angle = (tl.program_id(0) // all_groups).to(tl.int64)  # row of cos and sin: a token, and a section of its heads
    i_t, i_section, i_h = i_angle // R, i_angle % R, tl.program_id(0) % all_groups
    if other_ptr is not None:
        other = i_h >= groups
        x_ptr, y_ptr = tl.where(other, other_ptr, x_ptr), tl.where(other, other_y_ptr, y_ptr)
        token_stride = tl.where(other, other_token_stride, token_stride)
        head_stride = tl.where(other, other_head_stride, head_stride)
        H, i_h = tl.where(other, other_H, H), tl.where(other, i_h - groups, i_h)
    o_h = i_h.to(tl.int64) * HEADS + tl.arange(0, HEADS)[:, None]
    p_x = x_ptr + i_t * token_stride + i_section * SIZE + o_h * head_stride
    p_y = y_ptr + (i_t * H + o_h) * (R * SIZE) + i_section * SIZE
    # the angles of the token, for all heads                                                       [1, BLOCK]
    o_e = tl.arange(0, BLOCK)[None, :]
    b_cos = load(cos_ptr + i_angle * HALF + o_e, o_e < HALF, ACC)
    b_sin = load(sin_ptr + i_angle * HALF + o_e, o_e < HALF, ACC) * SIGN
    # rotate x1, x2                                                                         2 x [HEADS, BLOCK]
    if INTERLEAVED:  # adjacent elements are loaded side by side and split in registers
        o_2e = tl.arange(0, 2 * BLOCK)[None, :]
        m_e = (o_h < H) & (o_2e < 2 * HALF)
        b_x1, b_x2 = tl.split(tl.reshape(load(p_x + o_2e, m_e, ACC), (HEADS, BLOCK, 2)))
        b_y = tl.join(b_x1 * b_cos - b_x2 * b_sin, b_x2 * b_cos + b_x1 * b_sin)
        store(p_y + o_2e, tl.reshape(b_y, (HEADS, 2 * BLOCK)), m_e)
    else:
        m_e = (o_h < H) & (o_e < HALF)
        b_x1, b_x2 = load(p_x + o_e, m_e, ACC), load(p_x + HALF + o_e, m_e, ACC)
        store(p_y + o_e, b_x1 * b_cos - b_x2 * b_sin, m_e)
        store(p_y + HALF + o_e, b_x2 * b_cos + b_x1 * b_sin, m_e)
    # copy the rest                                                                             [HEADS, REST]
    if REST:
        o_rest = 2 * HALF + tl.arange(0, REST)[None, :]
        m_rest = (o_h < H) & (o_rest < SIZE)
        tl.store(p_y + o_rest, tl.load(p_x + o_rest, mask=m_rest, other=0.0), mask=m_rest)


def _tile(heads: int, half: int, rest: int) -> dict[str, int]:
    """Heads a program, and warps: 8 pairs a thread."""
    block = next_power_of_2(half)
    some = min(next_power_of_2(heads), max(1, 1024 // block))
    warps = min(4, max(1, some * block // 256))
    return {"HEADS": some, "BLOCK": block, "REST": next_power_of_2(rest) if rest else 0, "num_warps": warps, **PINNED}


@per_shape
def _launch(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    strides: tuple[int, int],
    other_heads: int,
    other_strides: tuple[int, int],
    angles: tuple[int, ...],
    sign: int,
    interleaved: bool,
) -> Launch:
    (tokens, heads, size), half, sections = shape, angles[-1], angles[1] if len(angles) == 3 else 1
    size //= sections
    tile = _tile(heads, half, size - 2 * half)
    groups, others = cdiv(heads, tile["HEADS"]), cdiv(other_heads, tile["HEADS"])
    numbers = *strides, heads, *other_strides, other_heads, sections, size, half, groups, others
    options = {"SIGN": sign, "INTERLEAVED": interleaved, "ACC": accum_dtype(dtype), **tile}
    return Launch(device, tokens * sections * (groups + others), numbers, **options)


def _rotate_on_triton(
    xs: Sequence[Tensor], cos: Tensor, sin: Tensor, sign: int, interleaved: bool
) -> tuple[Tensor, ...]:
    """One or two streams of the same tokens in one launch."""
    xs = [x if x.stride(-1) == 1 else x.contiguous() for x in xs]
    ys = tuple([torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in xs])
    (x, y), (other, other_y) = (xs[0], ys[0]), (xs[1], ys[1]) if len(xs) == 2 else (None, None)
    heads, strides = (0, (0, 0)) if other is None else (other.shape[1], other.stride()[:2])
    launch = _launch(x.device, x.dtype, x.shape, x.stride()[:2], heads, strides, cos.shape, sign, interleaved)
    if launch.grid:
        with torch.cuda.device_of(x):
            launch(_rotate_kernel, x, y, other, other_y, cos, sin)
    return ys


class _OnTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cos: Tensor, sin: Tensor, interleaved: bool, *xs: Tensor) -> tuple[Tensor, ...]:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotate_on_triton(xs, cos, sin, 1, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        cos, sin = ctx.saved_tensors
        return None, None, None, *_rotate_on_triton(grads, cos, sin, -1, ctx.interleaved)


def _pairs(x: Tensor, half: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of x [..., E]: the first and the second element of every pair that rotates, [..., P/2]."""
    x = x if 2 * half == x.shape[-1] else x[..., : 2 * half]
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    first, second = torch.split_with_sizes(x, (half, half), -1)
    return first, second


def _rotate_on_torch(x: Tensor, cos: Tensor, sin: Tensor, sign: int, interleaved: bool) -> Tensor:
    if cos.dim() == 3:  # sections: [T, H, R, E/R] beside [T, 1, R, P/2]
        return _rotate_pairs(
            x.unflatten(-1, (cos.shape[1], -1)), cos[:, None], sin[:, None], sign, interleaved
        ).flatten(-2)
    return _rotate_pairs(x, cos[:, None], sin[:, None], sign, interleaved)


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, sign: int, interleaved: bool) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = cos.shape[-1]
    (first, second), (to_first, to_second) = _pairs(x, half, interleaved), _pairs(y, half, interleaved)
    torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=to_second).addcmul_(first, sin, value=sign)
    if 2 * half < x.shape[-1]:
        y[..., 2 * half :] = x[..., 2 * half :]
    return y


class _OnTorch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cos: Tensor, sin: Tensor, interleaved: bool, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return tuple([_rotate_on_torch(x, cos, sin, 1, interleaved) for x in xs])

    @staticmethod
    def backward(ctx, *grads: Tensor):
        cos, sin = ctx.saved_tensors
        return None, None, None, *[_rotate_on_torch(dy, cos, sin, -1, ctx.interleaved) for dy in grads]


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the first P elements of every head of x [T, H, E] by the angles of its token; the rest are copied.

    cos, sin [T, P/2], or [T, R, P/2] for heads of R sections, get no gradient. ValueError for other shapes.
    """
    _check(x, cos, sin)
    on = _OnTriton if use_triton(x, cos, sin) else _OnTorch
    return recording(on)(cos, sin, interleaved, x)[0]


def rope_pair(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """rope of q [T, H, E] and of k [T, G, E], in one launch on a GPU."""
    _check(q, cos, sin)
    _check(k, cos, sin)
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"rope: q {list(q.shape)} and k {list(k.shape)} must have heads of one size")
    on = _OnTriton if use_triton(q, k, cos, sin) else _OnTorch
    return recording(on)(cos, sin, interleaved, q, k)


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_same("rope", x=x, cos=cos, sin=sin)
    heads = x.dim() == 3 and cos.dim() in (2, 3) and cos.shape == sin.shape and cos.shape[0] == x.shape[0]
    if not heads or not 0 < 2 * cos.shape[1:].numel() <= x.shape[2] or x.shape[2] % cos.shape[1:-1].numel():
        raise ValueError(
            f"rope: x {list(x.shape)}, cos {list(cos.shape)}, sin {list(sin.shape)}; "
            "it takes [T, H, E] and twice [T, P/2] or [T, R, P/2], P <= E / R"
        )


def example(
    tokens: int,
    heads: int,
    size: int,
    dtype: torch.dtype,
    device: str = "cpu",
    rotated: int | None = None,
    interleaved: bool = False,
) -> tuple[tuple[Tensor, Tensor, Tensor, bool], dict]:
    """Arguments of one call, and the bytes that a perfect forward moves; `rotated` elements of a head, None for all."""
    x = torch.randn(tokens, heads, size, device=device, dtype=dtype)
    rotated = size if rotated is None else rotated
    inverse = 10000.0 ** -(torch.arange(0, rotated, 2, device=device, dtype=torch.float64) / rotated)
    cos, sin = rope_angles(torch.arange(tokens, device=device), inverse, 1.0, dtype)
    return (x, cos, sin, interleaved), {"bytes": (2 * x.numel() + 2 * cos.numel()) * x.element_size()}
