"""ChatGLM-6B, the first one (model_type `chatglm` without `multi_query_attention`).

A GLM (Du et al., 2022) with a block that no later model has:

    a = LN(x)    h = sqrt(56) * a + attention(a)    b = LN(h)    y = sqrt(56) * b + MLP(b)

The residual carries the normalised input; sqrt(56) is sqrt(2 * 28 layers); the original code has it as a constant,
whatever num_layers is. The MLP is GELU (tanh form) without a gate. Every linear has a bias. The rows of query_key_value
are q, k, v of the first head, then of the next.

A document is `prompt [gMASK] <sop> answer <eop>`. The tokens before <sop> all see each other; from <sop> on attention
is causal. A token has two positions: the first half of each head rotates by the position in the prompt, which stays
that of [gMASK] from there on, the second half by the position in the answer, which counts from <sop> = 1
(stream.Documents).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.kernels.rope import rope_pair

from .config import Config
from .config_json import dtype_of, flag, only, positive, whole
from .decoder import Decoder, Names
from .layers import LayerNorm, Linear
from .stream import Context, Documents, inverse_frequencies

NAMES = Names("transformer.word_embeddings", "transformer.layers", "transformer.final_layernorm", "lm_head")
ALPHA = 56**0.5


@dataclass(frozen=True)
class ChatGLMConfig(Config):
    sop: int  # the id of <sop>, the first token after the bidirectional prefix


class Attention(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.layer, self.heads = layer, c.heads
        self.query_key_value = Linear(c.width, 3 * c.width)
        self.dense = Linear(c.width, c.width)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = self.query_key_value(x).unflatten(-1, (self.heads, -1)).chunk(3, dim=-1)
        q, k = rope_pair(q, k, context.cos, context.sin)
        return self.dense(context.attend(self.layer, q, k, v).flatten(-2))


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.dense_h_to_4h = Linear(c.width, c.ffn)
        self.dense_4h_to_h = Linear(c.ffn, c.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh"))


class Block(nn.Module):
    last_linear = "mlp.dense_4h_to_h"

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.input_layernorm = LayerNorm(c.width, c.eps)
        self.attention = Attention(c, layer)
        self.post_attention_layernorm = LayerNorm(c.width, c.eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        a = self.input_layernorm(x)
        b = self.post_attention_layernorm(torch.add(self.attention(a, context), a, alpha=ALPHA))
        return torch.add(self.mlp(b), b, alpha=ALPHA)


class ChatGLM(Decoder):
    def __init__(self, c: ChatGLMConfig):
        super().__init__(c, Block, LayerNorm, NAMES)
        self.sop = c.sop

    def frequencies(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, float]:
        """Rounded to fp16, as in the training of the published weights; the angles are fp32."""
        exact, factor = inverse_frequencies(self.config, device, torch.float32)
        return exact.half().to(torch.promote_types(dtype, torch.float32)), factor

    def context(self, documents: Documents, dtype: torch.dtype) -> Context:
        assert documents.prefix_lens is not None, "the documents of ChatGLM-6B begin with a bidirectional prefix"
        return super().context(documents, dtype)

    def prefix_lens(self, ids: Tensor) -> list[int]:
        starts = (ids == self.sop).nonzero()
        if not len(starts) or not starts[0]:
            raise ValueError(f"a document of ChatGLM-6B holds [gMASK] <sop> after its prompt; {self.sop} is not in ids")
        return [int(starts[0])]


def decoder(c: ChatGLMConfig) -> Decoder:
    return ChatGLM(c)


def config(j: dict[str, Any]) -> ChatGLMConfig:
    """Config of ChatGLM-6B's config.json; missing keys have the values of the first release, of vocabulary 150528.

    Raises ValueError that names the key whose value is not supported.
    """
    only(j, "ChatGLM-6B", position_encoding_2d=True)
    layers, width = whole(j, "num_layers", 28), whole(j, "hidden_size", 4096)
    heads = whole(j, "num_attention_heads", 32)
    if width % heads or width // heads % 4:
        raise ValueError(f"hidden_size {width} of {heads} heads: both halves of a head rotate, in pairs")
    return ChatGLMConfig(
        family="chatglm",
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=heads,
        head_size=width // heads,
        ffn=whole(j, "inner_hidden_size", 16384),
        vocab=whole(j, "vocab_size", 150528),
        eps=positive(j, "layernorm_epsilon", 1e-5),
        rotary=width // heads // 2,
        qkv_bias=True,
        tied=flag(j, "tie_word_embeddings", True),
        max_positions=whole(j, "max_sequence_length", 2048),
        dtype=dtype_of(j),
        sop=whole(j, "bos_token_id", 150004),
    )
