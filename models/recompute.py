"""Activation checkpointing of a block (Chen et al., 2016): its input is kept, the rest is computed again in the backward.

All but the last linear is: its output is needed by nobody there, and it is the dearest one of the recomputation beside
gate and up (29 % of a Qwen2.5-7B block's GEMMs). So the gradient of its input comes from its formula, and autograd goes on from
there. With `keep_attention` the output of attention is kept too, [T, H, E] and one number a query, and its forward is skipped.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from minilora.kernels.lora_linear_group import lora_linear_group_gradients

from .layers import Adapted, BaseBlock, projection
from .place import Place


def recomputed(block: nn.Module, x: Tensor, place: Place, keep_attention: bool) -> Tensor:
    """block(x, place) for x [T, D], keeping x alone (and what attention gave) for the backward."""
    # where the last step is no linear, or a foreign one, all is computed again
    if not isinstance(block, BaseBlock) or not isinstance(block.mlp.output, (nn.Linear, Adapted)):
        return checkpoint(block, x, place, use_reentrant=False, preserve_rng_state=False)
    trained = [p for p in block.parameters() if p.requires_grad]
    return _Recomputed.apply(block, place, keep_attention, x, *trained)  # pyright: ignore[reportReturnType]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, block: BaseBlock, place: Place, keep_attention: bool, x: Tensor, *trained: Tensor) -> Tensor:
        kept: list[tuple[Tensor, Tensor | None]] = []
        y = block(x, replace(place, kept=kept) if keep_attention else place)
        ctx.save_for_backward(x, *trained, *(t for pair in kept for t in pair))
        ctx.block, ctx.place, ctx.count = block, place, len(trained)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        (dy,) = grads
        block: BaseBlock = ctx.block
        x, *saved = ctx.saved_tensors
        trained, kept = saved[: ctx.count], tuple(saved[ctx.count :])
        x = x.detach().requires_grad_(ctx.needs_input_grad[3])
        with torch.enable_grad():
            inner, residual = block.middle(x, replace(ctx.place, kept=[kept]) if kept else ctx.place)
            h = block.mlp.hidden(inner)
        dh, of_last = _last_gradients(block.mlp.output, h, dy)
        ends = [
            (t, d) for t, d in ((h, dh), (residual, dy * block.alpha if block.alpha != 1 else dy)) if t.requires_grad
        ]
        inputs = [t for t in (x, *trained) if t.requires_grad and id(t) not in of_last]
        found = {}
        if ends and inputs:
            outputs, into = zip(*ends, strict=True)
            grads = torch.autograd.grad(outputs, inputs, into, allow_unused=True)
            found = {id(t): d for t, d in zip(inputs, grads, strict=True)}
        found |= of_last
        return None, None, None, *(found.get(id(t)) for t in (x, *trained))


def _last_gradients(last: nn.Module, h: Tensor, dy: Tensor) -> tuple[Tensor | None, dict[int, Tensor]]:
    """dh, if it is wanted, and the gradients of the trained parameters of a linear y = last(h), by their ids; y is not made."""
    if isinstance(last, nn.Linear) and last.weight.requires_grad:
        found = {id(last.weight): dy.T @ h.detach()}
        if last.bias is not None:
            found[id(last.bias)] = dy.sum(0)
        return dy @ last.weight if h.requires_grad else None, found
    part = projection(last)
    dh, trained = lora_linear_group_gradients(h.detach(), [part], [dy], h.requires_grad)
    if part.adapter is None:
        return dh, {}
    return dh, {id(t): d for t, d in zip(part.adapter[:2], trained, strict=True) if d is not None}
