"""The two matrices of every adapter in a PEFT folder, read and written without the base model."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ModelError, UsageError
from ..files.atomic import new_folder
from ..files.model_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Folder, ModelFolder
from ..files.safetensors import write_tensors
from ..text.tokenizer import REPLACED, TEMPLATE, files_of
from .adapter import PREFIX, path_and_half
from .adapter_config import COPIED, by_pattern, refuse_what_is_not_lora
from .expert_adapters import STACKED, from_stacked
from .load import check_finite
from .method_folder import weights_of


@dataclass(frozen=True)
class Factors:
    """One adapter: dW = scale * B A, with A [R, K] and B [N, R] in fp64."""

    a: Tensor
    b: Tensor
    scale: float = 1.0

    @property
    def r(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Of dW: out, in."""
        return self.b.shape[0], self.a.shape[1]

    def dot(self, other: "Factors") -> float:
        """The inner product of two dW as vectors, from products of r x r: sum (B1^T B2) * (A1 A2^T)."""
        return float(self.scale * other.scale * ((self.b.T @ other.b) * (self.a @ other.a.T)).sum())

    @property
    def norm(self) -> float:
        """||dW||, Frobenius."""
        return max(self.dot(self), 0.0) ** 0.5


def read_factors(folder: Folder) -> dict[str, Factors]:
    """path of a linear -> its Factors, layer by layer; ModelError for a folder that is not plain LoRA, or has matrices that do not fit."""
    folder = ModelFolder.of(folder)
    j = folder.adapter_config
    refuse_what_is_not_lora(folder.path, j)
    if j.get("use_dora") or j.get("init_lora_weights") == "pissa":
        kind = "DoRA" if j.get("use_dora") else "PiSSA as PEFT trains it"
        raise ModelError(f"{folder} is {kind}, whose change of W is not B A alone", "Only plain LoRA can be read.")
    file = weights_of(folder.path)
    path = file.path
    halves: dict[str, dict[str, Tensor]] = {}
    for key in file.entries:
        found = path_and_half(key)
        if found is None:
            raise ModelError(f"{path}: {key} is no matrix of an adapter", "Only plain LoRA can be read.")
        value = file.tensor(key)
        check_finite(value, f"{path}: {key}")
        halves.setdefault(found[0], {})[found[1]] = value.double()
    factors = {}
    both = {name.removesuffix(".base_layer") for name in halves if name.endswith(".experts.base_layer")}
    for name, half in halves.items():
        stacked = STACKED.fullmatch(name)
        if stacked:
            factors |= _of_experts(folder, j, stacked[1], half, bool(stacked[2]), stacked[1] in both)
            continue
        r = by_pattern(j, "rank_pattern", name, j["r"])
        alpha = by_pattern(j, "alpha_pattern", name, j["lora_alpha"])
        shapes = {which: list(t.shape) for which, t in half.items()}
        if [len(s) for s in shapes.values()] != [2, 2] or not shapes["A"][0] == shapes["B"][1] == r:
            told = ", ".join(f"lora_{which} {shape}" for which, shape in sorted(shapes.items()))
            raise ModelError(f"{path}: {name} has {told}", f"A [{r}, in] and B [out, {r}] belong there.")
        factors[name] = Factors(half["A"], half["B"], alpha / (math.sqrt(r) if j.get("use_rslora") else r))
    return dict(sorted(factors.items(), key=lambda item: _by_layer(item[0])))


def _by_layer(path: str) -> list[str | int]:
    """A key that sorts layer 2 before layer 10, which a file has the other way round."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def _of_experts(
    folder: ModelFolder, j: dict[str, Any], layer: str, half: dict[str, Tensor], inner: bool, both: bool
) -> dict[str, Factors]:
    """The Factors of each expert, of a stack in PEFT's layout."""
    named = [str(name).rpartition(".")[2] for name in j.get("target_parameters") or []]
    leaf = "gate_up_proj" if inner or (not both and "down_proj" not in named) else "down_proj"
    path = f"{layer}.{leaf}"
    r, alpha = (by_pattern(j, f"{key}_pattern", path, j[own]) for key, own in (("rank", "r"), ("alpha", "lora_alpha")))
    a, b = half.get("A"), half.get("B")
    if a is None or b is None or a.shape[0] != b.shape[1] or a.shape[0] % r:
        told = ", ".join(f"lora_{which} {list(t.shape)}" for which, t in sorted(half.items()))
        raise ModelError(
            f"{folder / ADAPTER_WEIGHTS}: {path} has {told}",
            f"A [experts x {r}, in] and B [out, {r} x experts] belong there.",
        )
    experts, scale = a.shape[0] // r, alpha / (math.sqrt(r) if j.get("use_rslora") else r)
    stacks = zip(from_stacked("A", a, experts), from_stacked("B", b, experts), strict=True)
    return {f"{layer}.{e}.{leaf}": Factors(one_a, one_b, scale) for e, (one_a, one_b) in enumerate(stacks)}


def write_factors(target: Path, factors: dict[str, Factors], source: Folder) -> None:
    """Write adapters of scale 1 as the PEFT folder `target`; all else that is known here is said as the folder `source` says it.

    So are a tokenizer and a chat template of its own. Nothing that another reader would act on unseen is copied, such as
    auto_mapping, which names a library to import.
    """
    source = ModelFolder.of(source)
    assert all(f.scale == 1 for f in factors.values())
    if any(".experts." in path for path in factors):
        raise UsageError("the adapter is on experts, whose ranks are not cut", "Train it with a smaller --lora-r.")
    most = max(f.r for f in factors.values())
    others = {path: f.r for path, f in factors.items() if f.r != most}
    said = {key: value for key, value in source.adapter_config.items() if key in COPIED}
    ranks = {"r": most, "lora_alpha": most, "use_rslora": False, "rank_pattern": others, "alpha_pattern": others}
    tensors = {
        f"{PREFIX}{path}.lora_{which}.weight": t.float()
        for path, f in factors.items()
        for which, t in (("A", f.a), ("B", f.b))
    }
    own = files_of(source, (*REPLACED, TEMPLATE))
    with new_folder(target) as stage:
        for name, content in own.items():
            (stage / name).write_bytes(content)
        write_tensors(stage / ADAPTER_WEIGHTS, tensors, weights_of(source.path).metadata)
        (stage / ADAPTER_CONFIG).write_text(json.dumps(said | ranks, indent=2) + "\n")
