"""Maps weights whose layout in files differs from that in memory: those of experts, and GPT-2's.

    experts, in memory                 [E N, K], one expert above the other (models/moe.py)
    ...experts.gate_up_proj            [E, 2 F, D] (transformers 5, Qwen3.5), or [E, D, 2 F]: the shapes tell
    ...experts.down_proj               [E, D, F], or [E, F, D]
    ...experts.7.gate_proj.weight      [F, D], up_proj [F, D], down_proj [D, F] (Qwen2 and Qwen3, GLM; transformers 4)
    GPT-2's Conv1D, in memory          [N, K]
    ...attn.c_attn.weight              [K, N]; OpenAI's own folder leaves the prefix of all its names out

A folder is read and written with the names and layout that it has.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minilora.models.gpt2 import GPT2, PREFIX, Conv1D
from minilora.models.moe import ExpertLinear

from ..experts import expert_linears
from ..lora import base_parameters


class Place(NamedTuple):
    """A tensor of a file: which rows of which weight it holds, and its shape in the file."""

    name: str
    rows: slice
    shape: tuple[int, ...]
    transposed: bool = False  # the file has [E, K, N], or [K, N]

    def matrix(self, value: Tensor) -> Tensor:
        """Rows [n, K] of the weight, from the tensor of the file."""
        value = value.mT if self.transposed else value
        return value.flatten(0, 1) if value.dim() == 3 else value

    def tensor(self, matrix: Tensor) -> Tensor:
        """The tensor of the file, from rows [n, K] of the weight."""
        if self.transposed:
            *experts, k, n = self.shape
            return matrix.view(*experts, n, k).mT.contiguous()
        return matrix.view(self.shape)


def places(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """name in the file -> Place, for such weights of a model, in the layout of a folder with tensors of these shapes."""
    return of_gpt2(model, shapes) if isinstance(model, GPT2) else of_experts(expert_linears(model), shapes)


def of_gpt2(model: GPT2, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """The places of all weights of GPT-2."""
    bare = f"{PREFIX}wte.weight" not in shapes and "wte.weight" in shapes
    conv1d = {f"{path.removesuffix('.base')}.weight" for path, m in model.named_modules() if isinstance(m, Conv1D)}
    found = {}
    for name, weight in base_parameters(model).items():
        shape = tuple(weight.shape)[:: -1 if name in conv1d else 1]
        found[name.removeprefix(PREFIX) if bare else name] = Place(name, slice(None), shape, name in conv1d)
    return found


def of_experts(linears: Mapping[str, ExpertLinear], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """The places of all weights of experts."""
    found: dict[str, Place] = {}
    # the shape of a square matrix cannot tell: it has the layout of the other one of its layer
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
    """weight -> the tensors of the file that make it up, in the order of its rows."""
    found: dict[str, list[tuple[str, Place]]] = {}
    for name, place in places.items():
        found.setdefault(place.name, []).append((name, place))
    return found


Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def in_files(places: Mapping[str, list[tuple[str, Place]]], weights: Shapes) -> Shapes:
    """Dtypes and shapes of a model's weights as they are in a folder: where the layout differs, of the tensors that make up each weight."""
    return {
        file: (dtype, shape if place is None else place.shape)
        for name, (dtype, shape) in weights.items()
        for file, place in places.get(name, [(name, None)])
    }
