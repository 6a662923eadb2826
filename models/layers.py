"""The layers that the families share, and the Decoder that stacks them.

Names of modules and parameters are the checkpoint's, so that loading needs no map and adapter keys are PEFT's.
Letters: T tokens of the flat stream, D width, H query heads, G key/value heads, E head size, F ffn width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minilora.kernels.attention import attention, attention_cached
from minilora.kernels.rms_norm import rms_norm
from minilora.kernels.rope import rope, rope_angles
from minilora.kernels.swiglu import swiglu


@dataclass(frozen=True)
class Yarn:
    """Context extension by interpolating the slow frequencies only (Peng et al., 2023, "YaRN")."""

    factor: float
    original_length: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool


@dataclass(frozen=True)
class Config:
    """The sizes and switches of one checkpoint, read from its config.json."""

    family: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    vocab: int
    eps: float
    rope_theta: float
    yarn: Yarn | None
    windows: tuple[int | None, ...]  # a layer: how many keys a query sees, None for all
    qkv_bias: bool
    qk_norm: bool
    tied: bool
    max_positions: int
    dtype: torch.dtype


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def inverse_frequencies(c: Config, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Rotary frequencies [E/2] in fp32 (fp64 if dtype is) and the factor on cos and sin, YaRN applied."""
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, c.head_size, 2, device=device, dtype=torch.int64).to(wide) / c.head_size
    frequencies = 1.0 / c.rope_theta**exponents
    yarn = c.yarn
    if yarn is None:
        return frequencies, 1.0

    def dimension(rotations: float) -> float:  # the dimension that turns so often over the original length
        return c.head_size * math.log(yarn.original_length / (rotations * 2 * math.pi)) / (2 * math.log(c.rope_theta))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, c.head_size - 1)
    ramp = (torch.arange(c.head_size // 2, device=device, dtype=wide) - low) / max(high - low, 0.001)
    slow = ramp.clamp(0, 1)
    return frequencies / yarn.factor * slow + frequencies * (1 - slow), yarn.attention_factor


@dataclass
class Place:
    """Where the tokens of a forward pass stand: rotary angles, document seams, and the key/value cache if there is one."""

    cos: Tensor  # [T, E/2]
    sin: Tensor
    seams: list[int]
    cache: Cache | None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        """Attention of a layer: q [T, H, E], k and v [T, G, E] of the new tokens -> [T, H, E]."""
        if self.cache is not None:
            k, v = self.cache.extend(layer, k, v)
            if self.cache.length:
                return self.cache.attend(q, k, v, window)
        return attention(q, k, v, self.seams, window)


class Cache:
    """Keys and values of one document so far, for each layer [length, G, E]; grows by doubling."""

    def __init__(self, layers: int):
        self.length = 0
        self._store: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new tokens' k and v [T, G, E] of a layer; return all of that layer's."""
        end = self.length + k.shape[0]
        store = self._store[layer]
        if store is None or store[0].shape[0] < end:
            bigger = (
                k.new_empty(max(2 * end, 64), *k.shape[1:]),
                v.new_empty(max(2 * end, 64), *v.shape[1:]),
            )
            if store is not None:
                for new, old in zip(bigger, store, strict=True):
                    new[: self.length] = old[: self.length]
            store = self._store[layer] = bigger
        for kept, new in zip(store, (k, v), strict=True):
            kept[self.length : end] = new
        return store[0][:end], store[1][:end]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Attention of new tokens q [T, H, E] to what `extend` gave -> [T, H, E]."""
        return attention_cached(q, k, v, window)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; qkv bias and qk norm as the family has them."""

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.layer, self.head_size, self.window = layer, c.head_size, c.windows[layer]
        self.q_proj = nn.Linear(c.width, c.heads * c.head_size, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.width, c.kv_heads * c.head_size, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.width, c.kv_heads * c.head_size, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.heads * c.head_size, c.width, bias=False)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_size, c.eps)
            self.k_norm = RMSNorm(c.head_size, c.eps)
        self.qk_norm = c.qk_norm

    def forward(self, x: Tensor, place: Place) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_size)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rope(q, place.cos, place.sin), rope(k, place.cos, place.sin)
        return self.o_proj(place.attend(self.layer, q, k, v, self.window).flatten(-2))


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.width, c.ffn, bias=False)
        self.up_proj = nn.Linear(c.width, c.ffn, bias=False)
        self.down_proj = nn.Linear(c.ffn, c.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Backbone(nn.Module):
    def __init__(self, c: Config, block: Callable[[Config, int], nn.Module]):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab, c.width)
        self.layers = nn.ModuleList(block(c, i) for i in range(c.layers))
        self.norm = RMSNorm(c.width, c.eps)


class Decoder(nn.Module):
    """A decoder-only language model over a flat stream of tokens."""

    def __init__(self, config: Config, block: Callable[[Config, int], nn.Module]):
        super().__init__()
        self.config = config
        self.checkpointing = False  # recompute each block in the backward pass instead of keeping its activations
        self.model = Backbone(config, block)
        if not config.tied:
            self.lm_head = nn.Linear(config.width, config.vocab, bias=False)

    @property
    def head(self) -> Tensor:
        """The output weight [V, D]: the embedding itself where the checkpoint ties them."""
        return self.model.embed_tokens.weight if self.config.tied else self.lm_head.weight

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        seams: list[int],
        rows: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Hidden states after the last norm, of all tokens [T, D] or of `rows` [M] alone, for ids and positions [T].

        seams are the bounds of the documents; with a cache the stream is one document that goes on from it.
        """
        x = self.model.embed_tokens(ids)
        angles = rope_angles(positions, *inverse_frequencies(self.config, x.device, x.dtype), x.dtype)
        place = Place(*angles, seams, cache)
        for block in self.model.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, place, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, place)
        if cache is not None:
            cache.length += ids.shape[0]
        return self.model.norm(x if rows is None else x.index_select(0, rows))

    def logits(self, ids: Tensor, cache: Cache | None = None, last: bool = False) -> Tensor:
        """Logits [T, V] in fp32 or wider for one document ids [T], which continues `cache` if there is one.

        `last` makes those of the last token alone, [1, V].
        """
        start = 0 if cache is None else cache.length
        positions = torch.arange(start, start + ids.shape[0], device=ids.device)
        rows = torch.tensor([ids.shape[0] - 1], device=ids.device) if last else None
        x = self(ids, positions, [0, ids.shape[0]], rows, cache)
        return F.linear(x, self.head).to(torch.promote_types(x.dtype, torch.float32))
