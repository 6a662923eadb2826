"""The Decoder: an embedding, a stack of blocks, a norm and a head, over a flat stream of tokens.

Letters: T tokens of the stream, D width, V vocabulary.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from minilora.kernels.frozen_linear import frozen_linear
from minilora.kernels.rope import rope_angles

from .config import Config
from .int8 import int8_product
from .layers import Linear, RMSNorm
from .place import Cache, Place
from .recompute import recomputed
from .rotary import inverse_frequencies, positions_of


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
        self.keep_attention = False  # then keep what attention gave
        self.compute: torch.dtype | None = None  # None: in the dtype that weights are stored in
        self.int8_head: torch.ScriptObject | None = None  # int8.py
        # with a weight of our own torch does not draw one: on the meta device that alone would import its compiler, a second
        weight = torch.empty(config.vocab, config.width)
        _plant(self, names.embedding, nn.Embedding(config.vocab, config.width, _weight=weight))
        _plant(self, names.layers, nn.ModuleList(block(config, i) for i in range(config.layers)))
        _plant(self, names.norm, norm(config.width, config.eps))
        if not config.tied:
            _plant(self, names.head, Linear(config.width, config.vocab, bias=False))

    @property
    def compute_dtype(self) -> torch.dtype:
        """What activations have and products are computed in."""
        return self.compute or self.head.dtype

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
            cache.prompts, cache.prefixes = [end - start for start, end in pairwise(seams)], prefixes
        x = self.embedding(ids).to(self.compute_dtype)
        place = self.place(positions, seams, x.dtype, prefixes, cache)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = recomputed(block, x, place, self.keep_attention)
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
        if cache is not None and start:
            prefixes = cache.prefixes
        else:
            prefix = self.prefix(ids)
            prefixes = None if prefix is None else [prefix]
        positions = positions_of(start, start + ids.shape[0], prefixes[0] if prefixes else None, ids.device)
        rows = torch.tensor([ids.shape[0] - 1], device=ids.device) if last else None
        x = self(ids, positions, [0, ids.shape[0]], rows, cache, prefixes)
        return self.to_logits(x)

    def to_logits(self, x: Tensor) -> Tensor:
        """Logits [M, V] in fp32 or wider of hidden states [M, D] after the last norm."""
        if self.int8_head is not None:
            return int8_product(x, self.int8_head)
        return frozen_linear(x, self.head).to(torch.promote_types(x.dtype, torch.float32))


def _plant(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module under a dotted path, with plain modules on the way."""
    *way, leaf = path.split(".")
    for name in way:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(leaf, module)
