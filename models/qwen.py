"""Qwen dense: Qwen1.5, Qwen2, Qwen2.5, QwQ, DeepSeek-R1-Distill-Qwen (`qwen2`) and Qwen3 (`qwen3`).

Both are pre-norm blocks of grouped-query attention and SwiGLU. Qwen2 has biases on q, k and v; Qwen3 has none, but it
has an RMS norm on each head of q and k before the rotation, and its config.json gives the head size.
"""

from typing import Any

from .config import Config
from .config_json import dtype_of, flag, only, positive, rope_of, whole
from .decoder import Decoder
from .layers import MLP, Block


def decoder(c: Config) -> Decoder:
    return Decoder(c, lambda c, layer: Block(c, layer, MLP))


def config(j: dict[str, Any]) -> Config:
    """Config of a `qwen2` or `qwen3` config.json, in the spelling of transformers 4 or 5.

    Raises ValueError that names the key whose value is not supported.
    """
    family = j["model_type"]
    only(j, family, hidden_act="silu", attention_bias=False, qkv_bias=family == "qwen2", use_qk_norm=family == "qwen3")
    layers, width = whole(j, "num_hidden_layers"), whole(j, "hidden_size")
    heads = whole(j, "num_attention_heads")
    head_size = whole(j, "head_dim", width // heads)
    max_positions = whole(j, "max_position_embeddings", 32768)
    theta, yarn = rope_of(j, max_positions)
    c = Config(
        family=family,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=whole(j, "num_key_value_heads", heads),
        head_size=head_size,
        ffn=whole(j, "intermediate_size"),
        vocab=whole(j, "vocab_size"),
        eps=positive(j, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        yarn=yarn,
        rotary=head_size,
        windows=_windows(j, layers),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tied=flag(j, "tie_word_embeddings", False),
        max_positions=max_positions,
        dtype=dtype_of(j),
    )
    if c.heads % c.kv_heads:
        raise ValueError(f"num_attention_heads {c.heads} is not a multiple of num_key_value_heads {c.kv_heads}")
    if c.head_size % 2:
        raise ValueError(f"head_dim is {c.head_size}; rotary positions need an even one")
    return c


def _windows(j: dict[str, Any], layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer: layer_types (transformers 5), or the layers from max_window_layers on."""
    size, types = j.get("sliding_window", 4096), j.get("layer_types")
    slides = flag(j, "use_sliding_window", False) and size is not None
    if slides:
        size = whole(j, "sliding_window", 4096)
    if types is None:
        first = whole(j, "max_window_layers", 28)
        return tuple(size if slides and i >= first else None for i in range(layers))
    known = {"full_attention": None} | ({"sliding_attention": size} if slides else {})
    if len(types) != layers or not set(types) <= set(known):
        raise ValueError(f"layer_types must name {layers} layers, each one of {sorted(known)}; it is {types}")
    return tuple(known[kind] for kind in types)
