"""Where the weights of experts lie in files: stacked, or each matrix of each expert by itself.

    in memory                          [E N, K], one expert above the other (models/moe.py)
    ...experts.gate_up_proj            [E, 2 F, D] (transformers 5, Qwen3.5), or [E, D, 2 F]: the shapes tell
    ...experts.down_proj               [E, D, F], or [E, F, D]
    ...experts.7.gate_proj.weight      [F, D], up_proj [F, D], down_proj [D, F] (Qwen2 and Qwen3, GLM; transformers 4)

A folder is read and written in the spelling that it has.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from minilora.models.moe import ExpertLinear


class Place(NamedTuple):
    """A tensor of a file: which rows of which weight it is, and the shape that it has there."""

    name: str
    rows: slice
    shape: tuple[int, ...]
    transposed: bool = False  # the file has [E, K, N]

    def matrix(self, value: Tensor) -> Tensor:
        """Rows [n, K] of the weight, from the tensor of the file."""
        value = value.transpose(1, 2) if self.transposed else value
        return value.reshape(-1, value.shape[-1])

    def tensor(self, matrix: Tensor) -> Tensor:
        """The tensor of the file, from rows [n, K] of the weight."""
        if self.transposed:
            experts, k, n = self.shape
            return matrix.view(experts, n, k).transpose(1, 2).contiguous()
        return matrix.view(self.shape)


def places(linears: Mapping[str, ExpertLinear], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """file name -> Place of all weights of experts, in the spelling of a folder that has tensors of these shapes."""
    found: dict[str, Place] = {}
    # a square matrix lies as the other one of its layer does
    transposed_layers = {
        path.rpartition(".")[0] for path, linear in linears.items() if _is_turned(linear, shapes.get(path))
    }
    for path, linear in linears.items():
        name, e, n, k = f"{path}.weight", linear.experts, linear.out_features, linear.in_features
        if path in shapes:
            transposed = path.rpartition(".")[0] in transposed_layers
            found[path] = Place(name, slice(0, e * n), (e, k, n) if transposed else (e, n, k), transposed)
            continue
        layer, height = path.rpartition(".")[0], n // len(linear.parts)
        parts = [(i, part) for i in range(e) for part in linear.parts]
        for number, (i, part) in enumerate(parts):
            rows = slice(number * height, (number + 1) * height)
            found[f"{layer}.{i}.{part}.weight"] = Place(name, rows, (height, k))
    return found


def _is_turned(linear: ExpertLinear, shape: tuple[int, ...] | None) -> bool:
    e, n, k = linear.experts, linear.out_features, linear.in_features
    return shape == (e, k, n) != (e, n, k)


def by_weight(places: Mapping[str, Place]) -> dict[str, list[tuple[str, Place]]]:
    """weight -> the tensors of a file that it is made of, in the order of its rows."""
    found: dict[str, list[tuple[str, Place]]] = {}
    for name, place in places.items():
        found.setdefault(place.name, []).append((name, place))
    return found


Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def in_files(experts: Mapping[str, list[tuple[str, Place]]], weights: Shapes) -> Shapes:
    """Dtypes and shapes of a model's weights as a folder has them: of experts, those that each is made of."""
    return {
        file: (dtype, shape if place is None else place.shape)
        for name, (dtype, shape) in weights.items()
        for file, place in experts.get(name, [(name, None)])
    }
