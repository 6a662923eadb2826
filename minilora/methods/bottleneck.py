"""Bottleneck adapters: a small MLP after attention and after the MLP of each block (Houlsby et al., 2019, arXiv 1902.00751).

    y = h + U gelu(D h + d) + u        h = W x + b, the output of the block's two last linears; D [m, out], U [out, m]

U and u start at zero, so that the model computes what it did. Not a method of PEFT; the names in the file are those of
LLM-Adapters, a branch of PEFT (Hu et al., 2023, arXiv 2304.01933). It cannot be merged: gelu is not linear.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.models.decoder import Decoder
from minilora.models.layers import Adapted

from ..config import TrainConfig
from ..lora import linears, replace_module

PEFT_TYPE = "BOTTLENECK"
PREFIX = "base_model.model."
# what attention and the MLP end with, in every family
LAST = ("o_proj", "down_proj", "dense", "dense_4h_to_h", "c_proj")


class Bottleneck(Adapted):
    """A frozen linear and a small MLP behind it, which no weight of the base can hold: x [T, in] -> [T, out]."""

    def __init__(self, base: nn.Linear, size: int):
        super().__init__()
        self.base = base
        with base.weight.device:
            self.adapter_down = nn.Linear(base.out_features, size, dtype=torch.float32)
            self.adapter_up = nn.Linear(size, base.out_features, dtype=torch.float32)

    def projection(self) -> None:
        """None: it is not linear."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.base(x)
        down, up = self.adapter_down, self.adapter_up
        inner = F.gelu(F.linear(h, down.weight.to(h.dtype), down.bias.to(h.dtype)))
        return h + F.linear(inner, up.weight.to(h.dtype), up.bias.to(h.dtype))


Part = Bottleneck


def install(model: Decoder, config: TrainConfig) -> None:
    generator = torch.Generator().manual_seed(config.seed)
    for path in [p for p, m in linears(model).items() if p.split(".")[-1] in LAST and isinstance(m, nn.Linear)]:
        part = _put(model, path, config.bottleneck_size)
        if model.head.is_meta:
            continue
        with torch.no_grad():
            bound = part.base.out_features**-0.5
            weight = part.adapter_down.weight
            weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))
            for p in (part.adapter_down.bias, part.adapter_up.weight, part.adapter_up.bias):
                p.zero_()


def read(model: Decoder, j: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    known = linears(model)
    for key, shape in shapes.items():
        path = key.removeprefix(PREFIX).removesuffix(".adapter_down.weight")
        if key.endswith(".adapter_down.weight"):
            if path not in known:
                raise ValueError(f"the model has no linear {path}")
            _put(model, path, shape[0])
    return tensors(model)


def _put(model: Decoder, path: str, size: int) -> Bottleneck:
    base = model.get_submodule(path)
    assert isinstance(base, nn.Linear), path
    part = Bottleneck(base, size).train(model.training)
    replace_module(model, path, part)
    return part


def _parts(model: nn.Module) -> Iterator[tuple[str, Bottleneck]]:
    return ((path, m) for path, m in model.named_modules() if isinstance(m, Bottleneck))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    own = ((path, part, name) for path, part in _parts(model) for name, _ in part.named_parameters())
    return {f"{PREFIX}{path}.{name}": part.get_parameter(name) for path, part, name in own if name[:5] != "base."}


def settings(model: nn.Module) -> dict[str, Any]:
    parts = dict(_parts(model))
    first = next(iter(parts.values()))
    return {
        "target_modules": list(parts),
        "bottleneck_size": first.adapter_down.out_features,
        "non_linearity": "gelu",
        "scaling": 1.0,
        "use_parallel_adapter": False,
    }


def describe(model: nn.Module) -> str:
    parts = dict(_parts(model))
    names = " ".join(dict.fromkeys(path.split(".")[-1] for path in parts))
    size = next(iter(parts.values())).adapter_down.out_features
    return f"MLPs of {size} behind {names}, by PyTorch; the MLP of a block is not fused"
