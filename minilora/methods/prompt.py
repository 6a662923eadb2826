"""Prompt tuning: trained soft tokens in front of every document (Lester et al., 2021, arXiv 2104.08691).

    x = [S; E(ids)]        S [P, D], trained; the rows of the embedding E stay as they are

S starts as the rows of random tokens of the vocabulary, the paper's second-best start and the one that needs no choice.
P-tuning (Liu et al., 2021, arXiv 2103.10385) makes S by a small network while it is trained; a folder of PEFT's holds the
S that came of it, so it is read as this.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from minilora.models.decoder import Decoder
from minilora.models.stream import Documents
from minilora.models.virtual import Front, Virtual

from ..config import TrainConfig
from .prefix import _count

PEFT_TYPE = "PROMPT_TUNING"


class Prompt(Virtual):
    """Soft tokens in front of every document: no weight of the base can hold them."""

    def __init__(self, count: int, width: int, device: torch.device):
        super().__init__()
        self.count = count
        self.embedding = nn.Parameter(torch.empty(count, width, device=device))

    def projection(self) -> None:
        """None: it is no linear."""

    def rows(self, x: Tensor, documents: Documents, index: Tensor | None) -> tuple[Tensor, Documents, Tensor | None]:
        front = Front(documents.cu_seqlens, self.count, x.device)
        own = front.own if index is None else front.own[index]
        return front.put(self.embedding.to(x.dtype), x), self.longer(documents), own


Part = Prompt


def install(model: Decoder, config: TrainConfig) -> None:
    part = Prompt(config.pre_seq_len, model.config.width, model.head.device)
    if not model.head.is_meta:
        generator = torch.Generator().manual_seed(config.seed)
        ids = torch.randint(model.config.vocab, (part.count,), generator=generator).to(model.head.device)
        with torch.no_grad():
            part.embedding.copy_(model.embedding(ids))
    model.virtual = part.train(model.training)


def read(model: Decoder, j: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    model.virtual = Prompt(_count(j), model.config.width, model.head.device).train(model.training)
    return tensors(model)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {"prompt_embeddings": cast(Prompt, model.virtual).embedding}


def settings(model: nn.Module) -> dict[str, Any]:
    count, width = cast(Prompt, model.virtual).embedding.shape
    return {
        "num_virtual_tokens": count,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
    }


def describe(model: nn.Module) -> str:
    count = cast(Prompt, model.virtual).count
    return f"{count} soft tokens in front of each document, which pass through every layer beside its own"
