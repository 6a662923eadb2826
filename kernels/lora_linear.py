"""Linear layer with a low-rank adapter on a frozen weight (LoRA: Hu et al., 2021).

    y = x W^T + b + s * (dropout(x) A^T) B^T        x [T, K], W [N, K], b [N], A [R, K], B [N, R] -> y [T, N]

x is read in its own dtype and never copied to fp32: A and B, which are kept in fp32, are cast instead. With S = dropout(x) A^T
[T, R], which is saved with x, and dS = s * dY B:

    dX = dY W + mask(dS A)        dA = dS^T dropout(x)        dB = s * dY^T S

W and b are frozen and get no gradient. It is the group of one: how it is computed stands in lora_linear_group.
"""

import torch
from torch import Tensor

from minilora.kernels import lora_linear_group as group
from minilora.kernels.dropout import NO_DROPOUT, DropoutKey
from minilora.kernels.projection import Adapter, Projection


def lora_linear_ref(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float,
    p: float = 0.0, key: DropoutKey = NO_DROPOUT,
) -> Tensor:  # fmt: skip
    """The specification, term by term."""
    (y,) = group.lora_linear_group_ref(x, [Projection(w, bias, Adapter(a, b, scale, p, key))])
    return y


def lora_linear(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float,
    p: float = 0.0, key: DropoutKey = NO_DROPOUT,
) -> Tensor:  # fmt: skip
    """F.linear(x, w, bias) + scale * (dropout(x) A^T) B^T for x [T, K]; p is the dropout rate, key its mask's name."""
    (y,) = group.lora_linear_group(x, [Projection(w, bias, Adapter(a, b, scale, p, key))])
    return y


def example(tokens: int, k: int, n: int, r: int, dtype: torch.dtype, device: str = "cpu") -> tuple[tuple, dict]:
    """Arguments of one call, and the flops and bytes that a perfect forward and backward need."""
    (x, [(w, bias, adapter)]), cost = group.example(tokens, k, (n,), r, dtype, device)
    assert adapter is not None
    return (x, w, bias, adapter.a, adapter.b, adapter.scale), cost
