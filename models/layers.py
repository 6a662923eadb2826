"""The layers that the families share.

Modules and parameters have the names of the checkpoint, so that loading needs no map and adapter keys are PEFT's.

Letters, here and in the kernels:
    T  tokens of a flat stream          D  width (hidden_size)          H  query heads
    S  documents in it                  F  width of the MLP             G  key/value heads
    M  tokens that have a target        V  vocabulary                   E  head size
    K, N  inputs and outputs of a linear, whose weight W is [N, K]      R  rank of an adapter
    P  elements of a head that rotate

Words:
    stream        documents laid end to end, without padding (varlen, packing)
    cu_seqlens    their bounds [S + 1], cumulative sequence lengths
    prefix_lens   of a prefix LM, how many first tokens of a document see each other
    target_index  where in the stream a token is to be predicted
    adapter       A [R, K] and B [N, R] beside a frozen W
    shrink        S = x A^T, K numbers a token to R        (vLLM's lora_shrink; Punica)
    expand        S B^T, R numbers a token to N            (lora_expand)
    fused         several linears of one input in one operation, their weights packed in one storage
    stored dtype  what a weight has in memory              compute dtype  what products are made in
    accum dtype   what sums are kept in: fp32, fp64 for fp64
    recompute     activation checkpointing: the forward of a block again, in the backward
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.kernels.frozen_linear import FEW_ROWS, frozen_linear
from minilora.kernels.lora_linear import lora_linear_group
from minilora.kernels.lora_mlp import lora_mlp
from minilora.kernels.projection import Projection
from minilora.kernels.quantized import QuantizedWeight
from minilora.kernels.rms_norm import add_rms_norm, rms_norm
from minilora.kernels.rope import rope, rope_pair
from minilora.kernels.swiglu import swiglu, swiglu_fused

from .config import Config
from .int8 import Int8Part
from .stream import Context


class Adapted(nn.Module):
    """What a method of fine-tuning puts in the place of the module `base`: its own parameters are those not under base.

    The kernels take a linear's projection(), which may be fused with others; None where it computes more than that.
    """

    output_needed = True  # False while recompute.py runs a block again whose output nobody reads
    merges: tuple[str, ...] = ()  # parameters of base that merged() gives anew, so that base alone computes the same

    def __init_subclass__(cls) -> None:  # a DoRALinear(LoRALinear) would inherit one that leaves out what it adds
        if "projection" not in vars(cls):
            raise TypeError(f"{cls.__name__} must define its own projection()")

    def projection(self) -> Projection | None:
        raise NotImplementedError

    def merged(self, name: str, stored: Tensor, rows: slice = slice(None)) -> Tensor:
        """A parameter of base, or rows of it, with what was trained in it; `stored` is base's own, as the model or a file has it."""
        raise NotImplementedError


class Linear(nn.Linear):
    """A linear whose weight may be stored in another dtype than x has; x [T, K] -> [T, N] in the dtype of x."""

    output_needed = True  # False while recompute.py runs a block again whose output nobody reads

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() and isinstance(self.weight, Tensor):
            return frozen_linear(x, self.weight, self.bias)
        if self.output_needed and self.weight.dtype == x.dtype:
            return super().forward(x)
        if self.weight.requires_grad and self.output_needed:
            return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        if self.weight.requires_grad:
            return _WithoutOutput.apply(x, self.weight, self.bias)  # pyright: ignore[reportReturnType]
        return lora_linear_group(x, [Projection(self.weight, self.bias)], self.output_needed)[0]


class _WithoutOutput(torch.autograd.Function):
    """A trained linear whose product is not made: uninitialised memory, and the gradients of the real one."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_empty(x.shape[0], weight.shape[0])

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (dy,), (x, weight) = grads, ctx.saved_tensors
        needs_x, _, needs_bias = ctx.needs_input_grad
        return dy @ weight if needs_x else None, dy.T @ x, dy.sum(0) if needs_bias else None


class RMSNorm(nn.Module):
    round_once = False  # round only the product with the weight, not the normalised row before it

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.to(x.dtype), self.eps, round_once=self.round_once)

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and that sum."""
        return add_rms_norm(x, residual, self.weight.to(x.dtype), self.eps, round_once=self.round_once)


