"""A model whose linears have quantised weights: each is a module under the name that its parameter had."""

from collections.abc import Mapping

import torch
from torch import nn

from minilora.kernels.fp8_rows import FP8RowsWeight
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


def pack_codes(model: nn.Module) -> None:
    """Allocate the parts of FP8 weights of one input (q/k/v, gate/up) contiguously, as layers.pack_weights does plain
    ones: one product reads their codes. Weights lose what they hold."""
    for module in list(model.modules()):
        linears = [module.get_submodule(name).weight for name in getattr(module, "packed_modules", ())]
        weights = [w for w in linears if isinstance(w, FP8RowsWeight)]
        if weights and len(weights) == len(linears):
            heights = [w.shape[0] for w in weights]
            whole = FP8RowsWeight.empty((sum(heights), weights[0].shape[1]), weights[0].device)
            for w, codes, scales in zip(weights, whole.codes.split(heights), whole.scales.split(heights), strict=True):
                w.codes, w.scales = codes, scales


def quantized_weights(model: nn.Module) -> dict[str, QuantizedWeight]:
    """The quantised weights of a model, by the names that their parameters had."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedWeight)}
