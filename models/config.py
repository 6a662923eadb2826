"""The sizes and switches of a checkpoint; each family reads them from its config.json."""

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Yarn:
    """Context extension by interpolating the slow frequencies only (Peng et al., 2023, "YaRN")."""

    factor: float
    original_length: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool


@dataclass(frozen=True, kw_only=True)
class Config:
    """The sizes of one checkpoint, which every family sets, and switches, which a family sets where it differs."""

    family: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    vocab: int
    eps: float
    rotary: int  # how many elements of a head rotate, from the first on; 0: positions are learned
    max_positions: int
    dtype: torch.dtype

    rope_theta: float = 10000.0
    rope_scale: float = 1.0  # positions are divided by it
    yarn: Yarn | None = None
    interleaved: bool = False  # the pairs that rotate are (2i, 2i + 1), not (i, i + rotary / 2)
    windows: tuple[int | None, ...] = ()  # a layer: how many keys a query sees, None for all; empty: all in every layer
    qkv_bias: bool = False
    qk_norm: bool = False
    tied: bool = False

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None


def as_json(config: Config) -> dict[str, Any]:
    """All of it as JSON, to tell models apart that have the same weights: another theta or eps is another model."""
    return json.loads(json.dumps(asdict(config), default=str))
