"""Reading the keys that every family's config.json shares, in the spellings of transformers 4 and 5."""

import math
from typing import Any

import torch

from .layers import Yarn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def whole(j: dict[str, Any], key: str, default: int | None = None) -> int:
    """A positive whole number; ValueError that names the key otherwise. null counts as missing."""
    value = j.get(key)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"key {key!r} is missing")
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(f"{key} is {value!r}; a positive whole number belongs there")
    return value


def dtype_of(j: dict[str, Any]) -> torch.dtype:
    """The dtype of the checkpoint: `dtype` (transformers 5) or `torch_dtype` (4); fp32 where neither is."""
    name = str(j.get("dtype") or j.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; it can be {', '.join(DTYPES)}")
    return DTYPES[name]


def rope_of(j: dict[str, Any], max_positions: int) -> tuple[float, Yarn | None]:
    """Rotary base and YaRN settings: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (4)."""
    scaling = j.get("rope_parameters") or j.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta") or j.get("rope_theta") or 10000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise ValueError(f"rope_type is {kind!r}; 'default' and 'yarn' are supported")
    factor = float(scaling["factor"])
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        share, whole_share = scaling.get("mscale") or 0, scaling.get("mscale_all_dim") or 0
        both = share and whole_share
        attention_factor = _mscale(factor, share) / _mscale(factor, whole_share) if both else _mscale(factor, 1)
    return theta, Yarn(
        factor=factor,
        original_length=int(scaling.get("original_max_position_embeddings") or max_positions),
        beta_fast=float(scaling.get("beta_fast") or 32),
        beta_slow=float(scaling.get("beta_slow") or 1),
        attention_factor=float(attention_factor),
        truncate=bool(scaling.get("truncate", True)),
    )


def _mscale(factor: float, share: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * share * math.log(factor) + 1.0
