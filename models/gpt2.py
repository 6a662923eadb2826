"""GPT-2 (Radford et al., 2019; model_type `gpt2`; also DistilGPT2 and DialoGPT).

    x = wte[id] + wpe[position]        a = x + attention(LN(x))    y = a + MLP(LN(a))

Positions are learned: a document has at most as many tokens as wpe has rows. Every norm and linear has a
bias, the MLP is GELU (tanh form) without a gate, the head is the embedding. c_attn holds all queries, all keys, then all
values. The published code calls its linears Conv1D, and its files hold their weights transposed, [K, N].
"""

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from .config import Config
from .config_json import dtype_of, flag, only, positive, whole
from .decoder import Decoder, Names
from .layers import LayerNorm, Linear
from .stream import Context, Documents

PREFIX = "transformer."  # which OpenAI's own folder leaves out
NAMES = Names(f"{PREFIX}wte", f"{PREFIX}h", f"{PREFIX}ln_f")


class Conv1D(Linear):
    """A linear like any other, [N, K] in memory; in files its weight is [K, N] (checkpoint/places.py)."""


class Attention(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.layer, self.heads = layer, c.heads
        self.c_attn = Conv1D(c.width, 3 * c.width)
        self.c_proj = Conv1D(c.width, c.width)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = self.c_attn(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return self.c_proj(context.attend(self.layer, q, k, v).flatten(-2))


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c_fc = Conv1D(c.width, c.ffn)
        self.c_proj = Conv1D(c.ffn, c.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    last_linear = "mlp.c_proj"

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.ln_1 = LayerNorm(c.width, c.eps)
        self.attn = Attention(c, layer)
        self.ln_2 = LayerNorm(c.width, c.eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.attn(self.ln_1(x), context)
        return x + self.mlp(self.ln_2(x))


class GPT2(Decoder):
    def __init__(self, c: Config):
        super().__init__(c, Block, LayerNorm, NAMES)
        weight = self.head.new_empty(c.max_positions, c.width)
        cast(nn.Module, self.transformer).wpe = nn.Embedding(c.max_positions, c.width, _weight=weight)

    def positioned(self, x: Tensor, documents: Documents) -> Tensor:
        return x + self.get_submodule(f"{PREFIX}wpe")(documents.positions).to(x.dtype)

    def logits(self, ids: Tensor) -> Tensor:
        if len(ids) > self.config.max_positions:
            raise ValueError(f"{len(ids):,} tokens are more than the {self.config.max_positions:,} learned positions")
        return super().logits(ids)


def decoder(c: Config) -> Decoder:
    return GPT2(c)


def config(j: dict[str, Any]) -> Config:
    """Config of a `gpt2` config.json.

    Raises ValueError that names the key whose value is not supported.
    """
    only(j, "gpt2", activation_function="gelu_new")
    width, heads = whole(j, "n_embd", 768), whole(j, "n_head", 12)
    if width % heads:
        raise ValueError(f"n_embd {width} is not a multiple of n_head {heads}")
    return Config(
        family="gpt2",
        layers=whole(j, "n_layer", 12),
        width=width,
        heads=heads,
        kv_heads=heads,
        head_size=width // heads,
        ffn=whole(j, "n_inner", 4 * width),
        vocab=whole(j, "vocab_size", 50257),
        eps=positive(j, "layer_norm_epsilon", 1e-5),
        rotary=0,
        qkv_bias=True,
        tied=flag(j, "tie_word_embeddings", True),
        max_positions=whole(j, "n_positions", 1024),
        dtype=dtype_of(j),
    )
