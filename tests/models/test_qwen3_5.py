"""Qwen3.5: documents shorter than its convolution, and mistakes that would pass unseen, each planted and noticed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import conversation, randomise, tiny
from safetensors.torch import load_file
from torch import Tensor

import minilora
from minilora.data import IGNORE, Example, make_batch
from minilora.machine.dry_run import _turn
from minilora.machine.flops import attention_flops
from minilora.models import qwen3_5
from minilora.models.layers import RMSNorm
from minilora.models.stream import Documents

GOLDEN = Path(__file__).parents[1] / "golden" / "qwen3_5_text"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_documents_of_one_two_and_three_tokens_are_alone(checkpointing: bool):
    model = tiny("qwen3_5", torch.float64)
    minilora.add_lora(model, r=3, alpha=6)
    randomise(model)
    model.double().train()
    model.checkpointing = checkpointing
    examples = [conversation("qwen3_5", 1, n, n) for n in (2, 1, 40, 1, 2, 69)]

    def loss_and_gradients(streams: list[list[Example]]) -> list[Tensor]:
        losses = [model.loss(make_batch(stream)) for stream in streams]
        torch.stack(losses).sum().backward()
        found = [torch.stack(losses).sum().detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        model.zero_grad(set_to_none=True)
        return found

    packed, alone = loss_and_gradients([examples]), loss_and_gradients([[e] for e in examples])
    assert len(packed) == len(alone) > 20
    assert all((a - b).abs().max() <= 1e-12 * b.abs().max() for a, b in zip(packed, alone, strict=True))


def rule(**changed: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """gated_delta_rule with one of its arguments changed."""
    real: Any = qwen3_5.gated_delta_rule
    names = "q", "k", "v", "g", "beta"

    def wrong(*args: Any) -> Tensor:
        given = [changed.get(name, lambda x: x)(x) for name, x in zip(names, args[:5], strict=True)]
        return real(*given, changed.get("bounds", lambda x: x)(args[5]))

    return wrong


def one_document(bounds: Any) -> Any:
    return [bounds[0], bounds[-1]]


def halves_of_heads(model: Any) -> None:
    """As if q_proj gave all q, then all gates."""
    for module in model.modules():
        if isinstance(module, qwen3_5.GatedAttention):
            rows = (
                module.q_proj.weight.unflatten(0, (-1, 2, module.head_size))
                .transpose(0, 1)
                .reshape(module.q_proj.weight.shape)
            )
            module.q_proj.weight.data = rows.contiguous()


MISTAKES: dict[str, tuple[Any, str, Any]] = {
    "the state is not reset": (qwen3_5, "gated_delta_rule", rule(bounds=one_document)),
    "the convolution is not reset": (qwen3_5, "short_conv", lambda x, w, bounds: qwen3_5_conv(x, w, one_document(bounds))),
    "no beta": (qwen3_5, "gated_delta_rule", rule(beta=torch.ones_like)),
    "no decay": (qwen3_5, "gated_delta_rule", rule(g=torch.zeros_like)),
    "norms without offset": (qwen3_5.OffsetRMSNorm, "forward", RMSNorm.forward),
    "sums normed without offset": (qwen3_5.OffsetRMSNorm, "of_sum", RMSNorm.of_sum),
    "no gate of the heads": (qwen3_5, "swiglu", lambda z, o: o),
}  # fmt: skip
qwen3_5_conv = qwen3_5.short_conv


def packed_loss(change: Callable[[Any], None] = lambda _: None) -> tuple[Tensor, Tensor]:
    """The golden's loss by this model, on its rows laid end to end, and as transformers has it."""
    model, expected = minilora.load_model(GOLDEN, device="cpu"), load_file(GOLDEN / "expected.safetensors")
    change(model)
    examples = []
    for ids, labels in zip(expected["input_ids"], expected["labels"], strict=True):
        targets = torch.full_like(ids, IGNORE)
        targets[:-1] = labels[1:]
        examples.append(Example(ids.numpy(), targets.numpy(), ""))
    batch = make_batch(examples)
    return model.loss(batch) / len(batch.targets), expected["loss"]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_noticed(mistake: str, monkeypatch: pytest.MonkeyPatch):
    found, expected = packed_loss()
    assert (found - expected).abs() < 1e-5
    monkeypatch.setattr(*MISTAKES[mistake])
    found, expected = packed_loss()
    assert (found - expected).abs() > 3e-5  # goldens allow 1e-5


def test_gates_in_another_order_are_noticed():
    found, expected = packed_loss(halves_of_heads)
    assert (found - expected).abs() > 3e-5  # goldens allow 1e-5


def test_flops_count_the_state_and_the_layers_that_attend():
    c = tiny("qwen3_5").config
    attends, state, taps = 3 * 4 * c.heads * c.head_size, 3 * 6 * 4 * 6 * 5, 3 * 2 * 4 * (2 * 2 * 6 + 4 * 5)
    assert c.linear == (True, False)  # pyright: ignore[reportAttributeAccessIssue]
    assert attention_flops(c, Documents.of([10])) == attends * 55 + 10 * (state + taps)


@pytest.mark.parametrize(("layers", "turn"), [(1, 1), (2, 2), (6, 2), (7, 2)])
def test_turns_of_layers(layers: int, turn: int):
    assert _turn(tiny("qwen3_5", num_hidden_layers=layers).config) == turn
    assert _turn(tiny("qwen2").config) == 1
