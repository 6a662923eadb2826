"""Weights that one GEMM reads together.

Plain ones are views of one storage, one after the other, so that the module tree and its names stay as they are.
Quantised ones are widened into one storage for each product, or packed as codes.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from minilora.kernels.fp8_rows import FP8RowsWeight
from minilora.kernels.quantized import QuantizedWeight, Weight


def join(weights: Sequence[Tensor]) -> list[Tensor]:
    """Pack weights [N_j, K]: views of one new storage, which the caller puts in the place of the weights."""
    return list(torch.cat(list(weights)).split([w.shape[0] for w in weights]))


def joined(weights: Sequence[Tensor]) -> Tensor | None:
    """Packed weights [N_j, K] as one matrix [sum of N_j, K], a view; None if they are not packed.

    Rows may be further apart than K, and then are in what is returned.
    """
    first = weights[0]
    (height, k), dtype, start = first.shape, first.dtype, first.storage_offset()
    storage = first.untyped_storage()._cdata  # identifies the storage; that of a tensor without data has no address
    apart, inner = first.stride()
    if inner != 1 or apart < k:
        return None
    for w in weights[1:]:
        if w.storage_offset() != start + height * apart or w.untyped_storage()._cdata != storage:
            return None
        if w.dtype != dtype or w.shape[1] != k or w.stride() != first.stride():
            return None
        height += w.shape[0]
    return first.as_strided((height, k), (apart, 1))


def stacked(weights: Sequence[Weight]) -> Weight | None:
    """Weights [N_j, K] as one matrix [sum of N_j, K] where they are packed, or all are to be widened; else None."""
    plain = [w for w in weights if isinstance(w, Tensor)]
    rows = [w for w in weights if isinstance(w, FP8RowsWeight)]
    if len(plain) == len(weights):
        return joined(plain)
    if len(rows) == len(weights):  # one product of their codes, not a wide copy
        codes, scales = joined([w.codes for w in rows]), joined([w.scales for w in rows])
        return None if codes is None or scales is None else FP8RowsWeight(codes, scales)
    return None if plain else Stacked(cast(Sequence[QuantizedWeight], weights))


class Stacked(QuantizedWeight):
    """Weights [N_j, K] of one input, one above the other, for one product with all of them; none is copied."""

    def __init__(self, weights: Sequence[QuantizedWeight]):
        super().__init__((sum(w.shape[0] for w in weights), weights[0].shape[1]))
        self.codes, self.weights = weights[0].codes, weights

    def fill(self, out: Tensor, start: int) -> None:
        top = 0
        for weight in self.weights:
            first, last = max(start, top), min(start + len(out), top + weight.shape[0])
            if first < last:
                weight.write(out[first - start : last - start], first - top)
            top += weight.shape[0]
