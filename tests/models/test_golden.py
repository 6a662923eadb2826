"""Against what transformers, peft and the models' original code compute (tests/golden, fp32).

Logits, loss, and gradients of adapters or of base weights. The original code of ChatGLM3 gave the files of chatglm2 to the
byte: one folder stands for both.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import minilora
from minilora.checkpoint.expert_adapters import files_of
from minilora.data import IGNORE, Example, make_batch
from minilora.lora import adapters
from minilora.models.decoder import Decoder
from minilora.models.moe import ExpertLinear

GOLDEN = Path(__file__).parents[1] / "golden"
ADAPTED = [
    "qwen3_5_text",
    "gpt2",
    "qwen2",
    "qwen2_sliding",
    "qwen2_yarn",
    "qwen3",
    "glm",
    "glm4",
    "qwen3_nf4",
    "qwen3_fp8",
]
MIXTURES = ["qwen2_moe", "qwen3_moe", "glm4_moe", "glm4_moe_lite", "qwen3_next", "qwen3_5_moe_text"]
ORIGINAL = ["chatglm", "chatglm2", "qwen"]


def load(name: str) -> tuple[Decoder, dict[str, Tensor]]:
    return minilora.load_model(GOLDEN / name, device="cpu"), load_file(GOLDEN / name / "expected.safetensors")


def documents(model: Decoder, expected: dict[str, Tensor]) -> list[Example]:
    """The rows of the golden without their padding on the left; labels are not shifted."""
    found = []
    for i, (ids, labels) in enumerate(zip(expected["input_ids"], expected["labels"], strict=True)):
        kept = expected["attention_mask"][i].bool() if "attention_mask" in expected else torch.ones_like(ids).bool()
        targets = torch.full_like(ids[kept], IGNORE)
        targets[:-1] = labels[kept][1:]
        found.append(Example(ids[kept].numpy(), targets.numpy(), str(i), (model.prefix_lens(ids[kept]) or [None])[0]))
    return found


def packed_loss(model: Decoder, examples: list[Example]) -> Tensor:
    """Mean loss of documents laid end to end."""
    batch = make_batch(examples)
    return model.loss(batch) / len(batch.targets)


@torch.no_grad()
def assert_logits(model: Decoder, examples: list[Example], expected: Tensor) -> None:
    """Logits of every document alone, on the right of each row of expected [B, L, V]."""
    for example, row in zip(examples, expected, strict=True):
        ids = torch.from_numpy(example.ids)
        assert (model.logits(ids) - row[len(row) - len(ids) :]).abs().max() < 2e-5


def assert_gradients(found: dict[str, Tensor | None], expected: dict[str, Tensor]) -> None:
    for key, grad in found.items():
        assert grad is not None and (grad - expected[key]).norm() < 1e-4 * expected[key].norm(), key


@pytest.mark.parametrize("name", ADAPTED + MIXTURES + ORIGINAL)
def test_base(name):
    model, expected = load(name)
    examples = documents(model, expected)
    model.train()  # what Qwen-1 computes in evaluation is tested below
    assert_logits(model, examples, expected["logits"])
    assert (packed_loss(model, examples) - expected["loss"]).abs().max() < 1e-5


@pytest.mark.parametrize("name", ORIGINAL)
def test_gradients_of_base_weights(name):
    model, expected = load(name)
    wanted = {key.removeprefix("grad.") for key in expected if key.startswith("grad.")}
    assert len(wanted) > 8
    trained = {name: p.requires_grad_(True) for name, p in model.named_parameters() if name in wanted}
    packed_loss(model.train(), documents(model, expected)).backward()
    assert trained.keys() == wanted
    assert_gradients({f"grad.{name}": p.grad for name, p in trained.items()}, expected)


def test_qwen1_beyond_its_trained_length():
    """20 tokens where 8 were trained: dynamic NTK and logn, in evaluation."""
    model, expected = load("qwen")
    examples = documents(model, expected)
    assert_logits(model.eval(), examples, expected["eval_logits"])
    assert (expected["eval_logits"] - expected["logits"]).abs().max() > 0.01


@pytest.mark.parametrize("name", ADAPTED + MIXTURES)
def test_adapter(name):
    model, expected = load(name)
    minilora.load_adapter(model, GOLDEN / name / "adapter")
    examples = documents(model, expected)
    assert_logits(model, examples, expected["adapter_logits"])
    loss = packed_loss(model, examples)
    assert (loss - expected["adapter_loss"]).abs().max() < 1e-5
    loss.backward()
    found = {}
    for path, wrapper in adapters(model):
        a, b = wrapper.lora_A.grad, wrapper.lora_B.grad
        named = {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
        if isinstance(wrapper.base, ExpertLinear) and a is not None and b is not None:  # as peft stacks them
            named = files_of(path, wrapper.base, a, b, single=False, both=True)
        found |= {f"grad.base_model.model.{name}": grad for name, grad in named.items()}
    assert found.keys() == {k for k in expected if k.startswith("grad.")}
    assert_gradients(found, expected)
