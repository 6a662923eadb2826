"""What a step makes small: the cross-entropy of answers, or the loss of DPO (Rafailov et al., 2023).

Of two answers to a question DPO makes one the likelier:

    loss of a pair = -log sigmoid(margin)        margin = beta ((log p_c - log q_c) - (log p_r - log q_r))

log p are the log-probabilities of the chosen and the rejected answer under the model, summed over their tokens, and log q those
under the model without its adapters: one model is in memory. A stream holds both documents of a pair, one after the other.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.kernels.linear_cross_entropy import linear_cross_entropy
from minilora.models.decoder import Decoder

from .adapted import without_adapters
from .config import TrainConfig
from .data import Batch

LOGGED = ("margin", "accuracy", "chosen", "rejected")  # means over pairs, beside the loss


def log_probabilities(model: Decoder, batch: Batch) -> Tensor:
    """The log-probability of the targets of each document, [S], in nats."""
    x = model(batch.ids, batch.documents, batch.target_index)
    ends = torch.searchsorted(batch.target_index.cpu(), torch.tensor(batch.documents.cu_seqlens[1:-1]))
    each = zip(x.tensor_split(ends), batch.targets.tensor_split(ends), strict=True)
    return -torch.stack([linear_cross_entropy(rows, model.head, targets) for rows, targets in each])


def preference_losses(policy: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(losses [S/2], rewards [S/2, 2]) of pairs, from log-probabilities [S] of chosen and rejected answers in turn."""
    rewards = beta * (policy - reference).unflatten(0, (-1, 2))
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]), rewards


def pair_numbers(model: Decoder, batch: Batch, beta: float) -> Tensor:
    """The sums over the pairs of a batch of loss and LOGGED, [5]; gradients flow from the loss."""
    with torch.no_grad(), without_adapters(model):
        reference = log_probabilities(model, batch)
    losses, rewards = preference_losses(log_probabilities(model, batch), reference, beta)
    margins = rewards.detach()[:, 0] - rewards.detach()[:, 1]
    logged = (margins, (margins > 0).to(margins.dtype), *rewards.detach().unbind(1))
    return torch.stack([losses.sum(), *(t.sum() for t in logged)])


def pairs_of(batch: Batch) -> int:
    return (len(batch.documents.cu_seqlens) - 1) // 2


class Objective(NamedTuple):
    """What a step makes small: a mean over units, and numbers that are logged beside it."""

    # sums over a stream: the loss, which gradients flow from; with it what is logged
    numbers: Callable[[Decoder, Batch], Tensor]
    units: Callable[[Batch], int]
    logged: tuple[str, ...] = ()
    passes: tuple[bool, ...] = (True,)  # over a stream, in turn: whether gradients flow


def targets_of(batch: Batch) -> int:
    return len(batch.targets)


SFT = Objective(Decoder.loss, targets_of)  # the mean cross-entropy of the tokens of answers


def objective_of(config: TrainConfig) -> Objective:
    """The objective that a config names."""
    if config.objective == "sft":
        return SFT
    return Objective(partial(pair_numbers, beta=config.beta), pairs_of, LOGGED, passes=(False, True))
