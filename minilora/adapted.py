"""A model and what a method of fine-tuning put in it: looked through, taken out for a while, merged for good."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

from minilora.models.layers import Adapted
from minilora.models.quantized import quantized_weights

from .errors import UsageError
from .lora import replace_module


def adapted(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """Everything that a method put in a model, with its path, in the order of the model."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, Adapted))


def base_of(module: Adapted) -> nn.Module | None:
    """The module whose place it took; None if there was none."""
    return getattr(module, "base", None)


def require_mergeable(model: nn.Module) -> None:
    """UsageError if something in the model cannot be merged into its base, with what and why."""
    for _, module in adapted(model):
        if not module.merges:
            why = (type(module).__doc__ or "").partition("\n")[0]
            raise UsageError(f"this adapter cannot be merged. It is: {why}", "Use it with --adapter, beside its base.")


def merge(model: nn.Module) -> None:
    """Add every adapter into its weight, in place, and take the wrappers away; rounded once to the weight's dtype."""
    found = list(adapted(model))
    if quantized_weights(model) and found:  # the sum would be rounded to few levels
        raise UsageError("the adapters are on quantised weights", "Load the model with quant off to merge them.")
    require_mergeable(model)
    for path, module in found:
        base = cast(nn.Module, base_of(module))
        with torch.no_grad():
            for name in module.merges:
                p = base.get_parameter(name)
                p.copy_(module.merged(name, p))
        replace_module(model, path, base)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The base model while the block runs: what a method put in is taken out and put back."""
    found = list(adapted(model))
    for path, module in found:
        replace_module(model, path, cast(nn.Module, base_of(module)))
    try:
        yield
    finally:
        for path, module in found:
            replace_module(model, path, module)
