"""Activation checkpointing of a block (Chen et al., 2016): keep its input, compute the rest again in the backward.

The backward never reads the block's output, which is a residual plus the output of the block's last linear. So that
product, 29 % of the GEMMs of a Qwen2.5-7B block, is not made again: the linear records its node and returns
uninitialised memory. S of every adapter, R numbers a token, is kept (kernels/kept.py). With `keep_attention` the output
of attention is kept too, [T, H, E] and one number a query, and its forward is skipped.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minilora.kernels.dispatch import once_differentiable
from minilora.kernels.kept import giving, keeping

from .layers import Adapted, Linear
from .stream import Context


def recomputed(block: nn.Module, x: Tensor, context: Context, keep_attention: bool) -> Tensor:
    """block(x, context) for x [T, D], keeping only x and every S (and the output of attention) for the backward."""
    name = getattr(block, "last_linear", None)
    last = block.get_submodule(name) if name else None
    if not isinstance(last, (Linear, Adapted)):  # no such linear, or of another class: all is computed again
        return checkpoint(block, x, context, use_reentrant=False, preserve_rng_state=False)
    trained = [p for p in block.parameters() if p.requires_grad]
    return _Recomputed.apply(block, last, context, keep_attention, x, *trained)  # pyright: ignore[reportReturnType]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        block: nn.Module,
        last: Linear | Adapted,
        context: Context,
        keep_attention: bool,
        x: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        saved: list[tuple[Tensor, Tensor | None]] = []
        shrunk: list[Tensor] = []
        with keeping(shrunk):
            y = block(x, replace(context, saved_attention=saved) if keep_attention else context)
        ctx.save_for_backward(x, *trained, *shrunk, *(t for pair in saved for t in pair))
        ctx.block, ctx.last, ctx.context, ctx.counts = block, last, context, (len(trained), len(shrunk))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        x, *saved = ctx.saved_tensors
        trained, (some, more) = saved[: ctx.counts[0]], ctx.counts
        shrunk, attended = saved[some : some + more], tuple(saved[some + more :])
        x = x.detach().requires_grad_(ctx.needs_input_grad[4])
        ctx.last.output_needed = False
        try:
            with torch.enable_grad(), giving(shrunk):
                y = ctx.block(x, replace(ctx.context, saved_attention=[attended]) if attended else ctx.context)
        finally:
            ctx.last.output_needed = True
        inputs = [t for t in (x, *trained) if t.requires_grad]
        found = iter(torch.autograd.grad(y, inputs, grads, allow_unused=True))
        return None, None, None, None, *(next(found) if t.requires_grad else None for t in (x, *trained))
