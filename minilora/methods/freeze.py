"""Freeze tuning: the last n blocks are trained whole, the rest is frozen.

A copy of each block in fp32 is trained in the place of the block, which is kept: the base is there for comparison, and
below the first copy no gradient flows. Not a method of PEFT: the file holds the weights of the copies by their names in the
checkpoint. Merges: the copies go in the place of the blocks.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minilora.models.decoder import Decoder
from minilora.models.layers import Adapted
from minilora.models.quantized import quantized_weights
from minilora.models.stream import Context

from ..config import TrainConfig

PEFT_TYPE = "FREEZE"


class Trained(Adapted):
    """A block and the copy of it that is trained: x [T, D] -> [T, D]."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.copy = copy.deepcopy(base).to(torch.promote_types(next(base.parameters()).dtype, torch.float32))
        self.copy.requires_grad_(True)
        self.base = base.requires_grad_(False)
        self.merges = tuple(name for name, _ in self.copy.named_parameters())

    def projection(self) -> None:
        """None: it is no linear."""

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.copy(x, context)

    def merged(self, name: str, stored: Tensor, rows: slice = slice(None)) -> Tensor:
        return self.copy.get_parameter(name).detach()[rows].to(stored.dtype)


Part = Trained


def install(model: Decoder, config: TrainConfig) -> None:
    if not 0 < config.freeze_trainable_layers <= len(model.blocks):
        raise _usage(f"--freeze-trainable-layers {config.freeze_trainable_layers} of {len(model.blocks)} layers")
    if quantized_weights(model):
        raise _usage("--method freeze trains weights, and these are quantised")
    _put(model, range(len(model.blocks) - config.freeze_trainable_layers, len(model.blocks)))


def read(model: Decoder, j: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    if quantized_weights(model):
        raise ValueError("trained blocks take the place of plain ones, and these are quantised: give --quant off")
    name = re.escape(model.names.layers)
    numbers = {int(match[1]) for key in shapes if (match := re.match(rf"{name}\.(\d+)\.", key))}
    if not numbers or max(numbers) >= len(model.blocks):
        raise ValueError(f"its layers are {sorted(numbers)}, the model has {len(model.blocks)}")
    _put(model, numbers)
    return tensors(model)


def _usage(what: str) -> Exception:
    from ..errors import UsageError

    return UsageError(what, "Give a number of layers that the model has, or --quant off.")


def _put(model: Decoder, numbers: Any) -> None:
    for number in numbers:
        model.blocks[number] = Trained(model.blocks[number]).train(model.training)


def _parts(model: nn.Module) -> Iterator[tuple[str, Trained]]:
    return ((path, m) for path, m in model.named_modules() if isinstance(m, Trained))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {f"{path}.{name}": p for path, part in _parts(model) for name, p in part.copy.named_parameters()}


def settings(model: nn.Module) -> dict[str, Any]:
    return {"layers": [int(path.split(".")[-1]) for path, _ in _parts(model)]}


def describe(model: nn.Module) -> str:
    layers = settings(model)["layers"]
    return f"the last {len(layers)} layers are trained whole, in fp32, by PyTorch; their linears are not fused"
