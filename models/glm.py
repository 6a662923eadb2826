"""GLM in transformers' layout: GLM-4-9B-*-hf and GLM-Edge (`glm`), GLM-4-0414 and GLM-Z1 (`glm4`).

Pre-norm blocks of grouped-query attention and SwiGLU, as in Qwen, with two differences: adjacent elements rotate as a
pair, in the first half of each head only (GLM-Edge: the whole head), and the gate and up projections are one matrix.
`glm4` adds a norm after attention and one after the MLP; its `post_attention_layernorm` is still the norm before the
MLP.
"""

from typing import Any

from torch import Tensor, nn

from .config import Config
from .config_json import dtype_of, flag, only, positive, rope_of, rotary_of, whole
from .decoder import Decoder
from .layers import Attention, Block, GateUpMLP, RMSNorm
from .stream import Context


class SandwichBlock(nn.Module):
    """`glm4`: the outputs of attention and of the MLP are normalised before they are added."""

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(c.width, c.eps)
        self.self_attn = Attention(c, layer)
        self.post_self_attn_layernorm = RMSNorm(c.width, c.eps)
        self.post_attention_layernorm = RMSNorm(c.width, c.eps)
        self.mlp = GateUpMLP(c)
        self.post_mlp_layernorm = RMSNorm(c.width, c.eps)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        attended = self.post_self_attn_layernorm(self.self_attn(self.input_layernorm(x), context))
        h, x = self.post_attention_layernorm.of_sum(attended, x)
        return x + self.post_mlp_layernorm(self.mlp(h))


def decoder(c: Config) -> Decoder:
    return Decoder(c, SandwichBlock if c.family == "glm4" else lambda c, layer: Block(c, layer, GateUpMLP))


def config(j: dict[str, Any]) -> Config:
    """Config of a `glm` or `glm4` config.json, in the spelling of transformers 4 or 5.

    Raises ValueError that names the key whose value is not supported.
    """
    family = j["model_type"]
    only(j, family, hidden_act="silu")
    layers, width = whole(j, "num_hidden_layers"), whole(j, "hidden_size")
    heads = whole(j, "num_attention_heads")
    head_size = whole(j, "head_dim", width // heads if "head_dim" in j else 128)  # transformers reads null so
    kv_heads = whole(j, "num_key_value_heads", 2)
    max_positions = whole(j, "max_position_embeddings", 131072)
    theta, yarn = rope_of(j, max_positions)
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    return Config(
        family=family,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        ffn=whole(j, "intermediate_size"),
        vocab=whole(j, "vocab_size"),
        eps=positive(j, "rms_norm_eps", 1.5625e-07),
        rope_theta=theta,
        yarn=yarn,
        rotary=rotary_of(j, head_size, 0.5),
        interleaved=True,
        qkv_bias=flag(j, "attention_bias", True),
        tied=flag(j, "tie_word_embeddings", False),
        max_positions=max_positions,
        dtype=dtype_of(j),
    )
