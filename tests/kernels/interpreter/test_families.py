"""Whole models on the Triton kernels: they compute what the torch paths compute, as nearly as rounding allows."""

from statistics import geometric_mean

import pytest
import torch
from oracle import OWN, SOP, randomise, tiny

from minilora import add_lora
from minilora.kernels.dispatch import kernels_enabled, use_triton
from minilora.models.stream import Documents


def loss_and_gradients(
    family: str, dtype: torch.dtype, triton: bool, checkpointing: bool, seed: int = 1
) -> list[torch.Tensor]:
    model = tiny(family, dtype)
    add_lora(model, r=3, alpha=6)
    randomise(model, seed)
    model.to(dtype).train()
    model.checkpointing = checkpointing
    ids = torch.tensor([3, 1, 4, SOP, 5, 9, 2, 6, 5, 35, SOP, 57, 8])
    documents = Documents.of([6, 7], [3, 4] if family == "chatglm" else None)
    with kernels_enabled(triton):
        hidden = model(ids, documents)
        hidden.square().sum().backward()
    return [hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


# of each kind of block one, the others among the long tests
FEW = ("qwen3", "glm4", "chatglm", "qwen3_moe", "qwen3_5_moe")


@pytest.mark.parametrize("family", [pytest.param(f, marks=[] if f in FEW else pytest.mark.long) for f in OWN])
def test_a_model_on_its_kernels(family: str):
    """Twice as wrong as plain torch at the most, in the mean square over all values and on average over models.

    Two layers spread the rounding of a few values over all others: how much is a matter of the weights, and of one model chance.
    """
    assert use_triton()

    ratios = []
    for seed, checkpointing in enumerate([False, True, False]):
        ours, plain, truth = (
            loss_and_gradients(family, dtype, triton, checkpointing, seed)
            for dtype, triton in ((torch.float32, True), (torch.float32, False), (torch.float64, False))
        )
        assert error(ours, truth) < 1e-4
        ratios.append(error(ours, truth) / error(plain, truth))
    assert geometric_mean(ratios) <= 2


def error(found: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    """The root of the mean square of all errors, those of each tensor in units of its largest value."""
    assert len(found) == len(truth) > 10
    units = [
        ((t - exact) / exact.abs().max().clamp_min(1e-30)).flatten() for t, exact in zip(found, truth, strict=True)
    ]
    return float(torch.cat(units).square().mean().sqrt())
