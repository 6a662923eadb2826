"""Proof that a merged checkpoint computes what base and adapter compute together.

The truth is base + adapter in a wider dtype, block by block. The merged model, read back from the disk, may differ from it by
at most twice as much as base + adapter does when everything is rounded to the dtype of the weights, as the merged weights
are. So the tolerance is measured, not chosen.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from minilora.models.decoder import Decoder
from minilora.models.stream import Documents

from ..text.tokenizer import Tokenizer

PROMPTS = (
    "Who are you?", "你是谁？", "What is the capital of France?", "用一句话解释什么是机器学习。",
    "Write a function that reverses a string.", "把“早上好”翻译成英文。", "Tell me a short story about a fox.", "1 + 1 = ?",
)  # fmt: skip


class Proof(NamedTuple):
    """Largest logit differences over the prompts, and how often the likeliest next token is the same."""

    merged: float  # of merged and truth
    allowed: float  # twice that of base + adapter in the dtype of the weights
    adapter: float  # of base + adapter and the base alone
    same: float  # share of tokens after which merged and truth have the same likeliest token
    same_plain: float  # the same share for base + adapter in the dtype of the weights
    tokens: int

    @property
    def holds(self) -> bool:
        return self.merged <= self.allowed


def prompt_ids(tokenizer: Tokenizer) -> list[Tensor]:
    """The ids of each prompt in the chat template."""
    return [torch.tensor(tokenizer.render([{"role": "user", "content": p}], prompt=True)[0]) for p in PROMPTS]


@torch.inference_mode()
def logits_of(model: Decoder, prompts: list[Tensor]) -> list[Tensor]:
    """Logits [T, V] of each prompt, in the dtype that the model computes in."""
    return [model.logits(ids.to(model.head.device)).cpu() for ids in prompts]


def stored_logits_of(model: Decoder, prompts: list[Tensor]) -> list[Tensor]:
    """Logits [T, V] of each prompt, in the dtype that the weights are stored in."""
    compute, model.compute = model.compute, None
    try:
        return logits_of(model, prompts)
    finally:
        model.compute = compute


@torch.inference_mode()
def wide_logits_of(model: Decoder, prompts: list[Tensor]) -> list[Tensor]:
    """Logits [T, V] of each prompt in fp32, or in fp64 for a model in fp32; one block at a time is widened."""
    device, dtype = model.head.device, model.head.dtype
    wide = torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32
    streams, contexts = [], []
    for ids in prompts:
        documents = Documents.of([len(ids)], model.prefix_lens(ids)).to(device)
        streams.append(model.positioned(model.embedding(ids.to(device)).to(wide), documents))
        contexts.append(model.context(documents, wide))
    for block in model.blocks:
        widened = copy.deepcopy(block).to(wide)
        streams = [widened(x, context) for x, context in zip(streams, contexts, strict=True)]
        del widened  # one copy of a block at a time
    norm = copy.deepcopy(model.norm).to(wide)
    streams = [norm(x) for x in streams]
    pieces = [[x @ part.to(wide).T for x in streams] for part in model.head.split(16384)]
    return [torch.cat(parts, dim=1).cpu() for parts in zip(*pieces, strict=True)]


def prove(
    truth: list[Tensor], plain: list[Tensor], merged: list[Tensor], adapted: list[Tensor], base: list[Tensor]
) -> Proof:
    """Compare the merged model's logits with those of base + adapter; all are lists of [T, V].

    truth, plain and adapted are base + adapter: in a wider dtype, in that of the weights, and as the model computes.
    """
    scale = max(float(t.abs().max()) for t in truth)
    allowed = 2 * largest_difference(plain, truth) + 1e-6 * scale
    tokens = sum(len(t) for t in truth)
    return Proof(
        largest_difference(merged, truth),
        allowed,
        largest_difference(adapted, base),
        _same(merged, truth),
        _same(plain, truth),
        tokens,
    )


def _same(a: list[Tensor], b: list[Tensor]) -> float:
    return float(torch.cat([x.argmax(-1) == y.argmax(-1) for x, y in zip(a, b, strict=True)]).double().mean())


def largest_difference(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x.to(y.dtype) - y).abs().max()) for x, y in zip(a, b, strict=True))
