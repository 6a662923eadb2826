"""The layers that the families share, and the Decoder that stacks them.

Names of modules and parameters are the checkpoint's, so that loading needs no map and adapter keys are PEFT's.
Letters: T tokens of the flat stream, D width, H query heads, G key/value heads, E head size, F ffn width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, cast

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
    rope_scale: float  # positions are divided by it
    yarn: Yarn | None
    rotary: int  # how many elements of a head turn, from the first on
    interleaved: bool  # the pairs that turn are (2i, 2i + 1), not (i, i + rotary / 2)
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
    """Rotary frequencies [P/2] in fp32 (fp64 if dtype is) and the factor on cos and sin, YaRN applied; P is c.rotary."""
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, c.rotary, 2, device=device, dtype=torch.int64).to(wide) / c.rotary
    frequencies = 1.0 / c.rope_theta**exponents / c.rope_scale
    yarn = c.yarn
    if yarn is None:
        return frequencies, 1.0

    def dimension(rotations: float) -> float:  # the dimension that turns so often over the original length
        return c.rotary * math.log(yarn.original_length / (rotations * 2 * math.pi)) / (2 * math.log(c.rope_theta))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, c.rotary - 1)
    ramp = (torch.arange(c.rotary // 2, device=device, dtype=wide) - low) / max(high - low, 0.001)
    slow = ramp.clamp(0, 1)
    return frequencies / yarn.factor * slow + frequencies * (1 - slow), yarn.attention_factor


def positions_of(start: int, end: int, prefix: int | None = None, device: torch.device | None = None) -> Tensor:
    """Positions int64 [n] of the tokens from start to end of a document; [2, n] where it has a bidirectional prefix.

    Then the first row counts the prefix and stands still at its last token, and the second row counts what follows from 1
    (the 2-D positions of GLM; Du et al., 2022).
    """
    place = torch.arange(start, end, device=device)
    if prefix is None:
        return place
    return torch.stack((place.clamp(max=prefix - 1), (place - prefix + 1).clamp(min=0)))


@dataclass
class Place:
    """Where the tokens of a forward pass stand: rotary angles, the documents' bounds, and the key/value cache if there is one."""

    cos: Tensor  # [T, P/2]; [T, 2, P/2] for two rows of positions
    sin: Tensor
    seams: list[int]
    prefixes: list[int] | None = None  # of each document, how many first tokens see each other; None: causal throughout
    cache: Cache | None = None
    stretch: Tensor | None = None  # [T, 1, 1], factors on the queries of long documents (Qwen-1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        """Attention of a layer: q [T, H, E], k and v [T, G, E] of the new tokens -> [T, H, E]."""
        if self.cache is not None:
            k, v = self.cache.extend(layer, k, v)
            if self.cache.length:
                return self.cache.attend(q, k, v, window)
        return attention(q, k, v, self.seams, window, self.prefixes)