class LayerNorm(nn.LayerNorm):
    """torch's, where x may have another dtype than the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def projections(*linears: nn.Module) -> list[Projection] | None:
    """Linears of one input for a fused kernel, frozen or with an adapter; None if one is trained or another class."""
    for linear in linears:
        frozen = type(linear) in (Linear, nn.Linear) and not linear.weight.requires_grad
        if not frozen and not isinstance(linear, Adapted):
            return None
    found = [projection(linear) for linear in linears]
    return cast(list[Projection], found) if all(found) else None


def each(x: Tensor, *linears: nn.Module) -> Sequence[Tensor]:
    """The outputs of linears of the same x [T, K] that are not fused."""
    first = linears[0]
    if isinstance(first, Int8Part):
        return first.whole(x).split_with_sizes(first.whole.sizes, -1)
    return [linear(x) for linear in linears]


def pack_weights(model: nn.Module) -> None:
    """Allocate linears of one input (q/k/v, gate/up) contiguously, so that one GEMM reads them all.

    Modules name them in `packed_modules`. Call it before loading: parameters keep names and shapes, but not values.
    Quantised weights stay where they are: one product widens them into one storage.
    """
    for module in list(model.modules()):
        linears = [cast(nn.Linear, module.get_submodule(name)) for name in getattr(module, "packed_modules", ())]
        if linears and not any(isinstance(linear.weight, QuantizedWeight) for linear in linears):
            heights = [linear.out_features for linear in linears]
            whole = linears[0].weight.detach().new_empty(sum(heights), linears[0].in_features)
            for linear, part in zip(linears, whole.split(heights), strict=True):
                linear.weight = nn.Parameter(part, requires_grad=linear.weight.requires_grad)


def projection(linear: nn.Module) -> Projection | None:
    """A linear as the kernels see it; None if they cannot."""
    return (
        Projection(linear.weight, linear.bias) if isinstance(linear, nn.Linear) else cast(Adapted, linear).projection()
    )


def rotated(q: Tensor, k: Tensor, context: Context, interleaved: bool) -> tuple[Tensor, ...]:
    """q [T, H, E] and k [T, G, E] rotated by their positions; in one call where a copy costs less than a second one."""
    if q.shape[0] > FEW_ROWS:
        return rope_pair(q, k, context.cos, context.sin, interleaved)
    both = rope(torch.cat((q, k), dim=1), context.cos, context.sin, interleaved)
    return both.split((q.shape[1], k.shape[1]), dim=1)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; qkv bias and qk norm as the family has them."""

    packed_modules = ("q_proj", "k_proj", "v_proj")

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.layer, self.head_size, self.window = layer, c.head_size, c.window(layer)
        self.interleaved = c.interleaved
        self.q_proj = Linear(c.width, c.heads * c.head_size, bias=c.qkv_bias)
        self.k_proj = Linear(c.width, c.kv_heads * c.head_size, bias=c.qkv_bias)
        self.v_proj = Linear(c.width, c.kv_heads * c.head_size, bias=c.qkv_bias)
        self.o_proj = Linear(c.heads * c.head_size, c.width, bias=False)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_size, c.eps)
            self.k_norm = RMSNorm(c.head_size, c.eps)
        self.qk_norm = c.qk_norm

    def forward(self, x: Tensor, context: Context) -> Tensor:
        linears = self.q_proj, self.k_proj, self.v_proj
        fused = projections(*linears)
        qkv = lora_linear_group(x, fused) if fused else each(x, *linears)
        q, k, v = (y.unflatten(-1, (-1, self.head_size)) for y in qkv)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotated(q, k, context, self.interleaved)
        return self.o_proj(context.attend(self.layer, q, k, v, self.window).flatten(-2))


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer, 2020): x [T, D] -> [T, D]. A subclass names its linears."""

    gate_up: tuple[str, ...]  # gate and up, or one that is both, the gate's rows first
    down: str

    def __init__(self, c: Config):
        super().__init__()
        for name in sorted(self.gate_up):  # the order of the checkpoints
            self.add_module(name, Linear(c.width, 2 * c.ffn // len(self.gate_up), bias=False))
        self.add_module(self.down, Linear(c.ffn, c.width, bias=False))

    @property
    def packed_modules(self) -> tuple[str, ...]:
        return self.gate_up if len(self.gate_up) > 1 else ()

    def forward(self, x: Tensor) -> Tensor:
        first, last = [getattr(self, name) for name in self.gate_up], getattr(self, self.down)
        if fused := projections(*first, last):
            return lora_mlp(x, fused[:-1], fused[-1], getattr(last, "output_needed", True))
        gu = each(x, *first)
        return last(swiglu(*gu) if len(gu) == 2 else swiglu_fused(*gu))


class MLP(GatedMLP):
    gate_up, down = ("gate_proj", "up_proj"), "down_proj"


class GateUpMLP(GatedMLP):
    gate_up, down = ("gate_up_proj",), "down_proj"


class Block(nn.Module):
    """A pre-norm transformer block (Qwen2, Qwen3, GLM): x [T, D] -> [T, D].

    a = x + Attention(RMSNorm(x))        y = a + MLP(RMSNorm(a))
    """

    def __init__(self, c: Config, layer: int, mlp: type[nn.Module], attention: Callable[..., nn.Module] = Attention):
        super().__init__()
        # its output is added to the residual; recompute.py does not compute it again
        self.last_linear = f"mlp.{getattr(mlp, 'last_linear', 'down_proj')}"
        self.input_layernorm = RMSNorm(c.width, c.eps)
        self.self_attn = attention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.width, c.eps)
        self.mlp = mlp(c)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        h, x = self.post_attention_layernorm.of_sum(self.self_attn(self.input_layernorm(x), context), x)
        return x + self.mlp(h)
