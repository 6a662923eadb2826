"""Reading the keys that every family's config.json shares, in the spellings of transformers 4 and 5."""

import math
from typing import Any

import torch

from .config import Yarn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# the largest sizes by key, far above any model's: a larger one is a damaged file, which would show when all memory is gone
MOST = 1 << 20
MOST_OF = {
    "num_hidden_layers": 512, "num_layers": 512, "n_layer": 512, "num_experts": 512, "num_local_experts": 512, "n_routed_experts": 512,
    "vocab_size": 1 << 24, "padded_vocab_size": 1 << 24, "bos_token_id": 1 << 24,
    "max_position_embeddings": 2**31 - 1, "original_max_position_embeddings": 2**31 - 1, "seq_length": 2**31 - 1, "n_positions": 2**31 - 1,
    "max_sequence_length": 2**31 - 1, "sliding_window": 2**31 - 1,
}  # fmt: skip


def whole(j: dict[str, Any], key: str, default: int | None = None, most: int | None = None) -> int:
    """A positive whole number up to `most`, or the key's usual limit; ValueError that names the key otherwise. null counts as missing."""
    value, most = j.get(key), most or MOST_OF.get(key, MOST)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"key {key!r} is missing")
    if type(value) is not int or not 0 < value <= most:
        raise ValueError(f"{key} is {str(value)[:40]}; a positive whole number up to {most} belongs there")
    return value


def positive(j: dict[str, Any], key: str, default: float) -> float:
    """A positive finite number; ValueError that names the key otherwise. null counts as missing."""
    value = default if j.get(key) is None else j[key]
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise ValueError(f"{key} is {str(value)[:40]}; a positive number belongs there")
    return float(value)


def flag(j: dict[str, Any], key: str, default: bool) -> bool:
    """true or false; ValueError that names the key otherwise. null counts as missing."""
    value = default if j.get(key) is None else j[key]
    if type(value) is not bool:
        raise ValueError(f"{key} is {str(value)[:40]!r}; true or false belongs there")
    return value


def dtype_of(j: dict[str, Any]) -> torch.dtype:
    """The dtype of the checkpoint: `dtype` (transformers 5) or `torch_dtype` (4); fp32 where neither is."""
    name = str(j.get("dtype") or j.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; it can be {', '.join(DTYPES)}")
    return DTYPES[name]


def rope_of(j: dict[str, Any], max_positions: int) -> tuple[float, Yarn | None]:
    """Rotary base and YaRN settings: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (4)."""
    _one_rope(j)
    scaling = j.get("rope_parameters") or j.get("rope_scaling") or {}
    theta = positive(scaling, "rope_theta", positive(j, "rope_theta", 10000.0))
    _check_same(j, scaling, "rope_theta")
    if scaling.get("type") is not None and scaling.get("rope_type") not in (None, scaling["type"]):
        raise ValueError(f"rope_type {scaling['rope_type']!r} and type {scaling['type']!r} contradict each other")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        if scaling.get("factor") not in (None, 1):
            raise ValueError(
                f"factor {scaling['factor']} stands beside rope_type 'default', which has none: say 'yarn'"
            )
        return theta, None
    if kind != "yarn":
        raise ValueError(f"rope_type is {kind!r}; 'default' and 'yarn' are supported")
    if scaling.get("factor") is None:
        raise ValueError("key 'factor' is missing")
    factor = positive(scaling, "factor", 1.0)
    both = scaling.get("mscale") and scaling.get("mscale_all_dim")
    if both:
        share = _mscale(factor, positive(scaling, "mscale", 1.0)) / _mscale(
            factor, positive(scaling, "mscale_all_dim", 1.0)
        )
    else:
        share = _mscale(factor, 1)
    return theta, Yarn(
        factor=factor,
        original_length=whole(scaling, "original_max_position_embeddings", max_positions),
        beta_fast=positive(scaling, "beta_fast", 32),
        beta_slow=positive(scaling, "beta_slow", 1),
        attention_factor=positive(scaling, "attention_factor", share),
        truncate=flag(scaling, "truncate", True),
    )


def _check_same(j: dict[str, Any], scaling: dict[str, Any], key: str) -> None:
    """ValueError for a key that says one thing in the rope settings and another beside them."""
    inside, beside = scaling.get(key), j.get(key)
    if inside is not None and beside is not None and inside != beside:
        raise ValueError(f"{key} is {inside} in the rope settings and {beside} beside them: keep one of them")


def _one_rope(j: dict[str, Any]) -> None:
    """ValueError where rope_parameters and rope_scaling differ: transformers reads one or the other, by version."""
    new, old = j.get("rope_parameters"), j.get("rope_scaling")
    for each in (new, old):
        if each is not None and not isinstance(each, dict):
            raise ValueError(f"rope_parameters or rope_scaling is {str(each)[:40]}; an object belongs there")
    if not new or not old:
        return
    said = [{"type" if k == "rope_type" else k: v for k, v in each.items() if v is not None} for each in (new, old)]
    if any(said[0].get(key) != value for key, value in said[1].items()):
        types = [str(each.get("type", "default"))[:20] for each in said]
        raise ValueError(
            f"rope_parameters ({types[0]}) and rope_scaling ({types[1]}) contradict each other: keep one of them"
        )


def rotary_of(j: dict[str, Any], head_size: int, default: float = 1.0) -> int:
    """How many elements of a head rotate: partial_rotary_factor, in rope_parameters (transformers 5) or beside (4)."""
    scaling = j.get("rope_parameters") or j.get("rope_scaling") or {}
    share = positive(scaling, "partial_rotary_factor", positive(j, "partial_rotary_factor", default))
    _check_same(j, scaling, "partial_rotary_factor")
    rotary = int(head_size * share)
    if share > 1 or rotary % 2 or not rotary:
        raise ValueError(f"partial_rotary_factor {share:g} of a head of {head_size}: an even number must rotate")
    return rotary


def only(j: dict[str, Any], family: str, **wanted: Any) -> None:
    """ValueError for a key with another value than the one that is supported. null counts as missing."""
    for key, value in wanted.items():
        if j.get(key) not in (None, value):
            raise ValueError(f"{key} is {str(j[key])[:40]}; {family} is supported with {value}")


def _mscale(factor: float, share: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * share * math.log(factor) + 1.0
