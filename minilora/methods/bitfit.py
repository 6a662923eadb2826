"""BitFit: the biases alone are trained (Ben Zaken et al., 2021, arXiv 2106.10199).

    y = W x + b        b is a trained copy in fp32; also the bias of each LayerNorm

A model has few biases: Qwen2 and GLM-4 those of q, k and v, Qwen3 none, ChatGLM-6B one in every linear and norm. Not a
method of PEFT: the file holds the biases by their names in the checkpoint. Merges: they go in the place of the base's.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.kernels.lora_linear import lora_linear_group
from minilora.kernels.projection import Projection
from minilora.models.decoder import Decoder
from minilora.models.layers import Adapted

from ..config import TrainConfig
from ..errors import UsageError
from ..lora import HEADS, replace_module

PEFT_TYPE = "BITFIT"


class Biased(Adapted):
    """A linear, or a LayerNorm, with a trained bias in the place of its own."""

    merges = ("bias",)

    def __init__(self, base: nn.Linear | nn.LayerNorm):
        super().__init__()
        self.base = base
        bias = base.bias.detach()
        self.bias = nn.Parameter(bias.to(torch.promote_types(bias.dtype, torch.float32), copy=True))

    def projection(self) -> None:
        """None: the bias of a Projection is frozen."""

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.to(x.dtype)
        if isinstance(self.base, nn.LayerNorm):
            return F.layer_norm(x, self.base.normalized_shape, self.base.weight.to(x.dtype), bias, self.base.eps)
        return lora_linear_group(x, [Projection(self.base.weight)])[0] + bias

    def merged(self, name: str, stored: Tensor, rows: slice = slice(None)) -> Tensor:
        return self.bias.detach()[rows].to(stored.dtype)


Part = Biased


def install(model: Decoder, config: TrainConfig) -> None:
    found = list(_with_bias(model))
    if not found:
        raise UsageError("--method bitfit trains biases, and this model has none", "Take --method lora or ia3.")
    _put(model, found)


def read(model: Decoder, j: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    _put(model, [path for path in _with_bias(model) if f"{path}.bias" in shapes])
    return tensors(model)


def _with_bias(model: Decoder) -> Iterator[str]:
    for path, module in model.named_modules():
        kind = isinstance(module, (nn.Linear, nn.LayerNorm)) and path.split(".")[-1] not in HEADS
        if kind and module.bias is not None:
            yield path


def _put(model: Decoder, paths: list[str]) -> None:
    for path in paths:
        module = model.get_submodule(path)
        assert isinstance(module, (nn.Linear, nn.LayerNorm))
        replace_module(model, path, Biased(module).train(model.training))


def _parts(model: nn.Module) -> Iterator[tuple[str, Biased]]:
    return ((path, m) for path, m in model.named_modules() if isinstance(m, Biased))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {f"{path}.bias": part.bias for path, part in _parts(model)}


def settings(model: nn.Module) -> dict[str, Any]:
    return {"target_modules": [path for path, _ in _parts(model)]}


def describe(model: nn.Module) -> str:
    names = " ".join(dict.fromkeys(path.split(".")[-1] for path, _ in _parts(model)))
    return f"the biases of {names}, fp32; the linears of one input are products of their own"
