"""The loss of a model on examples: one sum over all target tokens, divided once."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from minilora.models.decoder import Decoder

from .data import Example, pack
from .ranks.ranks import ALONE, Ranks


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
def evaluate(model: Decoder, examples: Sequence[Example], micro_tokens: int, ranks: Ranks = ALONE) -> Score:
    """The Score of a model on examples, dropout off, packed into streams of at most micro_tokens.

    Ranks share the streams, and the sum is that of one rank to the bit.
    """
    was_training = model.training
    model.eval()
    device, batches = model.head.device, pack(examples, micro_tokens)
    losses = torch.zeros(len(batches), dtype=torch.float64, device=device)
    for i in ranks.own([len(b.ids) for b in batches]):
        ranks.begin(f"stream {i + 1} of the validation rows")
        losses[i] = model.loss(batches[i].to(device))
    ranks.sum([losses])
    model.train(was_training)
    return Score(sum(losses.tolist()), sum(len(b.targets) for b in batches))
