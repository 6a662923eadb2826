"""Causal convolution of each channel over a few tokens, then SiLU, by documents: what a gated delta rule reads (Yang et al., 2024).

    z_t = sum over i of w_i * x_(t - i), over the tokens of t's document          y = silu(z)

x [T, C]; w [C, K] with the tap of the token itself in the last column, as a checkpoint has it. Saved for the backward: z,
and x only where w is trained. With dz = dy silu'(z):

    dx_t = sum over i of w_i * dz_(t + i)         dw_i = sum over t of dz_t * x_(t - i)

A perfect forward moves each number twice. A GPU runs FLA's kernel where it is installed (fla.py), else, as a CPU does, plain torch:
a pass for each tap, over each document by itself.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.kernels import fla
from minilora.kernels.dispatch import check_same, once_differentiable, recording


def short_conv_ref(x: Tensor, w: Tensor, cu_seqlens: Sequence[int]) -> Tensor:
    """The specification: x [T, C], w [C, K] -> [T, C], each document padded with K - 1 zeros in front."""
    taps = w.shape[1]
    parts = [F.pad(x[start:end].T, (taps - 1, 0)) for start, end in pairwise(cu_seqlens) if end > start]
    return F.silu(torch.cat([F.conv1d(p[None], w[:, None], groups=len(w))[0].T for p in parts]))


def _spans(cu_seqlens: Sequence[int], i: int) -> list[tuple[slice, slice]]:
    """Of each document longer than i: the tokens that have one i before them, and those that have one i after them."""
    return [(slice(start + i, end), slice(start, end - i)) for start, end in pairwise(cu_seqlens) if end - start > i]


def _convolved(x: Tensor, w: Tensor, cu_seqlens: Sequence[int], forward: bool = True) -> Tensor:
    """z of x in fp32 or wider; forward=False: dx of dz, the same with the time reversed."""
    *earlier, own = w.to(torch.promote_types(x.dtype, torch.float32)).unbind(1)
    z = x * own
    for i, tap in enumerate(reversed(earlier), 1):
        for later, before in _spans(cu_seqlens, i):
            to, of = (later, before) if forward else (before, later)
            z[to].addcmul_(x[of], tap)
    return z


class _OnTorch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, cu_seqlens: Sequence[int]) -> Tensor:
        z = _convolved(x, w, cu_seqlens).to(x.dtype)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w, z)
        ctx.cu_seqlens = cu_seqlens
        return F.silu(z)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        x, w, z = ctx.saved_tensors
        dz = torch.ops.aten.silu_backward(grads[0], z)
        dx = _convolved(dz, w, ctx.cu_seqlens, forward=False).to(dz.dtype) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            dw, last = (
                torch.zeros(w.shape, dtype=torch.promote_types(w.dtype, torch.float32), device=w.device),
                w.shape[1] - 1,
            )
            for i in range(last + 1):
                for later, before in _spans(ctx.cu_seqlens, i):
                    dw[:, last - i] += (dz[later] * x[before]).sum(0)
            dw = dw.to(w.dtype)
        return dx, dw, None


def short_conv(x: Tensor, w: Tensor, cu_seqlens: Sequence[int]) -> Tensor:
    """y [T, C] for the documents of a stream x [T, C], whose bounds cu_seqlens [S + 1] are; w [C, K] in the dtype of x.

    ValueError for other shapes.
    """
    check_same("short_conv", x=x, w=w)
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[0]:
        raise ValueError(f"short_conv: x {list(x.shape)}, w {list(w.shape)}; it takes [T, C] and [C, K]")
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != len(x) or any(a > b for a, b in pairwise(cu_seqlens)):
        raise ValueError(f"short_conv: cu_seqlens {list(cu_seqlens)} must go up from 0 to the {len(x)} tokens")
    if fla.runs_on_fla(x):
        return fla.convolution(x, w, cu_seqlens)
    return recording(_OnTorch)(x, w, cu_seqlens)


def example(
    lengths: list[int], channels: int, taps: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[tuple[Tensor, Tensor, list[int]], dict]:
    """Arguments of one call, and the bytes that a perfect forward moves."""
    x = torch.randn(sum(lengths), channels, device=device, dtype=dtype)
    w = torch.randn(channels, taps, device=device, dtype=dtype) * taps**-0.5
    cu_seqlens = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return (x, w, cu_seqlens), {"bytes": 2 * x.numel() * x.element_size()}
