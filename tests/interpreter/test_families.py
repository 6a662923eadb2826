"""Whole models on the Triton kernels: they compute what the torch paths compute, as nearly as rounding allows."""

import pytest
import torch
from oracle import OWN, SOP, randomise, tiny

from minilora import add_lora
from minilora.kernels.dispatch import force, use_triton
from minilora.models.rotary import positions_of


def loss_and_gradients(family: str, dtype: torch.dtype, triton: bool, checkpointing: bool) -> list[torch.Tensor]:
    model = tiny(family, dtype)
    add_lora(model, r=3, alpha=6)
    randomise(model)
    model.to(dtype).train()
    model.checkpointing = checkpointing
    ids = torch.tensor([3, 1, 4, SOP, 5, 9, 2, 6, 5, 35, SOP, 57, 8])
    prefixes = [3, 4] if family == "chatglm" else None
    positions = torch.cat([positions_of(0, n, p) for n, p in ((6, 3), (7, 4))], dim=-1)
    with force(triton):
        hidden = model(ids, positions if prefixes else positions_of(0, 13), [0, 6, 13], prefixes=prefixes)
        hidden.square().sum().backward()
    return [hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", OWN)
def test_a_model_on_its_kernels(family: str, checkpointing: bool):
    assert use_triton()
    ours, plain, truth = (
        loss_and_gradients(family, dtype, triton, checkpointing)
        for dtype, triton in ((torch.float32, True), (torch.float32, False), (torch.float64, False))
    )
    assert len(ours) == len(truth) > 10
    scales = [exact.abs().max() for exact in truth]
    found, yard, exact = (together(tensors, scales).double() for tensors in (ours, plain, truth))
    # through two layers the largest error of thousands is chance, their mean square is none
    wrong, plain_wrong = ((each - exact).square().mean().sqrt() for each in (found, yard))
    assert wrong <= 2 * plain_wrong < 1e-5, f"{family}: {wrong:.3g}, in plain torch {plain_wrong:.3g}"


def together(tensors: list[torch.Tensor], scales: list[torch.Tensor]) -> torch.Tensor:
    """All values in one vector, each tensor's in units of its scale."""
    units = [t / scale.clamp_min(1e-30).to(t.dtype) for t, scale in zip(tensors, scales, strict=True)]
    return torch.cat([u.flatten() for u in units])
