"""ChatGLM2, ChatGLM3 and GLM-4-9B in the layout of their original code (model_type `chatglm`, as ChatGLM-6B has).

The same model as `glm` under other names: one matrix holds all queries, then all keys, then all values; dense_h_to_4h
holds the gate's rows, then up's; adjacent elements rotate as a pair in the first half of each head. Its RMS norm
multiplies by the weight before it rounds.

The config.json of a long-context model has a `rope_ratio`. ChatGLM3 and GLM-4 multiply the rotary base by it; ChatGLM2
divides the positions by it.
"""

import re
from typing import Any

from torch import Tensor, nn

from minilora.kernels.rope import rope_pair

from .config import Config
from .config_json import dtype_of, flag, only, positive, whole
from .decoder import Decoder, Names
from .layers import GatedMLP, Linear, RMSNorm
from .stream import Context

NAMES = Names(
    embedding="transformer.embedding.word_embeddings",
    layers="transformer.encoder.layers",
    norm="transformer.encoder.final_layernorm",
    head="transformer.output_layer",
)


class Norm(RMSNorm):
    round_once = True


class Attention(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.layer, self.head_size = layer, c.head_size
        self.widths = [c.heads * c.head_size, c.kv_heads * c.head_size, c.kv_heads * c.head_size]
        self.query_key_value = Linear(c.width, sum(self.widths), bias=c.qkv_bias)
        self.dense = Linear(c.heads * c.head_size, c.width, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        qkv = self.query_key_value(x).split(self.widths, dim=-1)
        q, k, v = (y.unflatten(-1, (-1, self.head_size)) for y in qkv)
        q, k = rope_pair(q, k, context.cos, context.sin, interleaved=True)
        return self.dense(context.attend(self.layer, q, k, v).flatten(-2))


class MLP(GatedMLP):
    gate_up, down = ("dense_h_to_4h",), "dense_4h_to_h"


class Block(nn.Module):
    last_linear = "mlp.dense_4h_to_h"

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.input_layernorm = Norm(c.width, c.eps)
        self.self_attention = Attention(c, layer)
        self.post_attention_layernorm = Norm(c.width, c.eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        h, x = self.post_attention_layernorm.of_sum(self.self_attention(self.input_layernorm(x), context), x)
        return x + self.mlp(h)


def decoder(c: Config) -> Decoder:
    return Decoder(c, Block, Norm, NAMES)


def config(j: dict[str, Any]) -> Config:
    """Config of the config.json of a ChatGLM2, ChatGLM3 or GLM-4-9B folder.

    Raises ValueError that names the key whose value is not supported.
    """
    only(
        {"multi_query_attention": False} | j,
        "ChatGLM2 and later",
        multi_query_attention=True,
        rmsnorm=True,
        post_layer_norm=True,
        add_bias_linear=False,
        apply_residual_connection_post_layernorm=False,
        original_rope=True,
    )
    layers, width = whole(j, "num_layers"), whole(j, "hidden_size")
    heads, kv_heads = whole(j, "num_attention_heads"), whole(j, "multi_query_group_num")
    head_size = whole(j, "kv_channels", 128)
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads {heads} is not a multiple of multi_query_group_num {kv_heads}")
    if head_size % 4:
        raise ValueError(f"kv_channels is {head_size}; half of a head rotates, in pairs")
    base, divisor = _rope(j)
    return Config(
        family="chatglm2",
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        ffn=whole(j, "ffn_hidden_size"),
        vocab=whole(j, "padded_vocab_size"),
        eps=positive(j, "layernorm_epsilon", 1e-5),
        rope_theta=base,
        rope_scale=divisor,
        rotary=head_size // 2,
        interleaved=True,
        qkv_bias=flag(j, "add_qkv_bias", False),
        tied=flag(j, "tie_word_embeddings", False),
        max_positions=whole(j, "seq_length", 2048),
        dtype=dtype_of(j),
    )


def _rope(j: dict[str, Any]) -> tuple[float, float]:
    """The rotary base and the divisor of positions: the two meanings of rope_ratio.

    ChatGLM2 and ChatGLM3 have the same sizes; only the name under which the folder was published tells them apart.
    """
    ratio = positive(j, "rope_ratio", 1.0)
    name = str(j.get("_name_or_path"))
    if ratio == 1 or re.search(r"(chatglm3|glm-?4)", name, re.IGNORECASE) or j.get("padded_vocab_size") == 151552:
        return 10000.0 * ratio, 1.0
    if re.search("chatglm2", name, re.IGNORECASE):
        return 10000.0, ratio
    raise ValueError(
        f"rope_ratio {ratio:g} divides the positions in ChatGLM2 and multiplies the base in ChatGLM3, and "
        f"_name_or_path {name[:60]!r} does not tell which it is: write chatglm2-6b-32k or chatglm3-6b-32k there"
    )
