"""The products of linears with adapters by the library's GEMM, the low-rank part added to what it wrote.

    y_j = x W_j^T + b_j, then += S_j (f_j B_j)^T        dX = sum over j of dY_j W_j, then += dS_j A_j

One GEMM makes all y_j where the weights are packed (packed.py). It makes dX too, of the dY_j copied side by side, where that
copy moves fewer bytes than adding up in dX does.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.kernels.frozen_linear import FEW_ROWS, add_input_gradient, frozen_linear
from minilora.kernels.packed import stacked
from minilora.kernels.projection import Projection
from minilora.kernels.quantized import Weight


def forward(x: Tensor, shrunk: Sequence[Tensor], projections: Sequence[Projection]) -> list[Tensor]:
    """y_j [T, N_j] for x [T, K] and the S_j [T, R_j] of the adapters."""
    ys: list[Tensor] = []
    for weight, bias, ns in base_products(projections, x.dtype):
        plain = weight.dtype == x.dtype and x.shape[0] > FEW_ROWS
        y = F.linear(x, cast(Tensor, weight), bias) if plain else frozen_linear(x, weight, bias)
        ys += y.split_with_sizes(ns, 1)
    add_expanded(ys, shrunk, projections)
    return ys


def add_expanded(ys: Sequence[Tensor], shrunk: Sequence[Tensor], projections: Sequence[Projection]) -> None:
    """y_j += S_j (f_j B_j)^T, in place."""
    rest = iter(shrunk)
    for y, p in zip(ys, projections, strict=True):
        if p.adapter:
            y.addmm_(next(rest), scaled(p.adapter.b, p.adapter.factor, y.dtype).T)


def input_gradient(dys: Sequence[Tensor], ds: Sequence[Tensor] | None, projections: Sequence[Projection]) -> Tensor:
    """dX [T, K] of the dY_j [T, N_j] and the dS_j [T, R_j]; without the part of the adapters where ds is None."""
    whole, k = stacked([p.weight for p in projections]), projections[0].weight.shape[1]
    # the copy reads and writes every dY_j; adding up reads and writes dX for every one but the first
    if whole is not None and sum(dy.shape[1] for dy in dys) < (len(dys) - 1) * k:
        dx = add_input_gradient(None, side_by_side(dys), whole)
    else:
        dx = None
        for dy, p in zip(dys, projections, strict=True):
            dx = add_input_gradient(dx, dy, p.weight)
    assert dx is not None, projections
    for d, adapter in zip(ds or (), (p.adapter for p in projections if p.adapter), strict=ds is not None):
        dx.addmm_(d, adapter.a.to(d.dtype))
    return dx


def base_products(
    projections: Sequence[Projection], dtype: torch.dtype
) -> list[tuple[Weight, Tensor | None, list[int]]]:
    """(weight, bias, widths N_j) of each base GEMM: one for all where the weights are packed, else one a projection."""
    ns, biases = [p.weight.shape[0] for p in projections], [p.bias for p in projections]
    whole = stacked([p.weight for p in projections]) if len(projections) > 1 else None
    if whole is not None:
        return [(whole, joined_bias(biases, ns, projections[0].weight.device, dtype), ns)]
    each = zip(projections, ns, strict=True)
    return [(p.weight, None if p.bias is None else p.bias.to(dtype), [n]) for p, n in each]


def joined_bias(
    biases: Sequence[Tensor | None], ns: Sequence[int], device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """The biases [N_j] of several linears as one, zeros for one that has none; None where none has."""
    if all(b is None for b in biases):
        return None
    zeros = (torch.zeros(n, dtype=dtype, device=device) for n in ns)
    return torch.cat([zero if b is None else b.to(dtype) for b, zero in zip(biases, zeros, strict=True)])


def scaled(b: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """factor * B [N, R] in a dtype, multiplied in the wider one of the two."""
    return (b.to(torch.promote_types(b.dtype, dtype)) * factor).to(dtype)


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Matrices of the same rows as one; itself where there is one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)
