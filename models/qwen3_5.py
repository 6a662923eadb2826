"""Qwen3.5, 3.6 and 3.8 dense: three layers of gated DeltaNet to one of gated attention (`qwen3_5`, its text part `qwen3_5_text`).

Gated DeltaNet (Yang, Kautz and Hatamizadeh, 2024) reads x by four linears. A convolution over four tokens mixes q, k and v;
a state per head takes the place of keys and values (kernels/gated_delta.py):

    beta = sigmoid(b)      g = -exp(A_log) softplus(a + dt_bias)      y = out_proj(norm(delta(q, k, v, g, beta)) * silu(z))

Gated attention multiplies what each head read by a sigmoid: q_proj gives [q | gate] for each head. A quarter of a head rotates.
Norms are x / rms(x) * (1 + w), but for the one in DeltaNet. Published folders are of a vision-language model; the text part is
trained, under its names there. Its three rows of positions (M-RoPE) are equal for text, and so are one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.kernels.gated_delta import gated_delta_rule, gated_delta_rule_with_state
from minilora.kernels.lora_linear import lora_linear_group
from minilora.kernels.rms_norm import add_rms_norm, rms_norm
from minilora.kernels.short_conv import short_conv
from minilora.kernels.swiglu import swiglu

from .config import Config
from .config_json import dtype_of, flag, only, positive, rope_of, rotary_of, whole
from .decoder import TRANSFORMERS, Decoder, Names
from .layers import MLP, Linear, RMSNorm, each, projections, rotated
from .stream import Context

NESTED = Names("model.language_model.embed_tokens", "model.language_model.layers", "model.language_model.norm")


@dataclass(frozen=True, kw_only=True)
class HybridConfig(Config):
    """The sizes of gated DeltaNet, and which layers have it."""

    linear: tuple[bool, ...]
    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    taps: int


class OffsetRMSNorm(RMSNorm):
    """x / rms(x) * (1 + w), rounded once."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.to(x.dtype), self.eps, 1.0, True)

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, residual, self.weight.to(x.dtype), self.eps, 1.0, True)


class ShortConv(nn.Module):
    """The taps of each channel [C, 1, K], as torch's depthwise convolution keeps them."""

    def __init__(self, channels: int, taps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))


