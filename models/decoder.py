"""The Decoder: an embedding, a stack of blocks, a norm and a head, over a flat stream of tokens.

Letters: T tokens of the stream, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.kernels.frozen_linear import frozen_linear
from minilora.kernels.linear_cross_entropy import CHUNK_ROWS, linear_cross_entropy
from minilora.kernels.rope import rope_angles

from .config import Config
from .int8 import int8_product
from .layers import Linear, RMSNorm
from .offload import Offload
from .recompute import recomputed
from .stream import Batch, Context, Documents, inverse_frequencies


class Names(NamedTuple):
    """What a family's checkpoints call the four parts of a decoder; the defaults are transformers'."""

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"


TRANSFORMERS = Names()


class Decoder(nn.Module):
    """A decoder-only language model over a flat stream of tokens; its modules have the names of the checkpoint."""

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
        self.keep_attention = False  # with checkpointing, keep the output of attention
        self.offload = False  # with checkpointing, the inputs of blocks wait in host memory
        self.compute: torch.dtype | None = None  # None: in the dtype that weights are stored in
        self.int8_head: torch.ScriptObject | None = None  # int8.py
        self.virtual: nn.Module | None = None  # trained rows in front of each document, virtual.py
        # given a weight, torch draws none: on the meta device that would import its compiler, which takes a second
        weight = torch.empty(config.vocab, config.width)
        _plant(self, names.embedding, nn.Embedding(config.vocab, config.width, _weight=weight))
        _plant(self, names.layers, nn.ModuleList(block(config, i) for i in range(config.layers)))
        _plant(self, names.norm, norm(config.width, config.eps))
        if not config.tied:
            _plant(self, names.head, Linear(config.width, config.vocab, bias=False))

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of activations and products."""
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

    def forward(self, ids: Tensor, documents: Documents, index: Tensor | None = None) -> Tensor:
        """Hidden states after the last norm, of all tokens [T, D] or of those at index [M] alone, for ids [T]."""
        x = self.embedding(ids).to(self.compute_dtype)
        if self.virtual is not None:
            x, documents, index = self.virtual(x, documents, index)
        x, context = self.positioned(x, documents), self.context(documents, x.dtype)
        offload = Offload(x.device) if self.offload else None
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = recomputed(block, x, context, self.keep_attention, offload)
            else:
                x = block(x, context)
        return self.norm(x if index is None else x.index_select(0, index))

    def positioned(self, x: Tensor, documents: Documents) -> Tensor:
        """x [T, D] with what a family adds for positions: nothing where queries and keys rotate."""
        return x

    def loss(self, batch: Batch) -> Tensor:
        """Summed cross-entropy of a batch in nats, a scalar that gradients flow from."""
        x = self(batch.ids, batch.documents, batch.target_index)
        if self.int8_head is None:
            return linear_cross_entropy(x, self.head, batch.targets)
        chunks = zip(x.split(CHUNK_ROWS), batch.targets.split(CHUNK_ROWS), strict=True)
        return sum((F.cross_entropy(self.to_logits(x), y, reduction="sum") for x, y in chunks), torch.zeros(()))

    def context(self, documents: Documents, dtype: torch.dtype) -> Context:
        """The Context of a stream for blocks that compute in dtype."""
        frequencies = self.frequencies(documents.positions.device, dtype)
        return Context(*rope_angles(documents.positions.movedim(0, -1), *frequencies, dtype), documents)

    def frequencies(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, float]:
        """inverse_frequencies, as this family computes them."""
        return inverse_frequencies(self.config, device, dtype)

    def prefix_lens(self, ids: Tensor) -> list[int] | None:
        """The length of the bidirectional prefix of one document ids [T], in a list; None for a family that is all causal."""
        return None

    def logits(self, ids: Tensor) -> Tensor:
        """Logits [T, V] in fp32 or wider for one document ids [T]; ValueError for ids that are not 1-D."""
        if ids.dim() != 1:
            raise ValueError(
                f"logits takes the ids of one document, [T], not {list(ids.shape)}: "
                "give ids[0], ids[1], ... each by itself"
            )
        documents = Documents.of([ids.shape[0]], self.prefix_lens(ids)).to(ids.device)
        return self.to_logits(self(ids, documents))

    def to_logits(self, x: Tensor) -> Tensor:
        """Logits [M, V] in fp32 or wider of hidden states [M, D] after the last norm."""
        if self.int8_head is not None:
            return int8_product(x, self.int8_head)
        return frozen_linear(x, self.head).to(torch.promote_types(x.dtype, torch.float32))


def _plant(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module under a dotted path, creating plain modules on the way."""
    *way, leaf = path.split(".")
    for name in way:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(leaf, module)
