"""PiSSA: adapters that start as the principal part of W (Meng et al., 2024, arXiv 2404.02948).

    W = U S V^T        B0 = U_R sqrt(S_R / scale)    A0 = sqrt(S_R / scale) V_R^T        y = W x + scale (B A - B0 A0) x

The paper takes B0 A0 out of W. Here W stays as it is and the product is that of an adapter of rank 2R whose second half,
-B0 and A0, is frozen. That is the same function without rounding the rest of W to 16 bits; the base is the one that the
folder names, and what is saved is plain LoRA of rank 2R, as PEFT writes it with path_initial_model_for_weight_conversion.
A folder that PEFT saved without it holds B and A alone; from W, B0 A0 is found again, but not where it began by the random
SVD of `pissa_niter_N`.
"""

import torch
from torch import Tensor, nn

from minilora.kernels.dropout import DEFAULT_KEY
from minilora.kernels.projection import Adapter, Projection
from minilora.kernels.quantized import weight_as

from ..errors import UsageError
from ..lora import Base, LoRALinear, adapters
from .dora import require_linear
from .low_rank import low_rank


class PiSSALinear(LoRALinear):
    """A frozen linear and an adapter that moves its principal part: x [T, in] -> [T, out]."""

    def __init__(
        self, base: Base, r: int, alpha: float, dropout: float = 0.0, rslora: bool = False, shared: bool = False
    ):
        if dropout:
            what = (
                "--lora-init pissa with --lora-dropout: the part of W that the adapter stands for would be dropped too"
            )
            raise UsageError(what, "Leave the dropout out.")
        super().__init__(base, r, alpha, dropout, rslora, shared)
        require_linear(base, "--lora-init pissa")
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
    """Set A and B of every PiSSALinear of a model to what it starts from.

    Where W has a lower rank than the adapter, the rest of A stays as it was drawn, with B zero.
    """
    set_starts(model)
    for part in _parts(model):
        found = part.start_A.any(dim=1)
        part.lora_A[found] = part.start_A[found]
        part.lora_B.copy_(part.start_B)


@torch.no_grad()
def set_starts(model: nn.Module) -> None:
    """Set A0 and B0 of every PiSSALinear; one weight at a time is widened to fp32."""
    for part in _parts(model):
        weight = part.base.weight
        b, a = low_rank(weight_as(weight, torch.promote_types(weight.dtype, torch.float32)).detach(), part.r)
        part.start_A[: len(a)] = a / part.scale**0.5
        part.start_B[:, : len(a)] = b / part.scale**0.5


def _parts(model: nn.Module) -> list[PiSSALinear]:
    return [wrapper for _, wrapper in adapters(model) if isinstance(wrapper, PiSSALinear)]
