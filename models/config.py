"""The sizes and switches of a checkpoint; each family reads them from its config.json."""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Config:
    """The sizes and switches of one checkpoint, read from its config.json."""

    family: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    vocab: int
    eps: float
    rope_theta: float
    rope_scale: float  # positions are divided by it
    yarn: Yarn | None
    rotary: int  # how many elements of a head turn, from the first on
    interleaved: bool  # the pairs that turn are (2i, 2i + 1), not (i, i + rotary / 2)
    windows: tuple[int | None, ...]  # a layer: how many keys a query sees, None for all
    qkv_bias: bool
    qk_norm: bool
    tied: bool
    max_positions: int
    dtype: torch.dtype
