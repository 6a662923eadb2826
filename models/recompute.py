"""Activation checkpointing of a block (Chen et al., 2016): keep its input, compute the rest again in the backward.

The backward never reads the block's output, which is a residual plus the output of the block's last linear. So that
product, 29 % of the GEMMs of a Qwen2.5-7B block, is not made again: the linear records its node and returns
uninitialised memory. S of every adapter, R numbers a token, is kept (kernels/kept.py). With `keep_attention` the output
of attention is kept too, [T, H, E] and one number a query, and its forward is skipped. With an Offload (offload.py) the
input waits in host memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from minilora.kernels.dispatch import once_differentiable
from minilora.kernels.kept import giving, keeping

from .layers import Adapted, Linear
from .moe import ExpertLinear
from .offload import Offload
from .stream import Context


def recomputed(
    block: nn.Module, x: Tensor, context: Context, keep_attention: bool, offload: Offload | None = None
) -> Tensor:
    """block(x, context) for x [T, D], keeping only x and every S (and the output of attention) for the backward."""
    past = context.documents.past
    trained = [p for p in (*block.parameters(), *(past.layers if past else ())) if p.requires_grad]
    if not trained and not x.requires_grad:  # nothing is kept of it
        return block(x, context)
    return _Recomputed.apply(block, context, keep_attention, offload, x, *trained)  # pyright: ignore[reportReturnType]


@contextmanager
def _without_last_product(block: nn.Module) -> Iterator[None]:
    """The block does not make the product of its last linear, where it is one that can leave it out."""
    name = getattr(block, "last_linear", None)
    last = block.get_submodule(name) if name else None
    if not isinstance(last, (Linear, Adapted, ExpertLinear)):
        yield
        return
    last.output_needed = False
    try:
        yield
    finally:
        last.output_needed = True


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        block: nn.Module,
        context: Context,
        keep_attention: bool,
        offload: Offload | None,
        x: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        saved: list[tuple[Tensor, Tensor | None]] = []
        shrunk: list[Tensor] = []
        ctx.offload, ctx.number = offload, None if offload is None else offload.keep(x)
        with keeping(shrunk):
            y = block(x, replace(context, saved_attention=saved) if keep_attention else context)
        attended = [t for pair in saved for t in pair]
        ctx.save_for_backward(x if offload is None else None, *trained, *shrunk, *attended)
        ctx.block, ctx.context, ctx.counts = block, context, (len(trained), len(shrunk))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        x, *saved = ctx.saved_tensors
        trained, (some, more) = saved[: ctx.counts[0]], ctx.counts
        shrunk, attended = saved[some : some + more], tuple(saved[some + more :])
        x = (x if ctx.offload is None else ctx.offload.fetch(ctx.number)).detach()
        x.requires_grad_(ctx.needs_input_grad[4])
        with torch.enable_grad(), giving(shrunk), _without_last_product(ctx.block):
            y = ctx.block(x, replace(ctx.context, saved_attention=[attended]) if attended else ctx.context)
        inputs = [t for t in (x, *trained) if t.requires_grad]
        found = iter(torch.autograd.grad(y, inputs, grads, allow_unused=True))
        return None, None, None, None, *(next(found) if t.requires_grad else None for t in (x, *trained))
