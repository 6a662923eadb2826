"""A training step of every family on a GPU without data: a tensor on the wrong device or of the wrong dtype is an error here."""

from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from oracle import OWN, WIDE, conversations, tiny
from torch import Tensor

from bench.proof.fake_cuda import FakeCuda, fake_cuda
from minilora import add_lora
from minilora.data import make_batch
from minilora.kernels import attention
from minilora.kernels.dispatch import kernels_enabled
from minilora.kernels.group import Group
from minilora.kernels.lang import INTERPRETED
from minilora.models import layers
from minilora.run.setup import optimizer_of
from minilora.settings import resolve
from minilora.train import train_step

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter launches nothing")
families = pytest.mark.parametrize("family", OWN)
MIXTURES = {family for family in OWN if "num_experts_per_tok" in OWN[family]}


def step_of(family: str, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> FakeCuda:
    """An optimizer step of two streams."""
    config = resolve({"lora_r": 4, **settings})
    model = tiny(family, dtype, **WIDE[family])
    add_lora(model, r=config.lora_r, dropout=config.lora_dropout)
    model.checkpointing = model.keep_attention = config.checkpointing
    examples = conversations(family)
    with fake_cuda(90) as cuda:
        model.to("cuda").train()
        assert model.head.device.type == "cuda" and model.head.is_cuda
        optimizer = optimizer_of(model, config)
        streams = [make_batch(examples[:1]), make_batch(examples)]
        assert train_step(model, optimizer, streams, config, 0).read() == (0.0, 0.0)
    cuda.check_launches()
    return cuda


@families
@pytest.mark.parametrize("kernels", [True, False], ids=["triton", "torch"])
@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.1, "checkpointing": True}], ids=["plain", "dropout"])
def test_a_step_of_every_family(family: str, kernels: bool, settings: dict[str, Any]):
    with kernels_enabled(kernels):
        launched = {launch.name for launch in step_of(family, **settings).launches}
    if kernels:
        assert {"lora_gemm._input_gradient_kernel", "lora_shrink._shrink_backward_kernel"} <= launched
        assert ("rope._rotate_kernel" in launched) == (family != "gpt2")
        assert ("expert_gemm._input_gradient_kernel" in launched) == (family in MIXTURES)
    else:
        assert not launched


def test_attention_is_one_call_for_the_stream(monkeypatch: pytest.MonkeyPatch):
    """On the fake GPU as on a real one: its own path is what is tested."""
    calls = []
    forward = attention._cuda_forward
    monkeypatch.setattr(attention, "_cuda_forward", lambda *args: calls.append(args) or forward(*args))
    step_of("qwen2")
    assert len(calls) == 2 * 2  # layers, streams


def test_a_tensor_of_the_cpu_is_found(monkeypatch: pytest.MonkeyPatch):
    def forward(self: layers.RMSNorm, x: Tensor) -> Tensor:
        return x * torch.ones(x.shape[-1], dtype=x.dtype)

    monkeypatch.setattr(layers.RMSNorm, "forward", forward)
    with pytest.raises(RuntimeError, match=r"mul.*on cuda:0 and on the CPU"):
        step_of("qwen3")


def test_memory_of_the_cpu_in_a_launch_is_found(monkeypatch: pytest.MonkeyPatch):
    of_group = Group.of

    def of(projections: Any) -> Group:
        group = of_group(projections)
        return group._replace(a=tuple(torch.zeros(a.shape) for a in group.a))

    monkeypatch.setattr(Group, "of", of)
    with pytest.raises(RuntimeError, match=r"lora_shrink\._shrink.*: memory of the CPU"):
        step_of("qwen2")


def test_another_dtype_is_found(monkeypatch: pytest.MonkeyPatch):
    rotated = layers.rotated
    monkeypatch.setattr(layers, "rotated", lambda *args: tuple(t.float() for t in rotated(*args)))
    with pytest.raises((RuntimeError, ValueError), match="dtype|float32"):
        step_of("qwen2")
