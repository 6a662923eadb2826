"""Weights in int8, each row with a scale of its own (the vector-wise absmax of LLM.int8: Dettmers et al., 2022): 8
bits a weight.

    W[n, k] = code[n, k] * absmax[n] / 127

Codes and absmax are those of bitsandbytes 0.50's int8_vectorwise_quant, bit for bit. LLM.int8 also rounds x to 8
bits, and for that keeps columns of x with outliers in 16 bits. Here x stays in the compute dtype, so that it has no
outliers to look after.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minilora.kernels.quantized import QuantizedWeight, piece_of, piece_starts

LEVELS = 127


class Int8Weight(QuantizedWeight):
    """codes [N, K] int8 and absmax [N] fp32."""

    name = "int8"
    parts = ("codes", "absmax")
    absmax: Tensor

    def __init__(self, codes: Tensor, absmax: Tensor):
        super().__init__((codes.shape[0], codes.shape[1]))
        assert codes.dtype == torch.int8 and absmax.shape == codes.shape[:1], (codes.dtype, codes.shape, absmax.shape)
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)

    @classmethod
    def empty(cls, shape: Sequence[int], device: torch.device | str = "cpu") -> "Int8Weight":
        n, k = shape
        return cls(torch.empty(n, k, dtype=torch.int8, device=device), torch.empty(n, device=device))

    @classmethod
    def of(cls, weight: Tensor) -> "Int8Weight":
        return quantize(weight)

    def fill(self, out: Tensor, start: int) -> None:
        scales = (self.absmax * (1 / LEVELS))[:, None]
        step = max(1, piece_of(out.device, self.numel()) // self.shape[1])
        wide = torch.empty((min(step, len(out)), self.shape[1]), device=out.device)
        for begin in piece_starts(0, len(out), step, out):
            piece = out[begin : begin + step]
            rows = slice(start + begin, start + begin + len(piece))
            piece.copy_(wide[: len(piece)].copy_(self.codes[rows]).mul_(scales[rows]))


def dequantize_ref(weight: Int8Weight) -> Tensor:
    """The specification: W [N, K] in fp32."""
    return weight.codes.float() * (weight.absmax * (1 / LEVELS))[:, None]


def quantize(weight: Tensor) -> Int8Weight:
    """A weight [N, K] of any floating-point dtype in int8 by rows; a row of zeros stays one."""
    absmax = weight.detach().abs().amax(1).float()
    factor = (LEVELS / absmax).masked_fill_(absmax == 0, 0)
    return Int8Weight(torch.round(weight.detach().float() * factor[:, None]).to(torch.int8), absmax)
