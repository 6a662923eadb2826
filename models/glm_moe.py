"""GLM mixtures of experts: GLM-4.5, 4.5-Air, 4.6 and 4.7 (`glm4_moe`), GLM-4.7-Flash (`glm4_moe_lite`).

Pre-norm blocks with a sigmoid router and an expert for all tokens, after a few dense layers. `glm4_moe` has grouped-query
attention in which the halves of the first half of each head rotate as pairs, unlike `glm4`; `glm4_moe_lite` has latent
attention (mla.py). A layer after the last, for predicting several tokens at once, is not read.
"""

from typing import Any

from .config_json import dtype_of, flag, only, positive, rope_of, rotary_of, whole
from .decoder import Decoder
from .layers import Attention, Block
from .mla import LatentAttention, LatentConfig
from .moe import MoEConfig, mlp_of


def decoder(c: MoEConfig) -> Decoder:
    attention = LatentAttention if isinstance(c, LatentConfig) else Attention
    return Decoder(c, lambda _, layer: Block(c, layer, mlp_of(c, layer), attention))


def config(j: dict[str, Any]) -> MoEConfig:
    """Config of a `glm4_moe` or `glm4_moe_lite` config.json, in the spelling of transformers 4 or 5.

    Raises ValueError that names the key whose value is not supported.
    """
    family = j["model_type"]
    only(j, family, hidden_act="silu", topk_method="noaux_tc", scoring_func="sigmoid")
    layers, width = whole(j, "num_hidden_layers"), whole(j, "hidden_size")
    max_positions = whole(j, "max_position_embeddings", 131072 if family == "glm4_moe" else 202752)
    theta, yarn = rope_of(j, max_positions)
    shared = {
        "family": family,
        "layers": layers,
        "width": width,
        "heads": whole(j, "num_attention_heads"),
        "ffn": whole(j, "intermediate_size"),
        "vocab": whole(j, "vocab_size"),
        "eps": positive(j, "rms_norm_eps", 1e-5),
        "max_positions": max_positions,
        "dtype": dtype_of(j),
        "rope_theta": theta,
        "yarn": yarn,
        "tied": flag(j, "tie_word_embeddings", False),
        **_experts(j, layers),
    }
    if family == "glm4_moe_lite":
        return _latent(j, shared)
    head_size, kv_heads = whole(j, "head_dim", width // shared["heads"]), whole(j, "num_key_value_heads", 8)
    if shared["heads"] % kv_heads:
        raise ValueError(f"num_attention_heads {shared['heads']} is not a multiple of num_key_value_heads {kv_heads}")
    return MoEConfig(
        kv_heads=kv_heads,
        head_size=head_size,
        rotary=rotary_of(j, head_size, 0.5),
        qkv_bias=flag(j, "attention_bias", False),
        qk_norm=flag(j, "use_qk_norm", False),
        **shared,
    )


def _latent(j: dict[str, Any], shared: dict[str, Any]) -> LatentConfig:
    only(j, "glm4_moe_lite", attention_bias=False, num_key_value_heads=shared["heads"])
    if shared["yarn"] is not None:
        raise ValueError("rope_type is 'yarn'; glm4_moe_lite is supported with 'default'")
    if j.get("q_lora_rank", 768) is None:
        raise ValueError("q_lora_rank is null; glm4_moe_lite is supported with latent queries")
    rope, nope, v = (
        whole(j, key, size) for key, size in (("qk_rope_head_dim", 64), ("qk_nope_head_dim", 192), ("v_head_dim", 256))
    )
    only(j, "glm4_moe_lite", head_dim=rope, qk_head_dim=nope + rope)
    if rope % 2 or v > nope + rope:
        raise ValueError(
            f"heads rotate {rope} elements and hold {nope + rope}, values {v}: an even number, and no more than keys"
        )
    return LatentConfig(
        kv_heads=shared["heads"],
        head_size=nope + rope,
        rotary=rope,
        interleaved=flag(j, "rope_interleave", True),
        q_rank=whole(j, "q_lora_rank", 768),
        kv_rank=whole(j, "kv_lora_rank", 512),
        v_size=v,
        **shared,
    )


def _experts(j: dict[str, Any], layers: int) -> dict[str, Any]:
    """The fields of MoEConfig beside Config's."""
    types = j.get("mlp_layer_types") or []
    if types and (len(types) != layers or not set(types) <= {"dense", "sparse"}):
        raise ValueError(f"mlp_layer_types must name {layers} layers, each dense or sparse; it is {str(types)[:60]}")
    first = j.get("first_k_dense_replace", 1)
    if type(first) is not int or first < 0:
        raise ValueError(f"first_k_dense_replace is {str(first)[:40]}; a number of layers belongs there")
    lite = j["model_type"] == "glm4_moe_lite"
    count = "num_local_experts" if j.get("n_routed_experts") is None else "n_routed_experts"
    found = {
        "experts": whole(j, count, 64 if lite else 128),
        "chosen": whole(j, "num_experts_per_tok", 4 if lite else 8),
        "expert_ffn": whole(j, "moe_intermediate_size", 1536 if lite else 1408),
        "normalise": flag(j, "norm_topk_prob", True),
        "sigmoid": True,
        "groups": whole(j, "n_group", 1),
        "chosen_groups": whole(j, "topk_group", 1),
        "scale": positive(j, "routed_scaling_factor", 1.8 if lite else 1.0),
        "dense": tuple(i for i in range(layers) if (types[i] == "dense" if types else i < first)),
    }
    size, groups = found["experts"] // found["groups"], found["chosen_groups"]
    if found["experts"] % found["groups"] or (found["groups"] > 1 and size < 2) or groups > found["groups"]:
        raise ValueError(
            f"{count} {found['experts']} in n_group {found['groups']}, of which topk_group {groups}: they do not fit"
        )
    if found["chosen"] > groups * size:
        raise ValueError(
            f"num_experts_per_tok {found['chosen']} is more than the {groups * size} experts of topk_group {groups}"
        )
    return found | {"shared_ffn": found["expert_ffn"] * whole(j, "n_shared_experts", 1)}
