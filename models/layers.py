"""The layers that the families share. Names of modules and parameters are the checkpoint's: loading needs no map, and adapter
keys are PEFT's.

Letters: T tokens of the flat stream, D width, H query heads, G key/value heads, E head size, F ffn width, V vocabulary.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.kernels.frozen_linear import FEW_ROWS, frozen_linear
from minilora.kernels.lora_linear_group import lora_linear_group
from minilora.kernels.lora_swiglu import lora_swiglu
from minilora.kernels.projection import Projection
from minilora.kernels.rms_norm import add_rms_norm, rms_norm
from minilora.kernels.rope import rope
from minilora.kernels.swiglu import swiglu, swiglu_fused

from .config import Config
from .int8 import Int8Part
from .place import Place


class Adapted(nn.Module):
    """A linear that comes with an adapter."""

    def projection(self) -> Projection:
        raise NotImplementedError


class Linear(nn.Linear):
    """A linear whose weight may be stored in another dtype than x has; x [T, K] -> [T, N] in the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return frozen_linear(x, self.weight, self.bias)
        if self.weight.dtype == x.dtype:
            return super().forward(x)
        return lora_linear_group(x, [projection(self)])[0]


class RMSNorm(nn.Module):
    once = False  # round the product with the weight alone, not the normalised row before it as well

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.to(x.dtype), self.eps, once=self.once)

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and that sum."""
        return add_rms_norm(x, residual, self.weight.to(x.dtype), self.eps, once=self.once)


class LayerNorm(nn.LayerNorm):
    """torch's, for x in another dtype than the weight's too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def project(x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
    """What each of several linears makes of the same x [T, K], in one operation that reads x once where all are `joint`."""
    if joint(*linears):
        return lora_linear_group(x, [projection(linear) for linear in linears])
    first = linears[0]
    if isinstance(first, Int8Part):
        return torch.split_with_sizes(first.whole(x), first.whole.sizes, -1)
    return tuple(linear(x) for linear in linears)


def gated(x: Tensor, gate: nn.Module, up: nn.Module) -> Tensor:
    """SwiGLU of two linears of x [T, K]; where no backward follows, gate and up are not even stored."""
    if joint(gate, up) and not torch.is_grad_enabled():
        return lora_swiglu(x, [projection(gate), projection(up)])
    return swiglu(*project(x, gate, up))


def gated_fused(x: Tensor, gate_up: nn.Module) -> Tensor:
    """The same of one linear that is both, the gate's rows first."""
    if joint(gate_up) and not torch.is_grad_enabled():
        return lora_swiglu(x, [projection(gate_up)])
    return swiglu_fused(gate_up(x))


def joint(*linears: nn.Module) -> bool:
    """Whether the kernels can take these linears: frozen ones and those with an adapter, not trained or foreign ones."""
    for linear in linears:
        frozen = type(linear) in (Linear, nn.Linear) and not linear.weight.requires_grad
        if not frozen and not isinstance(linear, Adapted):
            return False
    return True


def lay_together(model: nn.Module) -> None:
    """Give linears of one input one storage, their weights one behind the other, before a model is filled: what they hold is lost.

    Modules name them in `together`; parameters keep their names and shapes, and one GEMM can read them all.
    """
    for module in model.modules():
        linears = [cast(nn.Linear, module.get_submodule(name)) for name in getattr(module, "together", ())]
        if linears:
            heights = [linear.out_features for linear in linears]
            whole = linears[0].weight.detach().new_empty(sum(heights), linears[0].in_features)
            for linear, part in zip(linears, whole.split(heights), strict=True):
                linear.weight = nn.Parameter(part, requires_grad=linear.weight.requires_grad)


def projection(linear: nn.Module) -> Projection:
    """A linear as the kernels see it; one with an adapter says so itself."""
    return (
        Projection(linear.weight, linear.bias) if isinstance(linear, nn.Linear) else cast(Adapted, linear).projection()
    )


def rotated(q: Tensor, k: Tensor, place: Place, interleaved: bool) -> tuple[Tensor, ...]:
    """q [T, H, E] and k [T, G, E] turned to their places; in one call where a copy costs less than a second one."""
    if q.shape[0] > FEW_ROWS:
        return rope(q, place.cos, place.sin, interleaved), rope(k, place.cos, place.sin, interleaved)
    both = rope(torch.cat((q, k), dim=1), place.cos, place.sin, interleaved)
    return both.split((q.shape[1], k.shape[1]), dim=1)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; qkv bias and qk norm as the family has them."""

    together = ("q_proj", "k_proj", "v_proj")

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.layer, self.head_size, self.window = layer, c.head_size, c.windows[layer]
        self.interleaved = c.interleaved
        self.q_proj = Linear(c.width, c.heads * c.head_size, bias=c.qkv_bias)
        self.k_proj = Linear(c.width, c.kv_heads * c.head_size, bias=c.qkv_bias)
        self.v_proj = Linear(c.width, c.kv_heads * c.head_size, bias=c.qkv_bias)
        self.o_proj = Linear(c.heads * c.head_size, c.width, bias=False)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_size, c.eps)
            self.k_norm = RMSNorm(c.head_size, c.eps)
        self.qk_norm = c.qk_norm

    def forward(self, x: Tensor, place: Place) -> Tensor:
        qkv = project(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (y.unflatten(-1, (-1, self.head_size)) for y in qkv)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotated(q, k, place, self.interleaved)
        return self.o_proj(place.attend(self.layer, q, k, v, self.window).flatten(-2))


class FeedForward(nn.Module):
    """The MLP of a block: `hidden` makes [T, F] of x [T, D], one linear makes [T, D] of that; `last` is that linear's name."""

    last: str

    def hidden(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def output(self) -> nn.Module:
        return self.get_submodule(self.last)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.hidden(x))


class MLP(FeedForward):
    last = "down_proj"
    together = ("gate_proj", "up_proj")

    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = Linear(c.width, c.ffn, bias=False)
        self.up_proj = Linear(c.width, c.ffn, bias=False)
        self.down_proj = Linear(c.ffn, c.width, bias=False)

    def hidden(self, x: Tensor) -> Tensor:
        return gated(x, self.gate_proj, self.up_proj)


class GateUpMLP(FeedForward):
    """SwiGLU whose gate and up projections are one matrix, the gate's rows first."""

    last = "down_proj"

    def __init__(self, c: Config):
        super().__init__()
        self.gate_up_proj = Linear(c.width, 2 * c.ffn, bias=False)
        self.down_proj = Linear(c.ffn, c.width, bias=False)

    def hidden(self, x: Tensor) -> Tensor:
        return gated_fused(x, self.gate_up_proj)


class BaseBlock(nn.Module):
    """A transformer block that ends in y = mlp(x) + alpha * residual, so that its last linear is a block's last step.

    `middle` makes x and residual, both [T, D], of the block's input.
    """

    mlp: FeedForward
    alpha = 1.0

    def middle(self, x: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(self, x: Tensor, place: Place) -> Tensor:
        x, residual = self.middle(x, place)
        return torch.add(self.mlp(x), residual, alpha=self.alpha)
