"""(IA)^3: a trained factor for each key, value and inner activation of the MLP (Liu et al., 2022, arXiv 2205.05638).

    y = l * (W x + b)   after k and v        y = W (l * x) + b   before the MLP's last linear        l starts at 1

Where q, k and v are one linear, its q has factors as well, as in PEFT's setting for such models. Merges: l goes into the
rows of W and b, or into the columns of W.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minilora.models.decoder import Decoder
from minilora.models.gpt2 import Conv1D
from minilora.models.layers import Adapted

from ..config import TrainConfig
from ..lora import linears, replace_module
from ..targets import chosen

PEFT_TYPE = "IA3"
PREFIX = "base_model.model."
# the last names of the linears in every family
SCALED = ("k_proj", "v_proj", "query_key_value", "c_attn")
FEEDFORWARD = ("down_proj", "dense_4h_to_h", "mlp.c_proj")


class IA3Linear(Adapted):
    """A frozen linear with a factor for each of its outputs, or inputs: x [T, in] -> [T, out]."""

    def __init__(self, base: nn.Linear, feedforward: bool):
        super().__init__()
        self.base, self.feedforward = base, feedforward
        shape = (1, base.in_features) if feedforward else (base.out_features, 1)  # PEFT's
        self.ia3_l = nn.Parameter(torch.ones(shape, device=base.weight.device))
        self.merges = ("weight",) if feedforward or base.bias is None else ("weight", "bias")

    def projection(self) -> None:
        """None: a Projection has no factors."""

    def forward(self, x: Tensor) -> Tensor:
        factors = self.ia3_l.flatten()
        return self.base((x * factors).to(x.dtype)) if self.feedforward else (self.base(x) * factors).to(x.dtype)

    def merged(self, name: str, stored: Tensor, rows: slice = slice(None)) -> Tensor:
        wide = torch.promote_types(stored.dtype, torch.float32)
        factors = self.ia3_l.detach().to(wide)
        factors = factors if self.feedforward else factors[rows]
        return (stored.to(factors.device, wide) * (factors if name == "weight" else factors.flatten())).to(stored.dtype)


Part = IA3Linear


def install(model: Decoder, config: TrainConfig) -> None:
    everywhere = config.lora_targets == "all-linear"
    paths = list(linears(model)) if everywhere else chosen(list(linears(model)), config.lora_targets)
    paths = [path for path in paths if isinstance(linears(model)[path], nn.Linear)]  # not the experts of a mixture
    ends = (*SCALED, *FEEDFORWARD)
    _put(model, {p: _ends(p, FEEDFORWARD) for p in paths if not everywhere or _ends(p, ends)})


def read(model: Decoder, j: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    if j.get("modules_to_save"):
        raise ValueError("modules_to_save is not read")
    found = {key.removeprefix(PREFIX).removesuffix(".ia3_l"): shape for key, shape in shapes.items()}
    absent = [path for path in found if path not in linears(model)]
    if absent:
        raise ValueError(f"the model has no linear {absent[0]}")
    _put(model, {path: shape[0] == 1 for path, shape in found.items()})
    return tensors(model)


def _put(model: Decoder, paths: dict[str, bool]) -> None:
    for path, feedforward in paths.items():
        base = model.get_submodule(path)
        assert isinstance(base, nn.Linear), path
        replace_module(model, path, IA3Linear(base, feedforward).train(model.training))


def _ends(path: str, names: tuple[str, ...]) -> bool:
    return any(path.endswith("." + name) for name in names)


def _parts(model: nn.Module) -> Iterator[tuple[str, IA3Linear]]:
    return ((path, m) for path, m in model.named_modules() if isinstance(m, IA3Linear))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {f"{PREFIX}{path}.ia3_l": part.ia3_l for path, part in _parts(model)}


def settings(model: nn.Module) -> dict[str, Any]:
    return {
        "target_modules": [path for path, _ in _parts(model)],
        "feedforward_modules": [path for path, part in _parts(model) if part.feedforward],
        "fan_in_fan_out": any(isinstance(part.base, Conv1D) for _, part in _parts(model)),
        "modules_to_save": None,
        "init_ia3_weights": True,
    }


def describe(model: nn.Module) -> str:
    names = " ".join(dict.fromkeys(path.split(".")[-1] for path, _ in _parts(model)))
    return f"factors on {names}; the linears of one input are products of their own"
