"""PiSSA: adapters that start as the principal part of W (Meng et al., 2024, arXiv 2404.02948).

    W = U S V^T        B0 = U_R sqrt(S_R / scale)    A0 = sqrt(S_R / scale) V_R^T        y = W x + scale (B A - B0 A0) x

The paper takes B0 A0 out of W. Here W stays as it is and the product is that of an adapter of rank 2R whose second half,
-B0 and A0, is frozen. That is the same function without rounding the rest of W to 16 bits; the base is the one that the
folder names, and what is saved is plain LoRA of rank 2R, as PEFT writes it with path_initial_model_for_weight_conversion.
"""

from typing import cast

import torch
from torch import Tensor, nn

from minilora.kernels.dropout import DEFAULT_KEY
from minilora.kernels.projection import Adapter, Projection
from minilora.kernels.quantized import weight_as

from ..errors import UsageError
from ..lora import LoRALinear, adapters
from .low_rank import low_rank


class PiSSALinear(LoRALinear):
    """A frozen linear and an adapter that moves its principal part: x [T, in] -> [T, out]."""

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0, rslora: bool = False):
        if dropout:
            what = (
                "--lora-init pissa with --lora-dropout: the part of W that the adapter stands for would be dropped too"
            )
            raise UsageError(what, "Leave the dropout out.")
        super().__init__(base, r, alpha, dropout, rslora)
        self.register_buffer("start_A", torch.zeros_like(self.lora_A, requires_grad=False))
        self.register_buffer("start_B", torch.zeros_like(self.lora_B, requires_grad=False))
        self.start_A: Tensor
        self.start_B: Tensor

    def factors(self) -> tuple[Tensor, Tensor]:
        return torch.cat((self.lora_A, self.start_A)), torch.cat((self.lora_B, -self.start_B), dim=1)

    def projection(self) -> Projection:
        return Projection(self.base.weight, self.base.bias, Adapter(*self.factors(), self.scale, 0.0, DEFAULT_KEY))


@torch.no_grad()
def pissa_init(model: nn.Module) -> None:
    """Set A and B of every PiSSALinear of a model, and what it starts from; one weight at a time is widened to fp32.

    Where W has a lower rank than the adapter, the rest of A stays as it was drawn, with B zero.
    """
    for _, wrapper in adapters(model):
        part = cast(PiSSALinear, wrapper)
        wide = weight_as(part.base.weight, torch.promote_types(part.base.weight.dtype, torch.float32)).detach()
        b, a = low_rank(wide, part.r)
        part.lora_B[:, : b.shape[1]] = b / part.scale**0.5
        part.lora_A[: a.shape[0]] = a / part.scale**0.5
        part.start_A.copy_(part.lora_A)
        part.start_B.copy_(part.lora_B)