class GatedDeltaNet(nn.Module):
    """x [T, D] -> [T, D]; a document's first tokens see zeros before them, in the convolution and in the state."""

    packed_modules = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")

    def __init__(self, c: HybridConfig, layer: int):
        super().__init__()
        self.layer, self.key_size, self.value_size = layer, c.key_size, c.value_size
        keys, values = c.key_heads * c.key_size, c.value_heads * c.value_size
        self.sizes = keys, keys, values
        self.in_proj_qkv = Linear(c.width, 2 * keys + values, bias=False)
        self.in_proj_z = Linear(c.width, values, bias=False)
        self.in_proj_b = Linear(c.width, c.value_heads, bias=False)
        self.in_proj_a = Linear(c.width, c.value_heads, bias=False)
        self.conv1d = ShortConv(2 * keys + values, c.taps)
        self.A_log = nn.Parameter(torch.zeros(c.value_heads))
        self.dt_bias = nn.Parameter(torch.ones(c.value_heads))
        self.norm = RMSNorm(c.value_size, c.eps)
        self.out_proj = Linear(values, c.width, bias=False)

    def _apply(self, fn: Callable, recurse: bool = True) -> "GatedDeltaNet":
        """A_log and dt_bias, which decay is exponential in, have fp32 at least, whatever the model has."""
        super()._apply(fn, recurse)
        for p in (self.A_log, self.dt_bias):
            p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
        return self

    def forward(self, x: Tensor, context: Context) -> Tensor:
        qkv, z, b, a = self.read(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        g = -self.A_log.to(wide).exp() * F.softplus(a.to(wide) + self.dt_bias.to(wide))
        o = self.attend(qkv, g, b.to(wide).sigmoid(), context)
        o = swiglu(z.unflatten(-1, (-1, self.value_size)), self.norm(o))
        return self.out_proj(o.flatten(-2))

    def read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[q | k | v] of all heads, z, b and a, of x [T, D]."""
        linears = [getattr(self, name) for name in self.packed_modules]
        if fused := projections(*linears):
            (qkv, z), (b, a) = lora_linear_group(x, fused[:2]), lora_linear_group(x, fused[2:])
        else:
            qkv, z, b, a = each(x, *linears)
        return qkv, z, b, a

    def attend(self, qkv: Tensor, g: Tensor, beta: Tensor, context: Context) -> Tensor:
        """What the heads read from their states: qkv [T, channels] before the convolution -> [T, heads, value size]."""
        bounds, cache = context.documents.cu_seqlens, context.documents.cache
        w = self.conv1d.weight.squeeze(1).to(qkv.dtype)
        if cache is None:
            return gated_delta_rule(*self.heads(short_conv(qkv, w, bounds)), g, beta, bounds)
        before = cache.states(self.layer) if context.documents.prompt_lens is not None else (None, None)
        mixed, tail = _conv_with_tail(qkv, w, bounds, before[0])
        o, state = gated_delta_rule_with_state(*self.heads(mixed), g, beta, bounds, before[1])
        cache.keep(self.layer, tail, state)
        return o

    def heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = mixed.split_with_sizes(self.sizes, -1)
        by_heads = (-1, self.key_size)
        return q.unflatten(-1, by_heads), k.unflatten(-1, by_heads), v.unflatten(-1, (-1, self.value_size))


def _conv_with_tail(x: Tensor, w: Tensor, cu_seqlens: list[int], tail: Tensor | None) -> tuple[Tensor, Tensor]:
    """short_conv of documents that begin after `tail` [S, K - 1, C], None for zeros, and their own last K - 1 rows."""
    count, lengths = w.shape[1] - 1, [b - a for a, b in pairwise(cu_seqlens)]
    tails = x.new_zeros(len(lengths), count, x.shape[1]) if tail is None else tail
    rows = [row for pair in zip(tails, x.split(lengths), strict=True) for row in pair]
    bounds = [0]
    for n in lengths:
        bounds.append(bounds[-1] + count + n)
    whole = torch.cat(rows)
    y = short_conv(whole, w, bounds)
    kept = torch.cat([y[end - n : end] for end, n in zip(bounds[1:], lengths, strict=True)])
    return kept, torch.stack([whole[end - count : end] for end in bounds[1:]])


class GatedAttention(nn.Module):
    """Grouped-query attention, what each head read multiplied by sigmoid(gate): x [T, D] -> [T, D]."""

    packed_modules = ("q_proj", "k_proj", "v_proj")

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.layer, self.head_size = layer, c.head_size
        self.q_proj = Linear(c.width, 2 * c.heads * c.head_size, bias=False)  # of each head q, then its gate
        self.k_proj = Linear(c.width, c.kv_heads * c.head_size, bias=False)
        self.v_proj = Linear(c.width, c.kv_heads * c.head_size, bias=False)
        self.o_proj = Linear(c.heads * c.head_size, c.width, bias=False)
        self.q_norm = OffsetRMSNorm(c.head_size, c.eps)
        self.k_norm = OffsetRMSNorm(c.head_size, c.eps)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        linears = self.q_proj, self.k_proj, self.v_proj
        fused = projections(*linears)
        qg, k, v = (y.unflatten(-1, (-1, n)) for y, n in zip(
            lora_linear_group(x, fused) if fused else each(x, *linears), (2 * self.head_size, self.head_size, self.head_size), strict=True
        ))  # fmt: skip
        q, gate = qg.chunk(2, dim=-1)
        q, k = rotated(self.q_norm(q), self.k_norm(k), context, interleaved=False)
        return self.o_proj((context.attend(self.layer, q, k, v) * gate.sigmoid()).flatten(-2))


class HybridBlock(nn.Module):
    """A pre-norm block with gated DeltaNet or gated attention, and the MLP that it is given: x [T, D] -> [T, D]."""

    def __init__(self, c: HybridConfig, layer: int, mlp: type[nn.Module], delta: type[nn.Module] = GatedDeltaNet):
        super().__init__()
        self.last_linear = f"mlp.{getattr(mlp, 'last_linear', 'down_proj')}"
        self.input_layernorm = OffsetRMSNorm(c.width, c.eps)
        self.mixer = "linear_attn" if c.linear[layer] else "self_attn"
        self.add_module(self.mixer, (delta if c.linear[layer] else GatedAttention)(c, layer))
        self.post_attention_layernorm = OffsetRMSNorm(c.width, c.eps)
        self.mlp = mlp(c)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        mixed = getattr(self, self.mixer)(self.input_layernorm(x), context)
        h, x = self.post_attention_layernorm.of_sum(mixed, x)
        return x + self.mlp(h)


def decoder(c: HybridConfig) -> Decoder:
    names = TRANSFORMERS if c.family.endswith("_text") else NESTED
    return Decoder(c, lambda _, layer: HybridBlock(c, layer, MLP), OffsetRMSNorm, names)


def config(j: dict[str, Any]) -> HybridConfig:
    """Config of a `qwen3_5_text` config.json, or of the text part of a `qwen3_5` one.

    Raises ValueError that names the key whose value is not supported.
    """
    return HybridConfig(ffn=whole(j, "intermediate_size"), **hybrid_sizes(j))


def hybrid_sizes(j: dict[str, Any]) -> dict[str, Any]:
    """The fields of a HybridConfig that all families with gated DeltaNet read alike: all but ffn."""
    family = j["model_type"]
    only(j, family, hidden_act="silu", attention_bias=False, attn_output_gate=True, mamba_ssm_dtype="float32")
    if j.get("output_gate_type") not in (None, "silu", "swish"):  # two names of one function
        raise ValueError(f"output_gate_type is {str(j['output_gate_type'])[:40]}; {family} is supported with swish")
    layers, head_size = whole(j, "num_hidden_layers"), whole(j, "head_dim", 256)
    heads, kv_heads = whole(j, "num_attention_heads"), whole(j, "num_key_value_heads")
    key_heads, value_heads = whole(j, "linear_num_key_heads", 16), whole(j, "linear_num_value_heads", 32)
    max_positions = whole(j, "max_position_embeddings", 32768)
    theta, yarn = rope_of(j, max_positions)
    for name, many, few_name, few in (
        ("num_attention_heads", heads, "num_key_value_heads", kv_heads),
        ("linear_num_value_heads", value_heads, "linear_num_key_heads", key_heads),
    ):
        if many % few:
            raise ValueError(f"{name} {many} is not a multiple of {few_name} {few}")
    return {
        "family": family,
        "layers": layers,
        "width": whole(j, "hidden_size"),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_size": head_size,
        "vocab": whole(j, "vocab_size"),
        "eps": positive(j, "rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "yarn": yarn,
        "rotary": rotary_of(j, head_size, 0.25),
        "qk_norm": True,
        "tied": flag(j, "tie_word_embeddings", False),
        "max_positions": max_positions,
        "dtype": dtype_of(j),
        "linear": _linear(j, layers),
        "key_heads": key_heads,
        "value_heads": value_heads,
        "key_size": whole(j, "linear_key_head_dim", 128),
        "value_size": whole(j, "linear_value_head_dim", 128),
        "taps": whole(j, "linear_conv_kernel_dim", 4, 64),
    }


def _linear(j: dict[str, Any], layers: int) -> tuple[bool, ...]:
    """Which layers are DeltaNet: layer_types, or all but every full_attention_interval-th."""
    types = j.get("layer_types")
    if types is None:
        interval = whole(j, "full_attention_interval", 4)
        return tuple((i + 1) % interval > 0 for i in range(layers))
    if len(types) != layers or not set(types) <= {"linear_attention", "full_attention"}:
        raise ValueError(
            f"layer_types must name {layers} layers, each linear_attention or full_attention; it is {str(types)[:80]}"
        )
    return tuple(kind == "linear_attention" for kind in types)
