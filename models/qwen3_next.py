"""Hybrids whose MLPs are mixtures of experts: Qwen3-Next-80B-A3B (`qwen3_next`), Qwen3.5-35B-A3B and its kin (`qwen3_5_moe`).

The layers of qwen3_5.py with the mixtures of moe.py, and an expert for all tokens behind a gate. Qwen3-Next reads gated
DeltaNet's q, k, v and z by one linear and b and a by another, key head by key head.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minilora.kernels.lora_linear import lora_linear_group

from .config_json import whole
from .decoder import TRANSFORMERS, Decoder
from .layers import Linear, each, projections
from .moe import MoEConfig, mlp_of
from .qwen3_5 import NESTED, GatedDeltaNet, HybridBlock, HybridConfig, OffsetRMSNorm, hybrid_sizes
from .qwen_moe import experts


@dataclass(frozen=True, kw_only=True)
class HybridMoEConfig(HybridConfig, MoEConfig):
    """The sizes of both."""


class InterleavedDeltaNet(GatedDeltaNet):
    """GatedDeltaNet whose linears give, for each key head, [q | k | v | z] and [b | a] of it and of its value heads."""

    packed_modules = ("in_proj_qkvz", "in_proj_ba")

    def __init__(self, c: HybridConfig, layer: int):
        super().__init__(c, layer)
        for name in GatedDeltaNet.packed_modules:
            delattr(self, name)
        keys, values = c.key_heads * c.key_size, c.value_heads * c.value_size
        self.key_heads, self.value_heads = c.key_heads, c.value_heads
        self.in_proj_qkvz = Linear(c.width, 2 * keys + 2 * values, bias=False)
        self.in_proj_ba = Linear(c.width, 2 * c.value_heads, bias=False)

    def read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        linears = self.in_proj_qkvz, self.in_proj_ba
        fused = projections(*linears)
        qkvz, ba = lora_linear_group(x, fused) if fused else each(x, *linears)
        values = self.value_heads // self.key_heads
        sizes = (self.key_size, self.key_size, values * self.value_size, values * self.value_size)
        q, k, v, z = (part.flatten(1) for part in qkvz.unflatten(1, (self.key_heads, -1)).split_with_sizes(sizes, -1))
        b, a = (part.flatten(1) for part in ba.unflatten(1, (self.key_heads, -1)).chunk(2, dim=-1))
        return torch.cat((q, k, v), dim=1), z, b, a


def decoder(c: HybridMoEConfig) -> Decoder:
    names = NESTED if c.family == "qwen3_5_moe" else TRANSFORMERS
    delta: type[nn.Module] = InterleavedDeltaNet if c.family == "qwen3_next" else GatedDeltaNet
    return Decoder(c, lambda _, layer: HybridBlock(c, layer, mlp_of(c, layer), delta), OffsetRMSNorm, names)


def config(j: dict[str, Any]) -> HybridMoEConfig:
    """Config of a `qwen3_next` or `qwen3_5_moe_text` config.json, or of the text part of a `qwen3_5_moe` one.

    Raises ValueError that names the key whose value is not supported.
    """
    sizes = hybrid_sizes(j)
    # Qwen3.5 divides the weights of a token by their sum, without a key for it
    own = {} if j["model_type"] == "qwen3_next" else {"norm_topk_prob": True}
    mixture = experts(j | own, sizes["layers"])
    return HybridMoEConfig(**sizes, **mixture, ffn=whole(j, "intermediate_size", 5632))
