"""Activation checkpointing: the same bits as without it, and what it does not compute again."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from oracle import OWN, conversations, randomise, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from minilora import add_lora
from minilora.data import make_batch
from minilora.lora import adapters
from minilora.models import stream
from minilora.models.decoder import Decoder
from minilora.models.moe import ExpertLinear

families = pytest.mark.parametrize("family", OWN)


def adapted(
    family: str, targets: Any = "all-linear", dtype: torch.dtype = torch.float32, dropout: float = 0.3
) -> Decoder:
    model = tiny(family, dtype)
    add_lora(model, targets, r=3, alpha=6, dropout=dropout)
    randomise(model)
    return model.train()


def loss_and_gradients(model: Decoder) -> list[Tensor]:
    loss = model.loss(make_batch(conversations(model.config.family)))
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    found = [loss.detach(), *(p.grad.clone() for p in trained if p.grad is not None)]
    assert len(found) == 1 + len(trained)
    model.zero_grad()
    return found


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keep_attention", [False, True])
def test_no_bit_changes(family: str, dtype: torch.dtype, keep_attention: bool):
    model = adapted(family, dtype=dtype)
    kept = loss_and_gradients(model)
    model.checkpointing, model.keep_attention = True, keep_attention
    assert same_bits(loss_and_gradients(model), kept)


@families
@pytest.mark.parametrize("targets", ["attention", "mlp", "last", "first"])
def test_adapters_on_some_linears(family: str, targets: str):
    """Blocks of which parts, or the input, need no gradient."""
    model = tiny(family)
    name = getattr(model.blocks[0], "last_linear", "mlp.down_proj")
    paths = [n for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, ExpertLinear)) and n.endswith(name)]
    chosen = {"last": paths[-1:], "first": paths[:1]}.get(targets, targets)
    model = adapted(family, chosen)
    kept = loss_and_gradients(model)
    model.checkpointing = True
    assert same_bits(loss_and_gradients(model), kept)


@families
def test_every_weight_trained(family: str):
    model = tiny(family).requires_grad_(True).train()
    kept = loss_and_gradients(model)
    model.checkpointing = True
    assert same_bits(loss_and_gradients(model), kept)


class Flops(TorchDispatchMode):
    """Of matrix products, without those added into another in place; torch's FlopCounterMode does not allow a gradient inside
    a backward."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def backward_flops(model: Decoder) -> int:
    loss = model.loss(make_batch(conversations(model.config.family)))
    with Flops() as counter:
        loss.backward()
    return counter.total


def test_the_last_linear_and_no_s_are_computed_again():
    """The backward costs the forward of a block more, less its down_proj and the products S = x A^T."""
    model = adapted("qwen2", dropout=0.0)
    plain = backward_flops(model)
    model.checkpointing = True
    more = backward_flops(model) - plain
    batch = make_batch(conversations("qwen2"))
    with Flops() as counter, torch.no_grad():
        for block in model.blocks:
            block(model.embedding(batch.ids), model.context(batch.documents, torch.float32))
    c, down = model.config, model.config.ffn * model.config.width
    shrink = sum(adapter.lora_A.numel() for _, adapter in adapters(model)) // c.layers
    assert more == counter.total - c.layers * 2 * len(batch.ids) * (down + shrink)


def test_attention_kept_is_not_attended_again():
    calls = []

    def counting(*args: Any, **form: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return real(*args, **form)

    real = stream.attention_forward
    model = adapted("qwen3")
    model.checkpointing = model.keep_attention = True
    with patch.object(stream, "attention_forward", counting):
        loss_and_gradients(model)
    assert calls == [False] * model.config.layers


def test_a_block_keeps_its_input_and_every_s():
    """What autograd saves of a stream does not grow with the width of the MLP; an S has 3 numbers a token and adapter."""
    model = adapted("qwen2", dropout=0.0)
    model.checkpointing = True
    batch = make_batch(conversations("qwen2"))
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: list[int] = []

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in parameters:
            saved.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(batch.ids, batch.documents)
    width, tokens = model.config.width, len(batch.ids)
    wide, narrow = [n for n in saved if n > 9 * tokens], [n for n in saved if n <= 9 * tokens]
    assert wide.count(width * tokens) == len(wide) <= model.config.layers + 2
    assert sum(narrow) == tokens + 3 * tokens * sum(1 for _ in adapters(model))
