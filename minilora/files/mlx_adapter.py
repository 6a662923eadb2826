"""mlx-lm's adapters, read as if PEFT had written them: adapter_config.json with lora_parameters, adapters.safetensors.

    model.layers.0.self_attn.q_proj.lora_a      [in, R]       A of PEFT is its transpose
    model.layers.0.self_attn.q_proj.lora_b      [R, out]      so is B
    model.layers.0.self_attn.q_proj.m           [out]         DoRA's magnitudes
    model.layers.0.mlp.switch_mlp.up_proj.lora_a, lora_b      [E, R, in], [E, out, R] of experts, as PEFT has each

dW = scale * B A, so alpha is scale * R. The config holds all settings of the training; only those of the adapter are read.
Layout: mlx_lm/tuner/lora.py and dora.py of mlx-lm 0.32.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from ..errors import ModelError, quote
from .safetensors import Entry, SafetensorsFile

WEIGHTS = "adapters.safetensors"
MOST_MATRICES = 1_000_000  # of experts
KEY = re.compile(r"(?:language_model\.)?(.+)\.(lora_[ab]|m)")


def as_peft(path: Path, j: dict[str, Any]) -> dict[str, Any]:
    """The adapter_config.json that PEFT would have written; any config that is not mlx-lm's comes back unchanged.

    Raises ModelError for anything but a low-rank adapter.
    """
    if not {"lora_parameters", "fine_tune_type"} & j.keys():
        return j
    kind, parameters = j.get("fine_tune_type", "lora"), j.get("lora_parameters")
    if kind not in ("lora", "dora"):
        hint = "Fuse it with mlx_lm.fuse, and give the result with --model."
        raise ModelError(f"{path}: fine_tune_type is {quote(str(kind))}: its file holds whole weights", hint)
    if not isinstance(parameters, dict):
        raise ModelError(
            f"{path}: lora_parameters is {quote(str(parameters))}", "rank, scale and dropout belong there."
        )
    rank, scale = (_number(path, parameters, name) for name in ("rank", "scale"))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank * scale,
        "lora_dropout": parameters.get("dropout") or 0.0,
        "use_dora": kind == "dora",
        "base_model_name_or_path": str(j.get("model") or ""),
    }


def _number(path: Path, parameters: dict[str, Any], name: str) -> int | float:
    value = parameters.get(name)
    if type(value) not in (int, float):
        raise ModelError(f"{path}: {name} of lora_parameters is {quote(str(value))}", "A number belongs there.")
    return cast(float, value)


class MLXAdapter(SafetensorsFile):
    """The file of an mlx-lm adapter, under PEFT's keys and in PEFT's shapes."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._transposed: set[str] = set()
        self._matrices = 0
        self.entries = dict(pair for key, entry in self.entries.items() for pair in self._as_peft(key, entry))

    def _as_peft(self, key: str, entry: Entry) -> Iterator[tuple[str, Entry]]:
        match = KEY.fullmatch(key)
        if match is None:
            yield key, entry  # which the reader of adapters refuses by this name
            return
        path, what = f"base_model.model.{match[1]}", match[2]
        end = "lora_magnitude_vector" if what == "m" else f"lora_{what[-1].upper()}.weight"
        if ".switch_mlp." in path and len(entry.shape) == 3:
            count, *shape = entry.shape
            self._matrices += count
            if 0 in entry.shape or self._matrices > MOST_MATRICES:
                what = f"{self.path}: {quote(key)} is {list(entry.shape)}"
                raise ModelError(what, f"Up to {MOST_MATRICES:,} matrices of experts are read, and none that is empty.")
            size = (entry.end - entry.start) // count
            for e in range(count):
                start = entry.start + e * size
                part = entry._replace(shape=tuple(shape), start=start, end=start + size)
                yield path.replace(".switch_mlp.", f".experts.{e}.") + f".{end}", part
            return
        if len(entry.shape) == 2:
            self._transposed.add(f"{path}.{end}")
        yield f"{path}.{end}", entry._replace(shape=entry.shape[::-1])

    def tensor(self, name: str) -> Tensor:
        value = super().tensor(name)
        return value.reshape(value.shape[::-1]).T if name in self._transposed else value
