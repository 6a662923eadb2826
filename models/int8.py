"""A model's frozen linears in int8, to answer on a CPU: a quarter of fp32's bytes, and the CPU's int8 instructions.

    y = s_x s_w (round(x / s_x) round(W / s_w)^T) + b

Weights are rounded once, with one scale s_w for each output channel; x when it comes, with one scale s_x for each
token. The product is torch's dynamic int8 linear. There is no gradient.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from minilora.kernels.quantized import weight_as

if TYPE_CHECKING:
    from .decoder import Decoder


# torch has a least scale of x (QuantUtils.h, SMALL_SCALE_THRESHOLD): x is multiplied by this, weights are divided by it
LIFT = 4096.0


class Int8Linear(nn.Module):
    """Linears of one input in int8: x [T, K] in fp32 -> y_j [T, N_j] each; weights are rounded to -levels .. levels."""

    def __init__(self, linears: list[nn.Linear]):
        super().__init__()
        self.sizes = [linear.out_features for linear in linears]
        self.in_features, self.out_features = linears[0].in_features, sum(self.sizes)
        self.packed = packed(torch.cat([weight_as(linear.weight, torch.float32) for linear in linears]))
        biases = [
            torch.zeros(n) if linear.bias is None else linear.bias.float()
            for n, linear in zip(self.sizes, linears, strict=True)
        ]
        self.bias = torch.cat(biases) if any(linear.bias is not None for linear in linears) else None

    def forward(self, x: Tensor) -> Tensor:
        y = int8_product(x, self.packed)
        return y if self.bias is None else y.add_(self.bias)


class Int8Part(nn.Module):
    """One of the linears of an Int8Linear under its own name; `layers.each` asks for all of them at once."""

    def __init__(self, whole: Int8Linear, number: int):
        super().__init__()
        self.whole, self.number = whole, number
        self.in_features, self.out_features = whole.in_features, whole.sizes[number]

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(x).split(self.whole.sizes, dim=-1)[self.number]


def levels() -> int:
    """The largest weight: without VNNI two products of a byte are added in 16 bits, where 2 * 255 * 63 still fits."""
    return 127 if torch.cpu._is_vnni_supported() else 63


def packed(weight: Tensor) -> torch.ScriptObject:
    """A weight [N, K] rounded to int8 by rows, in the order that torch's int8 product reads."""
    wide = weight.detach().float() / LIFT
    scale = torch.maximum(wide.amax(1), -wide.amin(1)).clamp(min=1e-34) / levels()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.quantize_per")  # its tensors will go, its products stay
        q = torch.quantize_per_channel(wide, scale, torch.zeros(len(scale), dtype=torch.long), 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(q, None)


def int8_product(x: Tensor, packed: torch.ScriptObject) -> Tensor:
    """x W^T [T, N] in fp32 for x [T, K] of any dtype."""
    x = x.float()
    if x.shape[0] == 1:
        return torch.ops.quantized.linear_dynamic(x * LIFT, packed, False)
    scale = x.abs().amax(-1, keepdim=True).clamp_(min=1e-30)  # torch has one scale a call
    return torch.ops.quantized.linear_dynamic(x / scale, packed, False).mul_(scale * LIFT)


def to_int8(model: Decoder) -> None:
    """Put every linear of a frozen model without adapters into int8, in place; it computes in fp32 beside them.

    The embedding stays as it is, and so does the head's weight, which products do not read any more.
    """
    for module in list(model.modules()):
        names = getattr(module, "packed_modules", ())
        if names:
            whole = Int8Linear([cast(nn.Linear, getattr(module, name)) for name in names])
            for number, name in enumerate(names):
                setattr(module, name, Int8Part(whole, number))
    for block in model.blocks:
        for module in list(block.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, Int8Linear([child]))
    for p in [p for module in (*model.blocks, model.norm) for p in module.parameters()]:
        p.data = p.data.float()  # of the norms: widened once, not for each token
    model.int8_head = packed(model.head)
    model.compute = torch.float32
