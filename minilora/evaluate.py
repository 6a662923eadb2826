"""The loss of a model on examples: one sum over all target tokens, divided once."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from minilora.kernels.linear_cross_entropy import CHUNK_ROWS, linear_cross_entropy
from minilora.models.decoder import Decoder

from .data import Batch, Example, pack


class Score(NamedTuple):
    """Summed cross-entropy in nats, and the number of target tokens."""

    total: float
    tokens: int

    @property
    def loss(self) -> float:
        return self.total / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def batch_loss(model: Decoder, batch: Batch) -> torch.Tensor:
    """Summed cross-entropy of a batch, a scalar that gradients flow from."""
    hidden = model(batch.ids, batch.positions, batch.seams, batch.rows, prefixes=batch.prefixes)
    if model.int8_head is not None:
        parts = zip(hidden.split(CHUNK_ROWS), batch.targets.split(CHUNK_ROWS), strict=True)
        return sum((F.cross_entropy(model.to_logits(x), t, reduction="sum") for x, t in parts), torch.zeros(()))
    return linear_cross_entropy(hidden, model.head, batch.targets)


@torch.no_grad()
def evaluate(model: Decoder, examples: Sequence[Example], micro_tokens: int) -> Score:
    """The Score of a model on examples, dropout off, packed into streams of at most micro_tokens."""
    was_training = model.training
    model.eval()
    device = model.head.device
    total, tokens = 0.0, 0
    for batch in pack(examples, micro_tokens):
        total += float(batch_loss(model, batch.to(device)))
        tokens += len(batch.rows)
    model.train(was_training)
    return Score(total, tokens)
