"""Against what transformers and peft compute: logits, loss, adapters and their gradients (tests/golden, fp32)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import minilora
from minilora.data import IGNORE
from minilora.kernels.linear_cross_entropy import linear_cross_entropy
from minilora.lora import adapters

GOLDEN = Path(__file__).parent / "golden"
MODELS = ["qwen2", "qwen2_sliding", "qwen2_yarn", "qwen3"]


def packed_loss(model, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean loss of rows [B, L] laid end to end; labels are not shifted."""
    count, length = ids.shape
    targets = torch.full_like(ids, IGNORE)
    targets[:, :-1] = labels[:, 1:]
    rows = (targets.flatten() != IGNORE).nonzero().squeeze(1)
    seams = [i * length for i in range(count + 1)]
    hidden = model(ids.flatten(), torch.arange(length).repeat(count), seams, rows)
    return linear_cross_entropy(hidden, model.head, targets.flatten()[rows]) / len(rows)


def logits(model, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.stack([model.logits(row) for row in ids])


@pytest.mark.parametrize("name", MODELS)
def test_base(name):
    model, expected = (
        minilora.load_model(GOLDEN / name, device="cpu"),
        load_file(GOLDEN / name / "expected.safetensors"),
    )
    ids, labels = expected["input_ids"], expected["labels"]
    assert (logits(model, ids) - expected["logits"]).abs().max() < 2e-5
    assert (packed_loss(model, ids, labels) - expected["loss"]).abs().max() < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_adapter(name):
    model, expected = (
        minilora.load_model(GOLDEN / name, device="cpu"),
        load_file(GOLDEN / name / "expected.safetensors"),
    )
    minilora.load_adapter(model, GOLDEN / name / "adapter")
    ids, labels = expected["input_ids"], expected["labels"]
    assert (logits(model, ids) - expected["adapter_logits"]).abs().max() < 2e-5
    loss = packed_loss(model, ids, labels)
    assert (loss - expected["adapter_loss"]).abs().max() < 1e-5
    loss.backward()
    found = {}
    for path, wrapper in adapters(model):
        for half in ("lora_A", "lora_B"):
            found[f"grad.base_model.model.{path}.{half}.weight"] = getattr(wrapper, half).grad
    assert found.keys() == {k for k in expected if k.startswith("grad.")}
    for key, grad in found.items():
        assert (grad - expected[key]).norm() < 1e-4 * expected[key].norm(), key
