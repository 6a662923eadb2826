"""The experts of a mixture on this project's Triton kernels; the steps are those of lora_experts.py.

Forward, in launches: the tiles (expert_tiles.py), S of gate_up, gate_up, SwiGLU, S of down, down, and the sum over the k rows of
a token. Backward: dS, dB and dh of down, SwiGLU with dw, dA of down; dS, dB, dA and dx of gate_up, and the sum over k. Their
number does not depend on the number of experts, and the host waits for none of them.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minilora.kernels import expert_gemm, expert_shrink, expert_swiglu, kept
from minilora.kernels.dequantize import FEW_ROWS, readable
from minilora.kernels.dispatch import dry, once_differentiable, use_triton
from minilora.kernels.expert_tiles import DOWN, GATE_UP, Stack, Tiles
from minilora.kernels.group import Place
from minilora.kernels.lang import INTERPRETED, rows_of
from minilora.kernels.projection import Projection
from minilora.kernels.quantized import format_of
from minilora.kernels.swiglu import swiglu_forward

if TYPE_CHECKING:
    from minilora.kernels.lora_experts import Routing


def runs_on_triton(x: Tensor, linears: Sequence[Projection]) -> bool:
    """As in lora_linear.py, but also without an adapter, since the library has no product over all experts."""
    weights = [p.weight for p in linears]
    there = all(w.dtype == x.dtype or readable(w.shape[1], {format_of(w)}) for w in weights)
    fits = INTERPRETED or (x.element_size() == 2 and all(size % 16 == 0 for w in weights for size in w.shape))
    return there and fits and x.numel() > 0 and (use_triton(x) or dry())


class OnTriton(torch.autograd.Function):
    """trained: the tensors of the adapters, passed for autograd, first those of gate_up."""

    @staticmethod
    def forward(
        ctx,
        routing: "Routing",
        gate_up: Projection,
        down: Projection,
        output_needed: bool,
        recorded: bool,
        x: Tensor,
        w: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        rows, weights, experts = rows_of(x), w.reshape(-1), len(routing.counts)
        first, last = Stack.of(gate_up, experts, GATE_UP), Stack.of(down, experts, DOWN)
        s, s_down = (kept.given() if p.adapter else None for p in (gate_up, down))
        with torch.cuda.device_of(x):
            tiles = Tiles.of(routing, Place.of(x), not recorded and len(x) <= FEW_ROWS)
            if gate_up.adapter and s is None:
                s = expert_shrink.shrink(rows, first, tiles)
            gu, y = expert_gemm.forward(rows, s, None, first, tiles), x.new_empty(x.shape)
            if output_needed or (down.adapter and s_down is None):
                h = swiglu_forward(gu, None, True)
                if down.adapter and s_down is None:
                    s_down = expert_shrink.shrink(h, last, tiles)
                if output_needed:
                    y = expert_gemm.forward(h, s_down, weights, last, tiles).view(*w.shape, -1).sum(1)
        ctx.save_for_backward(rows, weights, gu, kept.keep(s), kept.keep(s_down), *trained)
        ctx.linears, ctx.tiles, ctx.shape = (first, last), tiles, w.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        (x, weights, gu, s, s_down, *_), tiles = ctx.saved_tensors, ctx.tiles
        (first, last), (needs_x, needs_w, *needs) = ctx.linears, ctx.needs_input_grad[5:]
        own = 2 if first.a is not None else 0
        with torch.cuda.device_of(x):
            dgu, dw, of_down = _down_backward(rows_of(grads[0]), gu, s_down, weights, last, tiles, needs[own:])
            ds = None if first.a is None else expert_shrink.expand_backward(dgu, first, tiles)
            of_gate_up = _gradients(x, dgu, s, ds, None, first, tiles, needs[:own])
            dx = expert_gemm.input_gradient(dgu, ds, first, tiles).view(*ctx.shape, -1).sum(1) if needs_x else None
        return *[None] * 5, dx, dw.view(ctx.shape) if needs_w else None, *of_gate_up, *of_down


def _down_backward(
    dy: Tensor, gu: Tensor, s: Tensor | None, weights: Tensor, down: Stack, tiles: Tiles, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The gradients of g and u [T k, 2 F] and of the weights [T k], and dA and dB of down."""
    # of dY before the weight is multiplied in
    ds = None if down.a is None else expert_shrink.expand_backward(dy, down, tiles)
    dh = expert_gemm.input_gradient(dy, ds, down, tiles)
    dgu, dw = expert_swiglu.backward(dh, gu, weights, tiles)
    return dgu, dw, _gradients(dh, dy, s, ds, weights, down, tiles, needs)  # dh is w h now


def _gradients(
    x: Tensor,
    dy: Tensor,
    s: Tensor | None,
    ds: Tensor | None,
    weights: Tensor | None,
    stack: Stack,
    tiles: Tiles,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """dA and dB in the dtypes of A and B, None if not needed; an empty list without an adapter."""
    if stack.a is None or stack.b is None or s is None or ds is None:
        return []
    da = expert_shrink.shrink_backward(x, ds, stack, tiles).to(stack.a.dtype) if needs[0] else None
    db = expert_shrink.expand_factor_backward(dy, s, weights, stack, tiles).to(stack.b.dtype) if needs[1] else None
    return [da, db]
