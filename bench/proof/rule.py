"""The rule of every check against fp64: an operation may be as wrong as the plain torch that it replaces, twice over, and no more."""

import torch
from torch import Tensor


def allowed(plain: Tensor, truth: Tensor, scale: float = 0.0) -> float:
    """How far from truth [...] in fp64 a value may lie, by the error of plain [...], the same operation in plain torch.

    scale is what the values are made from, if more than they reach. fp64 itself has no wider truth: 1e-12 of the scale.
    """
    scale = max(scale, float(truth.abs().max()))
    if plain.dtype == torch.float64:
        return 1e-12 * scale
    return 2 * distance(plain, truth) + 1e-6 * scale


def distance(found: Tensor, truth: Tensor) -> float:
    """The largest difference; NaN counts as one."""
    return float((found.double() - truth).abs().max())
