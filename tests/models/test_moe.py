"""Routers against their definitions, expert by expert in plain Python; experts that had no token; what a mixture costs."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import conversations, tiny
from torch import Tensor

from minilora import add_lora
from minilora.data import make_batch
from minilora.experts import experts_note, seen_note
from minilora.machine.dry_run import step_memory
from minilora.machine.flops import flops_per_token
from minilora.models.decoder import Decoder
from minilora.models.moe import Experts, Gate, MoEConfig, choose


def config(**changes) -> MoEConfig:
    c = tiny("glm4_moe" if changes.pop("sigmoid") else "qwen3_moe").config
    assert isinstance(c, MoEConfig)
    return replace(c, **changes)


def by_hand(c: MoEConfig, logits: list[float], bias: list[float] | None) -> dict[int, float]:
    """Expert -> weight for one token."""
    if bias is None:
        total = sum(math.exp(z) for z in logits)
        scores = wish = [math.exp(z) / total for z in logits]
    else:
        scores = [1 / (1 + math.exp(-z)) for z in logits]
        wish = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(logits) // c.groups
    groups = [range(g * size, (g + 1) * size) for g in range(c.groups)]
    best = sorted(groups, key=lambda g: -sum(sorted((wish[e] for e in g), reverse=True)[:2]))[: c.chosen_groups]
    open_ = [e for g in best for e in g] if c.groups > 1 else range(len(logits))
    taken = sorted(open_, key=lambda e: -wish[e])[: c.chosen]
    norm = sum(scores[e] for e in taken) if c.normalise else 1.0
    return {e: c.scale * scores[e] / norm for e in taken}


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(
    ("sigmoid", "groups", "chosen_groups"), [(False, 1, 1), (True, 1, 1), (True, 4, 2), (True, 3, 1)]
)
def test_a_router_is_its_definition(sigmoid: bool, groups: int, chosen_groups: int, normalise: bool):
    """A mistake in any part (the norm, the bias in the weight, the order, the groups, the scale) changes what is expected here."""
    scale = 2.5 if sigmoid else 1.0
    c = config(
        sigmoid=sigmoid,
        experts=12,
        chosen=3,
        groups=groups,
        chosen_groups=chosen_groups,
        normalise=normalise,
        scale=scale,
    )
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 12, generator=generator, dtype=torch.float64)
    bias = 0.3 * torch.randn(12, generator=generator, dtype=torch.float64) if sigmoid else None
    weights, index = choose(c, logits, bias)
    for row, token_weights, experts in zip(logits.tolist(), weights.tolist(), index.tolist(), strict=True):
        wanted = by_hand(c, row, None if bias is None else bias.tolist())
        assert set(experts) == set(wanted)
        for e, w in zip(experts, token_weights, strict=True):
            assert abs(w - wanted[e]) < 1e-12


def test_the_gradient_of_a_router_goes_through_the_weights():
    c = config(sigmoid=True, experts=6, chosen=2, groups=1, chosen_groups=1)
    logits = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64)

    def weights(z: Tensor) -> Tensor:
        return choose(c, z, bias)[0]

    assert torch.autograd.gradcheck(weights, (logits,))


def test_the_bias_of_a_choice_stays_in_fp32():
    gate = Gate(config(sigmoid=True))
    gate.e_score_correction_bias.data = torch.full((6,), 1.0 + 2**-12)
    gate.to(torch.bfloat16)
    assert gate.weight.dtype == torch.bfloat16 and gate.e_score_correction_bias.dtype == torch.float32
    assert gate.e_score_correction_bias[0] == 1.0 + 2**-12
    assert gate.double().e_score_correction_bias.dtype == torch.float64
    assert not gate.requires_grad_(True).e_score_correction_bias.requires_grad


def test_experts_that_saw_tokens_are_counted():
    model = tiny("qwen3_moe")
    add_lora(model, r=3)
    batch = make_batch(conversations("qwen3_moe"))
    model.eval().loss(batch)
    assert seen_note(model) is not None and not any(m.seen.any() for m in model.modules() if isinstance(m, Experts))
    model.train().loss(batch)
    told = seen_note(model)
    assert told is not None and "experts saw tokens" in told
    first = next(m for m in model.modules() if isinstance(m, Experts))
    first.seen[2] = False
    told = seen_note(model)
    assert told is not None and "9 of 10 experts saw tokens" in told and "4 to 5" in told
    assert seen_note(tiny("qwen2")) is None


@pytest.mark.parametrize(
    ("targets", "adapted", "routers"),
    [
        ("all-linear", "10 of 10 (30", "frozen"),
        ("attention", "0 of 10 (0", "frozen"),
        ("gate", "0 of 10 (0", "trained"),
    ],
)
def test_the_header_counts_experts(targets: str, adapted: str, routers: str):
    model = tiny("qwen3_moe")
    add_lora(model, targets, r=3)
    told = experts_note(model)
    assert (
        told
        == f"5 in each of 2 layers, 2 for a token; adapters on {adapted} matrices); routers {routers}, no auxiliary loss"
    )


def test_a_token_pays_for_the_experts_that_it_has():
    model = tiny("qwen3_moe")
    add_lora(model, r=3)
    (each, _), c = flops_per_token(model, full=False), model.config
    assert isinstance(c, MoEConfig)
    attention = 2 * c.width * (c.heads + c.kv_heads) * c.head_size
    experts = 2 * 3 * c.width * c.expert_ffn  # of two, three matrices each
    narrow = 3 * (3 * c.width + (c.heads + 2 * c.kv_heads) * c.head_size + c.heads * c.head_size + c.width)
    narrow += 2 * 3 * (c.width + 2 * c.expert_ffn + c.expert_ffn + c.width)
    assert each == pytest.approx(c.layers * (4 * (attention + experts + c.width * c.experts) + 6 * narrow))


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "glm4_moe", "glm4_moe_lite"])
def test_memory_is_counted_without_values(family: str):
    """On the meta device, where no token has an expert; layers of one kind are counted by the third of them."""
    changes: dict[str, Any] = {"mlp_only_layers": [0]} if family == "qwen2_moe" else {}
    batch = make_batch(conversations(family))
    whole = step_memory(tiny_on_meta(family, 7, changes), batch)
    assert whole.activations > 0 and whole.weights > 0
    less = step_memory(tiny_on_meta(family, 6, changes), batch)
    least = step_memory(tiny_on_meta(family, 5, changes), batch)
    assert whole.activations - less.activations == less.activations - least.activations > 0


def tiny_on_meta(family: str, layers: int, changes: dict[str, Any]) -> Decoder:
    model = tiny(family, torch.float32, 0, **(changes | {"num_hidden_layers": layers}))
    add_lora(model, r=3)
    return model.to("meta").train()
