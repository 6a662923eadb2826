"""Qwen-1 (model_type `qwen`): pre-norm blocks; c_attn holds all queries, all keys, then all values; w2 is the gate.

Two things extend the context beyond the trained length, in evaluation only and for documents longer than seq_length
only: the rotary base grows with the document's length (dynamic NTK; in decoding it stays as the prompt set it), and the
query at position i is multiplied by log(i) / log(seq_length) ("logn"). Training uses neither.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from minilora.kernels.rope import rope_angles, rope_pair

from .config import Config
from .config_json import DTYPES, dtype_of, flag, only, positive, whole
from .decoder import Decoder, Names
from .layers import GatedMLP, Linear, RMSNorm
from .stream import Context, Documents, inverse_frequencies

NAMES = Names("transformer.wte", "transformer.h", "transformer.ln_f", "lm_head")
# what the first revision of August 2023 called its keys
ALIASES = {
    "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size", "n_positions": "max_position_embeddings", "padded_vocab_size": "vocab_size",
}  # fmt: skip


@dataclass(frozen=True)
class Qwen1Config(Config):
    trained_length: int
    ntk: bool
    logn: bool


class Attention(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.layer, self.heads = layer, c.heads
        self.c_attn = Linear(c.width, 3 * c.heads * c.head_size)
        self.c_proj = Linear(c.heads * c.head_size, c.width, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = self.c_attn(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        q, k = rope_pair(q, k, context.cos, context.sin)
        if context.logn_scale is not None:
            q = q * context.logn_scale
        return self.c_proj(context.attend(self.layer, q, k, v).flatten(-2))


class MLP(GatedMLP):
    gate_up, down = ("w2", "w1"), "c_proj"


class Block(nn.Module):
    last_linear = "mlp.c_proj"

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.ln_1 = RMSNorm(c.width, c.eps)
        self.attn = Attention(c, layer)
        self.ln_2 = RMSNorm(c.width, c.eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        h, x = self.ln_2.of_sum(self.attn(self.ln_1(x), context), x)
        return x + self.mlp(h)


class Qwen1(Decoder):
    def __init__(self, c: Qwen1Config):
        super().__init__(c, Block, names=NAMES)
        self.trained_length, self.ntk, self.logn = c.trained_length, c.ntk, c.logn

    def context(self, documents: Documents, dtype: torch.dtype) -> Context:
        """The Context of a stream; in evaluation with dynamic NTK and logn."""
        context = super().context(documents, dtype)
        if self.training:
            return context
        positions, lengths = documents.positions, documents.lengths
        bases = [self._base(length) for length in documents.prompt_lens or lengths]
        if any(base != self.config.rope_theta for base in bases):
            angles = []
            for base, part in zip(bases, positions.split(lengths), strict=True):
                longer = inverse_frequencies(replace(self.config, rope_theta=base), part.device, dtype)
                angles.append(rope_angles(part, *longer, dtype))
            context.cos, context.sin = (torch.cat(parts) for parts in zip(*angles, strict=True))
        if self.logn:
            wide = torch.promote_types(dtype, torch.float32)
            factors = (positions + 1).to(wide).log() / math.log(self.trained_length)
            context.logn_scale = factors.clamp(min=1).to(dtype)[:, None, None]
        return context

    def _base(self, length: int) -> float:
        """The rotary base for a document of this length."""
        c = self.config
        if not self.ntk:
            return c.rope_theta
        alpha = 2 ** math.ceil(math.log2(length / self.trained_length) + 1) - 1
        return c.rope_theta * max(alpha, 1) ** (c.rotary / (c.rotary - 2))


def decoder(c: Qwen1Config) -> Decoder:
    return Qwen1(c)


def config(j: dict[str, Any]) -> Qwen1Config:
    """Config of a Qwen-1 config.json, of the first revision too.

    Raises ValueError that names the key whose value is not supported.
    """
    j = {ALIASES[k]: v for k, v in j.items() if k in ALIASES} | j
    only(j, "Qwen-1", no_bias=True)
    layers, width = whole(j, "num_hidden_layers"), whole(j, "hidden_size")
    heads = whole(j, "num_attention_heads")
    head_size = whole(j, "kv_channels", width // heads)
    ffn = whole(j, "intermediate_size")
    share = positive(j, "rotary_pct", 1.0)
    rotary = int(head_size * share)
    if share > 1 or rotary % 2 or rotary < 4:
        raise ValueError(f"rotary_pct {share:g} of kv_channels {head_size}: an even number of elements must rotate")
    if ffn % 2:
        raise ValueError(f"intermediate_size is {ffn}; in Qwen-1 it is twice the width of the MLP")
    max_positions = whole(j, "max_position_embeddings", 8192)
    return Qwen1Config(
        family="qwen",
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=heads,
        head_size=head_size,
        ffn=ffn // 2,
        vocab=whole(j, "vocab_size"),
        eps=positive(j, "layer_norm_epsilon", 1e-6),
        rope_theta=positive(j, "rotary_emb_base", 10000.0),
        rotary=rotary,
        qkv_bias=True,
        tied=flag(j, "tie_word_embeddings", False),
        max_positions=max_positions,
        dtype=_dtype(j),
        trained_length=whole(j, "seq_length", max_positions),
        ntk=flag(j, "use_dynamic_ntk", True),
        logn=flag(j, "use_logn_attn", True),
    )


def _dtype(j: dict[str, Any]) -> torch.dtype:
    """Qwen-1 sets one of three switches for its dtype; bf16, as it was published, where none is set."""
    if j.get("dtype") or j.get("torch_dtype"):
        return dtype_of(j)
    return next((DTYPES[name] for short, name in _SWITCHES.items() if j.get(short)), torch.bfloat16)


_SWITCHES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
