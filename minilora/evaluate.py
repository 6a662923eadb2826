"""The loss of a model on examples: one sum over all target tokens, divided once."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from minilora.models.decoder import Decoder

from .data import Example, pack


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


@torch.no_grad()
def evaluate(model: Decoder, examples: Sequence[Example], micro_tokens: int) -> Score:
    """The Score of a model on examples, dropout off, packed into streams of at most micro_tokens."""
    was_training = model.training
    model.eval()
    device = model.head.device
    total, tokens = 0.0, 0
    for batch in pack(examples, micro_tokens):
        total += float(model.loss(batch.to(device)))
        tokens += len(batch.targets)
    model.train(was_training)
    return Score(total, tokens)
