"""The experts of a mixture as one operation: the rule for output and gradients, and what must not matter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import check_op
from torch import Tensor

from minilora.kernels import expert_rows
from minilora.kernels.dropout import DropoutKey
from minilora.kernels.lora_experts import Routing, lora_experts, lora_experts_ref
from minilora.kernels.nf4 import NF4Weight
from minilora.kernels.projection import Adapter, Projection

T, D, F, E, K, R = 13, 24, 12, 5, 2, 3
SHARES = {"each its own": (E, E, E, E), "shared outer": (1, E, E, 1), "all shared": (1, 1, 1, 1)}


def tensors(shares: tuple[int, ...] = (E, E, E, E), dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, w, and of gate_up and down the weight, A and B; w of a routing that leaves expert 3 without tokens."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    a1, b1, a2, b2 = shares
    return [
        random(T, D).to(dtype), random(T, K).softmax(-1), random(E * 2 * F, D).to(dtype) * D**-0.5, random(a1, R, D) * D**-0.5,
        random(b1, 2 * F, R), random(E * D, F).to(dtype) * F**-0.5, random(a2, R, F) * F**-0.5, random(b2, D, R),
    ]  # fmt: skip


def routing(tokens: int = T) -> Routing:
    generator = torch.Generator().manual_seed(1)
    index = torch.stack([torch.tensor([0, 1, 2, 4])[torch.randperm(4, generator=generator)[:K]] for _ in range(tokens)])
    return Routing.of(index, E)


def op(function: Callable, p: float = 0.0, adapted: tuple[bool, bool] = (True, True)) -> Callable:
    def call(x: Tensor, w: Tensor, w1: Tensor, a1: Tensor, b1: Tensor, w2: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        first, last = (Adapter(a, b, 1.5, p, DropoutKey(0, 1, 2, j)) for j, (a, b) in enumerate(((a1, b1), (a2, b2))))
        gate_up = Projection(w1, None, first if adapted[0] else None)
        down = Projection(w2, None, last if adapted[1] else None)
        return function(x, w, routing(len(x)), gate_up, down)

    return call


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_the_rule(shares: tuple[int, ...], p: float):
    check_op(op(lora_experts, p), op(lora_experts_ref, p), tensors(shares), (0, 1, 3, 4, 6, 7))


@pytest.mark.parametrize("shares", [(E, E, E, E), (1, E, E, 1)], ids=["each its own", "shared outer"])
def test_uneven_experts_in_several_parts(shares: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    """Blocks of several rows, experts of one block and of many, rows behind the experts of a part."""
    monkeypatch.setattr(expert_rows, "AT_ONCE", 128 * D)
    index = torch.tensor([[0, 1 + t % 2 + (t % 37 == 0)] for t in range(75)])
    rows = Routing.of(index, E).rows(D)
    assert rows.block == 32 and [part.numbers for part in rows.parts] == [[0], [1, 2], [3]]
    assert rows.parts[0].batch * rows.block > rows.parts[0].sizes[0] > 75
    few, *rest = tensors(shares)
    x, w = few[torch.arange(75) % T] * torch.linspace(-1, 1, 75)[:, None], rest[0][torch.arange(75) % T]

    def call(function: Callable) -> Callable:
        return lambda x, w, w1, a1, b1, w2, a2, b2: function(
            x, w, Routing.of(index, E), Projection(w1, None, Adapter(a1, b1, 1.5, 0.25, DropoutKey(0, 1, 2, 0))),
            Projection(w2, None, Adapter(a2, b2, 1.5, 0.25, DropoutKey(0, 1, 2, 1))),
        )  # fmt: skip

    check_op(call(lora_experts), call(lora_experts_ref), [x, w, *rest[1:]], (0, 1, 3, 4, 6, 7))


@pytest.mark.parametrize(
    ("adapted", "trained"), [((True, False), (0, 1, 3, 4)), ((False, True), (0, 1, 6, 7)), ((False, False), (0, 1))]
)
def test_linears_without_adapters(adapted: tuple[bool, bool], trained: tuple[int, ...]):
    check_op(op(lora_experts, 0.0, adapted), op(lora_experts_ref, 0.0, adapted), tensors(), trained)


@pytest.mark.parametrize("trained", [(4,), (6,), (0,), (1,), (3, 7)])
def test_only_what_is_needed(trained: tuple[int, ...]):
    check_op(op(lora_experts), op(lora_experts_ref), tensors(), trained)


def test_trained_weights_of_experts():
    check_op(op(lora_experts), op(lora_experts_ref), tensors(), (0, 2, 5))


def test_weights_stored_in_another_dtype_and_quantised():
    x, w, w1, a1, b1, w2, a2, b2 = tensors()
    for stored in (lambda t: t.bfloat16(), NF4Weight.of):
        first, last = stored(w1), stored(w2)
        wide = (
            [first.float(), last.float()]
            if isinstance(first, Tensor)
            else [t.weight_as(torch.float32) for t in (first, last)]
        )
        given: list[Any] = [x, w, first, a1, b1, last, a2, b2]
        plain = [x, w, wide[0], a1, b1, wide[1], a2, b2]
        found, wanted = [], []
        for arguments, results in ((given, found), (plain, wanted)):
            leaves = [t.clone().requires_grad_(i in (0, 3)) if i in (0, 3) else t for i, t in enumerate(arguments)]
            y = op(lora_experts)(*leaves)
            y.sum().backward()
            results += [y.detach(), leaves[0].grad, leaves[3].grad]
            with torch.inference_mode():
                assert (op(lora_experts)(*arguments) - y).abs().max() < 1e-5
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_an_expert_without_tokens_has_a_gradient_of_zeros():
    leaves = [t.requires_grad_(i in (3, 7)) for i, t in enumerate(tensors())]
    op(lora_experts)(*leaves).sum().backward()
    for leaf in (leaves[3], leaves[7]):
        assert leaf.grad is not None
        assert not leaf.grad[3].any() and all(leaf.grad[e].any() for e in (0, 1, 2, 4))


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_a_token_does_not_depend_on_those_after_it(p: float):
    """Sorting moves its slots, and nothing else changes: to the bit where its expert's product has as many rows."""
    x, *rest = [t.double() for t in tensors()]
    w = rest.pop(0)
    few, all_of_them = op(lora_experts, p)(x[:9], w[:9], *rest), op(lora_experts, p)(x, w, *rest)
    assert (few - all_of_them[:9]).abs().max() < 1e-12


def test_the_same_input_gives_the_same_bits():
    def once() -> list[Tensor]:
        leaves = [t.requires_grad_(i in (0, 1, 3, 4, 6, 7)) for i, t in enumerate(tensors())]
        y = op(lora_experts)(*leaves)
        y.square().sum().backward()
        return [y.detach(), *(t.grad for t in leaves if t.grad is not None)]

    assert all(map(torch.equal, once(), once()))


def test_what_does_not_fit_is_named():
    x, w, *rest = tensors()
    with pytest.raises(ValueError, match=r"gate_up is \[120, 20\]"):
        op(lora_experts)(x, w, rest[0][:, :20], *rest[1:])
    with pytest.raises(ValueError, match="A and B of down"):
        op(lora_experts)(x, w, *rest[:4], rest[4][:2], rest[5])
    with pytest.raises(ValueError, match="weights are"):
        op(lora_experts)(x, w[:3], *rest)
