"""Qwen mixtures of experts: Qwen1.5-MoE and Qwen2-57B-A14B (`qwen2_moe`), Qwen3-30B-A3B and 235B-A22B (`qwen3_moe`).

The attention of Qwen2 and Qwen3 (qwen.py) with a softmax router in each layer. Qwen2's weights are not divided by their
sum, and it has an expert for all tokens behind a gate; Qwen3's are, and it has none.
"""

from dataclasses import fields
from typing import Any

from . import qwen
from .config import Config
from .config_json import flag, whole
from .decoder import Decoder
from .layers import Block
from .moe import MoEConfig, mlp_of


def decoder(c: MoEConfig) -> Decoder:
    return Decoder(c, lambda _, layer: Block(c, layer, mlp_of(c, layer)))


def config(j: dict[str, Any]) -> MoEConfig:
    """Config of a `qwen2_moe` or `qwen3_moe` config.json, in the spelling of transformers 4 or 5.

    Raises ValueError that names the key whose value is not supported.
    """
    family = j["model_type"]
    c = qwen.config(j | {"model_type": family.removesuffix("_moe"), "layer_types": _kinds(j, family)})
    return MoEConfig(
        **{f.name: getattr(c, f.name) for f in fields(Config)} | {"family": family}, **experts(j, c.layers)
    )


def _kinds(j: dict[str, Any], family: str) -> list[str]:
    """layer_types: where windows are on, every layer has one in Qwen3, the even ones below max_window_layers in Qwen2."""
    layers = whole(j, "num_hidden_layers")
    below = layers if family == "qwen3_moe" else whole(j, "max_window_layers", 28)
    slides = flag(j, "use_sliding_window", False) and j.get("sliding_window", 4096) is not None
    own = [
        "sliding_attention" if slides and i < below and (family == "qwen3_moe" or i % 2 == 0) else "full_attention"
        for i in range(layers)
    ]
    return j.get("layer_types") or own


def experts(j: dict[str, Any], layers: int) -> dict[str, Any]:
    """The fields of MoEConfig beside Config's, of a Qwen config.json with so many layers."""
    count = "num_local_experts" if j.get("num_experts") is None else "num_experts"
    step, dense = whole(j, "decoder_sparse_step", 1), j.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(i) is int for i in dense):
        raise ValueError(f"mlp_only_layers is {str(dense)[:40]}; numbers of layers belong there")
    shared = j["model_type"] != "qwen3_moe"
    found = {
        "experts": whole(j, count, 60 if shared else 128),
        "chosen": whole(j, "num_experts_per_tok", 4 if shared else 8),
        "expert_ffn": whole(j, "moe_intermediate_size", 1408 if shared else 768),
        "normalise": flag(j, "norm_topk_prob", False),
        "shared_ffn": whole(j, "shared_expert_intermediate_size", 5632) if shared else 0,
        "shared": "shared_expert",
        "shared_gate": shared,
        "dense": tuple(i for i in range(layers) if i in dense or (i + 1) % step),
    }
    if found["chosen"] > found["experts"]:
        raise ValueError(f"num_experts_per_tok {found['chosen']} is more than {count} {found['experts']}")
    return found
