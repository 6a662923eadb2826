"""Prefix tuning: trained keys and values in front of every document, in every layer (Li and Liang, 2021, arXiv 2101.00190).

    attention of layer l:  K = [P_K(l); x W_K]    V = [P_V(l); x W_V]        P_K, P_V [P, G, E], not rotated

P-tuning v2 (Liu et al., 2021, arXiv 2110.07602) is this without or with a projection: while it is trained, an MLP may make
the prefix, [P, dim] -> Linear -> tanh -> Linear -> [P, layers * 2 * G * E]. Afterwards the prefix alone is needed, and is
what PEFT's file holds. It is ChatGLM-6B's own way (`prefix_encoder`, `pre_seq_len`); its checkpoints hold the
prefix_encoder instead, and the positions of a document do not count the prefix there (virtual.py), as they do in PEFT.

The prefix starts at N(0, 0.02^2), as in P-tuning v2's code; PEFT and ChatGLM-6B start at N(0, 1), far from the base model.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from minilora.models.config import Config
from minilora.models.decoder import Decoder
from minilora.models.qwen3_5 import GatedDeltaNet
from minilora.models.stream import Documents
from minilora.models.virtual import Front, Past, Virtual

from ..config import TrainConfig
from ..errors import UsageError

PEFT_TYPE = "PREFIX_TUNING"
STD = 0.02
ENCODER = "transformer.prefix_encoder."  # of ChatGLM-6B's own checkpoints
UNCOUNTED = ("chatglm", "chatglm2")  # families whose own code does not count the prefix


class Prefix(Virtual):
    """A prefix of trained keys and values: no weight of the base can hold it."""

    def __init__(self, c: Config, count: int, projection: tuple[int, int] | None, device: torch.device):
        """projection: the inner sizes of its MLP."""
        super().__init__()
        self.count, self.counted = count, c.family not in UNCOUNTED
        self.shape = (count, 2 * c.layers, c.kv_heads, c.head_size)
        self.width = 2 * c.layers * c.kv_heads * c.head_size
        dim, hidden = projection or (self.width, 0)
        with device:
            self.embedding = nn.Embedding(count, dim, _weight=torch.empty(count, dim))
            self.trans = (
                nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, self.width)) if projection else None
            )

    def projection(self) -> None:
        """None: it is no linear."""

    def flat(self) -> Tensor:
        """The prefix [P, layers * 2 * G * E], fp32."""
        return self.embedding.weight if self.trans is None else self.trans(self.embedding.weight)

    def rows(self, x: Tensor, documents: Documents, index: Tensor | None) -> tuple[Tensor, Documents, Tensor | None]:
        layers = self.flat().to(x.dtype).view(self.shape).movedim(0, 1).unflatten(0, (-1, 2)).unbind(0)
        longer = self.longer(documents)
        past = Past(layers, Front(documents.cu_seqlens, self.count, x.device), longer)
        positions = documents.positions + (self.count if self.counted else 0)
        return x, replace(documents, positions=positions, past=past), index


Part = Prefix


def install(model: Decoder, config: TrainConfig) -> None:
    if not _attends(model):
        raise UsageError(
            "--method prefix puts keys and values in attention, which not every layer of this model has",
            "Take --method prompt or lora.",
        )
    c = model.config
    inner = (c.kv_heads * c.head_size, c.width) if config.prefix_projection else None
    part = Prefix(c, config.pre_seq_len, inner, model.head.device)
    if not model.head.is_meta:
        generator = torch.Generator().manual_seed(config.seed)
        with torch.no_grad():
            for p in part.parameters():
                p.copy_(torch.empty(p.shape).normal_(0, STD, generator=generator))
    model.virtual = part.train(model.training)


def read(model: Decoder, j: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    if not _attends(model):
        raise ValueError("a prefix is of attention, which not every layer of this model has")
    weight = f"{ENCODER}trans.0.weight"
    inner = (shapes[weight][1], shapes[weight][0]) if weight in shapes else None
    part = Prefix(model.config, _count(j), inner, model.head.device)
    model.virtual = part.train(model.training)
    if f"{ENCODER}embedding.weight" in shapes:
        return {ENCODER + name: p for name, p in part.named_parameters()}
    return tensors(model)


def _attends(model: Decoder) -> bool:
    return not any(isinstance(module, GatedDeltaNet) for module in model.modules())


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {"prompt_embeddings": cast(Prefix, model.virtual).flat()}


def settings(model: nn.Module) -> dict[str, Any]:
    part = cast(Prefix, model.virtual)
    _, layers, heads, size = part.shape
    return {
        "num_virtual_tokens": part.count,
        "token_dim": heads * size,
        "num_transformer_submodules": 1,
        "num_attention_heads": heads,
        "num_layers": layers // 2,
        "encoder_hidden_size": heads * size,
        "prefix_projection": False,  # the file holds what it gave
    }


def describe(model: nn.Module) -> str:
    part = cast(Prefix, model.virtual)
    made = "" if part.trans is None else ", made by an MLP"
    return (
        f"{part.count} keys and values in front of each document, in every layer{made}; attention copies q, k and v and "
        f"computes {part.count} rows more a document"
    )


def _count(j: dict[str, Any]) -> int:
    count = j["num_virtual_tokens"]
    if type(count) is not int or not 0 < count <= 1 << 20:
        raise ValueError(f"num_virtual_tokens is {count!r}")
    if j.get("num_transformer_submodules") not in (None, 1):
        raise ValueError("num_transformer_submodules is for models with an encoder")
    return count
