"""The loss of a model on examples: one sum over all target tokens, divided once."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from minilora.models.decoder import Decoder

from .data import Example, pack
from .errors import not_finite
from .objective import SFT, Objective
from .ranks.ranks import ALONE, Ranks


class Score(NamedTuple):
    """Summed cross-entropy in nats, and the number of target tokens; of preferences summed losses, pairs, and means beside them."""

    total: float
    tokens: int
    logged: dict[str, float] = {}  # noqa: RUF012 never changed

    @property
    def loss(self) -> float:
        return self.total / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@torch.no_grad()
def evaluate(
    model: Decoder, examples: Sequence[Example], micro_tokens: int, ranks: Ranks = ALONE, objective: Objective = SFT
) -> Score:
    """The Score of a model on examples, dropout off, packed into streams of at most micro_tokens.

    Ranks share the streams, and the sum is that of one rank to the bit. Raises Diverged for a loss that is not finite.
    """
    was_training = model.training
    model.eval()
    device, batches = model.head.device, pack(examples, micro_tokens)
    numbers = torch.zeros(len(batches), 1 + len(objective.logged), dtype=torch.float64, device=device)
    for i in ranks.own([len(b.ids) for b in batches]):
        ranks.begin(f"stream {i + 1} of the validation rows")
        numbers[i] = objective.numbers(model, batches[i].to(device))
    ranks.sum([numbers])
    model.train(was_training)
    if not numbers.isfinite().all():
        raise not_finite("the loss of the model")
    (loss, *logged), units = map(sum, zip(*numbers.tolist(), strict=True)), sum(map(objective.units, batches))
    return Score(loss, units, {name: value / units for name, value in zip(objective.logged, logged, strict=True)})
