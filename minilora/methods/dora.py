"""DoRA: direction by LoRA, magnitude by itself (Liu et al., 2024, arXiv 2402.09353).

    V = W + scale * B A        y = m / ||V|| * V x + b        m [N], trained, starts as ||W||; norms are those of rows

The norm counts as a constant in the backward pass, as in section 4.3 of the paper and in PEFT. V is never made:

    ||V_i||^2 = ||W_i||^2 + 2 scale B_i (W A^T)_i + scale^2 B_i (A A^T) B_i^T

The first term never changes and is kept in fp64. With dropout, W x of the kept values and of the dropped ones are two
products, as PEFT's formula drops x in all but W x: y = W (x - d) + m / ||V|| * (W d + scale * B A d) + b, d = dropout(x).

Slower than LoRA: the linears of one input are products of their own (fused kernels have no factor for a row of W), and
each forward pass reads W once more for W A^T; while answering, the norms of the last one are kept.
"""

import torch
from torch import Tensor, nn

from minilora.kernels.dropout import dropout
from minilora.kernels.frozen_linear import frozen_linear
from minilora.kernels.lora_linear import lora_linear_group
from minilora.kernels.projection import Adapter, Projection
from minilora.kernels.quantized import Weight, weight_as

from ..errors import UsageError
from ..lora import Base, LoRALinear

ROWS = 4096  # of W that are widened to fp64 at once


class DoRALinear(LoRALinear):
    """A frozen linear whose rows have a trained length, and a direction that an adapter trains: x [T, in] -> [T, out]."""

    def __init__(
        self, base: Base, r: int, alpha: float, dropout: float = 0.0, rslora: bool = False, shared: bool = False
    ):
        super().__init__(base, r, alpha, dropout, rslora, shared)
        require_linear(base, "--method dora")
        self.register_buffer("squares", _squares(base.weight), persistent=False)
        self.squares: Tensor
        self.lora_magnitude_vector = nn.Parameter(self.squares.sqrt().to(self.lora_A.dtype))
        self._known: tuple[object, Tensor] | None = None

    def projection(self) -> None:
        """None: y is more than a Projection says."""

    def product(self) -> Projection:
        """V x, without the lengths, the bias and dropout."""
        return Projection(self.base.weight, None, Adapter(self.lora_A, self.lora_B, self.scale))

    @torch.no_grad()
    def norms(self, dtype: torch.dtype) -> Tensor:
        """||V|| [out] in fp64, from a product in dtype."""
        kept = not self.training and not self.lora_A.is_inference()  # whether a change of A or B would be seen
        key = (dtype, self.lora_A.device, self.lora_A._version, self.lora_B._version) if kept else None
        if kept and self._known is not None and self._known[0] == key:
            return self._known[1]
        a, b = self.lora_A.double(), self.lora_B.double()
        across = (b * frozen_linear(self.lora_A.to(dtype), self.base.weight).T).sum(1)
        found = self.squares + 2 * self.scale * across + self.scale**2 * (b @ (a @ a.T) * b).sum(1)
        found = found.clamp_(min=0).sqrt_()
        self._known = (key, found) if kept else None
        return found

    def forward(self, x: Tensor) -> Tensor:
        length = (self.lora_magnitude_vector / self.norms(x.dtype)).to(x.dtype)
        bias = None if self.base.bias is None else self.base.bias.to(x.dtype)
        if not self.training or not self.dropout:
            y = lora_linear_group(x, [self.product()])[0] * length
            return y if bias is None else y + bias
        kept = dropout(x, self.dropout, self.keys.of(self.number))
        (rest,) = lora_linear_group(x - kept, [Projection(self.base.weight, bias)])
        return torch.addcmul(rest, lora_linear_group(kept, [self.product()])[0], length)

    def merged(self, name: str, stored: Tensor, rows: slice = slice(None)) -> Tensor:
        """m / ||V|| * V, computed in fp32 (fp64 for W in fp64) and rounded once to the dtype of W."""
        wide = torch.promote_types(stored.dtype, torch.float32)
        v = stored.to(self.lora_A.device, wide) + self.scale * self.lora_B.detach()[rows].to(
            wide
        ) @ self.lora_A.detach().to(wide)
        lengths = self.lora_magnitude_vector.detach()[rows].to(wide) / torch.linalg.vector_norm(v, dim=1)
        return (v * lengths[:, None]).to(stored.dtype)


def _squares(weight: Weight) -> Tensor:
    """||W||^2 of each row [N], fp64."""
    parts = [slice(start, start + ROWS) for start in range(0, weight.shape[0], ROWS)]
    return torch.cat([weight_as(weight, torch.float64, rows).detach().square().sum(1) for rows in parts])


def require_linear(base: Base, flag: str) -> None:
    """UsageError for the experts of a mixture, which plain LoRA alone goes on."""
    if not isinstance(base, nn.Linear):
        raise UsageError(
            f"{flag} does not go on experts", "Leave it out: plain LoRA does; or give --lora-targets attention."
        )
