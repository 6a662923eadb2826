"""Adapters that start as the error of their base's quantisation: LoftQ (Li et al., 2023, arXiv 2310.08659).

    E = W - Q(W)        scale * B A = U_R S_R V_R^T        of E = U S V^T, its R largest singular values

W is the weight as the folder has it, Q(W) what the model holds of it. This is one round of the paper's alternation
(T = 1, PEFT's default). Further rounds quantise W - scale * B A in the place of W, and an adapter would then need
those codes beside it. After one round the base is what --quant makes of the folder, and the folder, its bits and the
adapter are the whole model. On other bits the adapter would add an error that is not there: loading it refuses.
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import nn

from minilora.kernels.quantized import QuantizedWeight

from ..errors import UsageError
from ..files.model_folder import Folder, ModelFolder
from ..lora import LoRALinear, adapters
from ..methods.low_rank import low_rank
from .quantized import Stored


def loftq_init(model: nn.Module, folder: Folder, wrapped: Iterable[tuple[str, LoRALinear]] | None = None) -> None:
    """Set A and B of every adapter of a model, quantised while it was loaded from the folder, and not trained yet.

    wrapped: of these alone, in turn (run/load_sharded.py).

    B = U_R sqrt(S_R / scale) [N, R] and A = sqrt(S_R / scale) V_R^T [R, K], fp32; one weight at a time is read again.
    Where E has a lower rank, the rest of A and B stays as add_lora made it. UsageError if a base weight is not
    quantised, or if the folder does not hold it unquantised.
    """
    mark_loftq(model)
    folder = ModelFolder.of(folder)
    stored = Stored.of(folder, model)
    for path, wrapper in adapters(model) if wrapped is None else wrapped:
        name, weight = f"{path}.weight", cast(QuantizedWeight, wrapper.base.weight)
        if not stored.has_plain(name, weight.shape):
            what = f"LoftQ starts from the weights before they were quantised, and {folder.path} does not hold {name}"
            raise UsageError(what, "Give the bf16 release with --quant nf4 or int8.")
        with stored.reading(name, weight.shape) as value, torch.no_grad():
            assert not isinstance(value, QuantizedWeight)
            wide = value.to(weight.device, torch.float32)
            off = wide - weight.weight_as(torch.float32)
            b, a = low_rank(off, wrapper.r)
            wrapper.lora_B[:, : b.shape[1]] = b / wrapper.scale**0.5
            wrapper.lora_A[: a.shape[0]] = a / wrapper.scale**0.5
            size = torch.linalg.vector_norm(wide).item()
            weight.error_left = torch.linalg.vector_norm(off.sub_(b @ a)).item() / size if size else 0.0


def mark_loftq(model: nn.Module) -> None:
    """Note that the adapters began, or will begin, by loftq_init; UsageError if one is on a weight that is not quantised."""
    for path, wrapper in adapters(model):
        if not isinstance(wrapper.base.weight, QuantizedWeight):
            what = f"LoftQ starts from the error of quantised weights, and {path} is not quantised"
            raise UsageError(what, "Give --quant nf4 or int8, or leave --lora-init out.")
        wrapper.loftq = True