class Cache:
    """Keys and values of one document so far, for each layer [length, G, E]; grows by doubling."""

    def __init__(self, layers: int):
        self.length = 0
        self.prompts: list[int] = []  # tokens of each document's first pass
        self.prefix: int | None = None  # how many of them see each other, where not all is causal
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
        self.interleaved = c.interleaved
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
        q, k = (rope(x, place.cos, place.sin, self.interleaved) for x in (q, k))
        return self.o_proj(place.attend(self.layer, q, k, v, self.window).flatten(-2))


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.width, c.ffn, bias=False)
        self.up_proj = nn.Linear(c.width, c.ffn, bias=False)
        self.down_proj = nn.Linear(c.ffn, c.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class GateUpMLP(nn.Module):
    """SwiGLU whose gate and up projections are one matrix, the gate's rows first."""

    def __init__(self, c: Config):
        super().__init__()
        self.gate_up_proj = nn.Linear(c.width, 2 * c.ffn, bias=False)
        self.down_proj = nn.Linear(c.ffn, c.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(*self.gate_up_proj(x).chunk(2, dim=-1)))


class Names(NamedTuple):
    """What a family's checkpoints call the four parts of a decoder; the defaults are transformers'."""

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"


TRANSFORMERS = Names()


class Decoder(nn.Module):
    """A decoder-only language model over a flat stream of tokens; its modules lie under the names of the checkpoint."""

    def __init__(
        self,
        config: Config,
        block: Callable[[Config, int], nn.Module],
        norm: Callable[[int, float], nn.Module] = RMSNorm,
        names: Names = TRANSFORMERS,
    ):
        super().__init__()
        self.config, self.names = config, names
        self.checkpointing = False  # recompute each block in the backward pass instead of keeping its activations
        _plant(self, names.embedding, nn.Embedding(config.vocab, config.width))
        _plant(self, names.layers, nn.ModuleList(block(config, i) for i in range(config.layers)))
        _plant(self, names.norm, norm(config.width, config.eps))
        if not config.tied:
            _plant(self, names.head, nn.Linear(config.width, config.vocab, bias=False))

    @property
    def embedding(self) -> nn.Module:
        """ids [T] -> [T, D]; its weight is [V, D]."""
        return self.get_submodule(self.names.embedding)

    @property
    def blocks(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.get_submodule(self.names.layers))

    @property
    def norm(self) -> nn.Module:
        """The norm after the last block."""
        return self.get_submodule(self.names.norm)

    @property
    def head(self) -> Tensor:
        """The output weight [V, D]: the embedding itself where the checkpoint ties them."""
        return self.get_parameter(f"{self.names.embedding if self.config.tied else self.names.head}.weight")

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        seams: list[int],
        rows: Tensor | None = None,
        cache: Cache | None = None,
        prefixes: list[int] | None = None,
    ) -> Tensor:
        """Hidden states after the last norm, of all tokens [T, D] or of `rows` [M] alone, for ids [T].

        positions [T], or [2, T] for a family whose documents start with a bidirectional prefix, of prefixes[i] tokens
        (`positions_of`). seams are the bounds of the documents; with a cache the stream is one document that goes on from it.
        """
        if cache is not None and cache.length == 0:
            cache.prompts = [end - start for start, end in pairwise(seams)]
            cache.prefix = prefixes[0] if prefixes else None
        x = self.embedding(ids)
        place = self.place(positions, seams, x.dtype, prefixes, cache)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, place, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, place)
        if cache is not None:
            cache.length += ids.shape[0]
        return self.norm(x if rows is None else x.index_select(0, rows))

    def place(
        self,
        positions: Tensor,
        seams: list[int],
        dtype: torch.dtype,
        prefixes: list[int] | None = None,
        cache: Cache | None = None,
    ) -> Place:
        """The Place of a stream for blocks that compute in dtype."""
        frequencies = self.frequencies(positions.device, dtype)
        return Place(*rope_angles(positions.movedim(0, -1), *frequencies, dtype), seams, prefixes, cache)

    def frequencies(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, float]:
        """What `inverse_frequencies` gives, for this family."""
        return inverse_frequencies(self.config, device, dtype)

    def prefix(self, ids: Tensor) -> int | None:
        """How many first tokens of a document ids [T] see each other; None for a family that is causal throughout."""
        return None

    def logits(self, ids: Tensor, cache: Cache | None = None, last: bool = False) -> Tensor:
        """Logits [T, V] in fp32 or wider for one document ids [T], which continues `cache` if there is one.

        `last` makes those of the last token alone, [1, V].
        """
        start = 0 if cache is None else cache.length
        prefix = cache.prefix if cache is not None and start else self.prefix(ids)
        end = start + ids.shape[0]
        rows = torch.tensor([ids.shape[0] - 1], device=ids.device) if last else None
        prefixes = None if prefix is None else [prefix]
        x = self(ids, positions_of(start, end, prefix, ids.device), [0, ids.shape[0]], rows, cache, prefixes)
        return F.linear(x, self.head).to(torch.promote_types(x.dtype, torch.float32))


def _plant(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module under a dotted path, with plain modules on the way."""
    *way, leaf = path.split(".")
    for name in way:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(leaf, module)
