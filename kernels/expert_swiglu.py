"""The backward of SwiGLU in the experts of a mixture, with the routing weight w of each slot.

    dw = dh . h        dg = w dh u s (1 + g (1 - s))        du = w dh g s        w h

with s = sigmoid(g) (swiglu.py) and dh the gradient from down before the weight w: dY . down(h) = dh . h, so the output of down
is not needed. w h overwrites dh; dA of down is computed from it.
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false

import torch
from torch import Tensor

from minilora.kernels.expert_tiles import Tiles
from minilora.kernels.lang import PINNED, accum_dtype, jit, load, next_power_of_2, store, tl
from minilora.kernels.launch import Launch, per_shape
from minilora.kernels.swiglu import sigmoid


@jit
def _backward_kernel(
    dh_ptr, gu_ptr, dgu_ptr, weights_ptr, dw_ptr, slots_ptr, F, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """A program: one slot, BLOCK columns of g and of u at a time; w h is stored over dh."""
    i_m = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + i_m)
    weight, dw = tl.load(weights_ptr + slot).to(ACC), tl.zeros((BLOCK,), ACC)
    for start in range(0, F, BLOCK):
        o_n = start + tl.arange(0, BLOCK)
        m_n = o_n < F
        p_dh, p_g = dh_ptr + i_m * F + o_n, gu_ptr + i_m * 2 * F + o_n
        p_dg = dgu_ptr + i_m * 2 * F + o_n
        b_dh, b_g, b_u = load(p_dh, m_n, ACC), load(p_g, m_n, ACC), load(p_g + F, m_n, ACC)
        b_s = sigmoid(b_g)
        b_h = b_g * b_s * b_u
        dw += b_dh * b_h
        b_dh *= weight
        store(p_dg, b_dh * b_u * b_s * (1 + b_g * (1 - b_s)), m_n)
        store(p_dg + F, b_dh * b_g * b_s, m_n)
        store(p_dh, b_h * weight, m_n)
    tl.store(dw_ptr + slot, tl.sum(dw))


@per_shape
def _launch(device: torch.device, dtype: torch.dtype, slots: int, f: int) -> Launch:
    options = {"BLOCK": min(1024, next_power_of_2(f)), "ACC": accum_dtype(dtype), "num_warps": 4, **PINNED}
    return Launch(device, slots, (f,), **options)


def backward(dh: Tensor, gu: Tensor, weights: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """dgu [T k, 2 F], and dw [T k] indexed by slot; dh [T k, F] becomes w h."""
    slots, f = dh.shape
    dgu = torch.empty(gu.shape, dtype=gu.dtype, device=gu.device)
    dw = torch.empty((slots,), dtype=weights.dtype, device=gu.device)
    _launch(gu.device, gu.dtype, slots, f)(_backward_kernel, dh, gu, dgu, weights, dw, tiles.slots)
    return dgu, dw
