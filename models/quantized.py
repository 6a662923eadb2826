"""A model whose linears have quantised weights: each is a module under the name that its parameter had."""

from collections.abc import Mapping

import torch
from torch import nn

from minilora.kernels.quantized import QuantizedWeight


def quantize_linears(model: nn.Module, weights: Mapping[str, QuantizedWeight]) -> None:
    """Put quantised weights in the place of parameters, by their names."""
    for name, weight in weights.items():
        linear = model.get_submodule(name.removesuffix(".weight"))
        del linear.weight
        linear.weight = weight


def widen_linears(model: nn.Module, dtype: torch.dtype) -> None:
    """Put plain parameters of a dtype in the place of quantised weights, one at a time."""
    for name, weight in quantized_weights(model).items():
        linear = model.get_submodule(name.removesuffix(".weight"))
        del linear.weight
        linear.weight = nn.Parameter(weight.weight_as(dtype), requires_grad=False)


def quantized_weights(model: nn.Module) -> dict[str, QuantizedWeight]:
    """The quantised weights of a model, by the names that their parameters had."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedWeight)}
