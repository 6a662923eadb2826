"""Weights of experts and adapters on them in each spelling of files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from oracle import IDS, randomise, tiny, tiny_folder
from torch import Tensor

from minilora import add_lora, load_adapter, load_model, merge, save_adapter, save_model
from minilora.checkpoint.places import places
from minilora.errors import ModelError
from minilora.experts import expert_linears
from minilora.files.safetensors import SafetensorsFile, write_tensors
from minilora.kernels.quantized import QuantizedWeight
from minilora.lora import adapters
from minilora.models.decoder import Decoder
from minilora.models.stream import Documents

SPELLINGS = ["apart", "stacked", "transposed"]


def folder_in(spelling: str, folder: Path, family: str = "qwen3_moe") -> Path:
    """A tiny model, its experts apart, or stacked in one tensor that may be transposed."""
    tiny_folder(folder, family)
    if spelling == "apart":
        return folder
    model, file = tiny(family), folder / "model.safetensors"
    old = SafetensorsFile(file)
    tensors = {name: old.tensor(name).clone() for name in old.entries if ".experts." not in name}
    for path, linear in expert_linears(model).items():
        stack = linear.weight.detach().view(linear.experts, linear.out_features, linear.in_features)
        tensors[path] = stack.transpose(1, 2).contiguous() if spelling == "transposed" else stack
    file.unlink()
    write_tensors(file, tensors)
    return folder


def logits(model: Decoder) -> Tensor:
    return model.logits(IDS).detach()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_folder_is_read_and_written_in_its_spelling(tmp_path: Path, spelling: str):
    folder = folder_in(spelling, tmp_path / "m")
    model = load_model(folder, device="cpu")
    assert torch.equal(logits(model), logits(tiny("qwen3_moe")))
    add_lora(model, r=3, alpha=6)
    randomise(model)
    adapted = logits(model)
    merge(model)
    assert (logits(model) - adapted).abs().max() < 1e-5 * adapted.abs().max()
    save_model(model, tmp_path / "out", folder)
    old, new = (SafetensorsFile(f / "model.safetensors").entries for f in (folder, tmp_path / "out"))
    assert {n: e.shape for n, e in old.items()} == {n: e.shape for n, e in new.items()}
    assert torch.equal(logits(load_model(tmp_path / "out", device="cpu")), logits(model))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_places_hold_every_row_once(spelling: str, tmp_path: Path):
    model, file = tiny("qwen3_moe"), SafetensorsFile(folder_in(spelling, tmp_path / "m") / "model.safetensors")
    found = places(model, {name: entry.shape for name, entry in file.entries.items()})
    for path, linear in expert_linears(model).items():
        rows = sorted((p.rows.start, p.rows.stop) for p in found.values() if p.name == f"{path}.weight")
        assert [r for span in rows for r in range(*span)] == list(range(len(linear.weight)))
        for name, place in found.items():
            if place.name == f"{path}.weight":
                value = file.tensor(name)
                assert torch.equal(place.matrix(value), linear.weight[place.rows])
                assert torch.equal(place.tensor(place.matrix(value)), value)


def test_a_matrix_of_one_expert_that_is_missing_is_named(tmp_path: Path):
    folder = folder_in("apart", tmp_path / "m")
    old = SafetensorsFile(folder / "model.safetensors")
    gone = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors = {name: old.tensor(name).clone() for name in old.entries if name != gone}
    (folder / "model.safetensors").unlink()
    write_tensors(folder / "model.safetensors", tensors)
    with pytest.raises(ModelError, match=f"missing: {gone}"):
        load_model(folder, device="cpu")


def test_a_layer_for_several_tokens_at_once_is_passed_over(tmp_path: Path):
    folder = tiny_folder(tmp_path / "m", "glm4_moe")
    old = SafetensorsFile(folder / "model.safetensors")
    tensors = {name: old.tensor(name).clone() for name in old.entries}
    tensors |= {f"model.layers.2.{name}": torch.ones(3) for name in ("enorm.weight", "mlp.experts.0.up_proj.weight")}
    (folder / "model.safetensors").unlink()
    write_tensors(folder / "model.safetensors", tensors)
    assert torch.equal(logits(load_model(folder, device="cpu")), logits(tiny("glm4_moe")))


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_experts_are_quantised_like_other_linears(tmp_path: Path, quant: str):
    folder = folder_in("apart", tmp_path / "m")
    model, plain = load_model(folder, device="cpu", quant=quant), load_model(folder, device="cpu")
    for path, linear in expert_linears(model).items():
        weight, true = linear.weight, plain.get_parameter(f"{path}.weight")
        assert isinstance(weight, QuantizedWeight) and weight.name == quant
        whole = weight.weight_as(torch.float32)
        assert 0 < (whole - true).norm() / true.norm() < (0.15 if quant == "nf4" else 0.01)
    assert model.get_submodule("model.layers.0.mlp.gate").weight.dtype == torch.float32  # a router chooses as it did
    add_lora(model, r=3)
    randomise(model)
    model(IDS, Documents.of([len(IDS)])).sum().backward()
    assert all(w.lora_A.grad is not None for _, w in adapters(model))


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "glm4_moe"])
@pytest.mark.parametrize("single", [False, True], ids=["stacked", "single"])
@pytest.mark.parametrize("shared", [False, True], ids=["each", "shared-outer"])
@pytest.mark.parametrize(
    "targets", ["all-linear", "experts", "experts.down_proj", "experts.gate_up_proj", "attention,gate"]
)
def test_an_adapter_comes_back(tmp_path: Path, family: str, single: bool, shared: bool, targets: str):
    """In either layout: the logits to the bit, and adapters of the same shapes where nothing had to be joined."""
    model = tiny(family)
    add_lora(model, targets, r=3, alpha=6, shared_outer=shared)
    randomise(model)
    save_adapter(model, tmp_path / "a", single=single)
    other = tiny(family)
    load_adapter(other, tmp_path / "a")
    assert torch.equal(logits(other), logits(model))
    mine, back = ({path: (w.lora_A.shape, w.lora_B.shape, w.scale) for path, w in adapters(m)} for m in (model, other))
    assert mine == back


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 6 / 3**0.5)])
def test_gate_and_up_with_an_a_each_are_one_of_twice_the_rank(tmp_path: Path, rslora: bool, scale: float):
    model = tiny("qwen3_moe")
    add_lora(model, "experts", r=3, alpha=6, rslora=rslora)
    randomise(model)
    save_adapter(model, tmp_path / "a", single=True)
    file = tmp_path / "a" / "adapter_model.safetensors"
    old = SafetensorsFile(file)
    tensors = {name: old.tensor(name).clone() for name in old.entries}
    for name in tensors:
        if ".up_proj.lora_A" in name:
            tensors[name] += 1.0
    file.unlink()
    write_tensors(file, tensors)
    other = tiny("qwen3_moe")
    load_adapter(other, tmp_path / "a")
    stack = dict(adapters(other))["model.layers.0.mlp.experts.gate_up_proj"]
    assert stack.r == 6 and stack.scale == pytest.approx(scale, rel=1e-12)
    for e in range(5):
        for half, part in enumerate(("gate_proj", "up_proj")):
            key = f"base_model.model.model.layers.0.mlp.experts.{e}.{part}"
            wanted = tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
            found = (stack.lora_B[e] @ stack.lora_A[e])[12 * half : 12 * (half + 1)]
            assert (found - wanted).abs().max() < 1e-6


def test_an_expert_without_its_adapter_is_named(tmp_path: Path):
    model = tiny("qwen3_moe")
    add_lora(model, "experts", r=3)
    save_adapter(model, tmp_path / "a", single=True)
    file = tmp_path / "a" / "adapter_model.safetensors"
    old = SafetensorsFile(file)
    tensors = {name: old.tensor(name).clone() for name in old.entries if ".experts.2." not in name}
    file.unlink()
    write_tensors(file, tensors)
    with pytest.raises(ModelError, match="experts"):
        load_adapter(tiny("qwen3_moe"), tmp_path / "a")


def test_dropout_is_not_said_to_peft_and_comes_back(tmp_path: Path):
    """PEFT takes no dropout on target_parameters."""
    model = tiny("qwen3_moe")
    add_lora(model, r=3, dropout=0.1)
    save_adapter(model, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["lora_dropout"] == 0.0
    other = tiny("qwen3_moe")
    load_adapter(other, tmp_path / "a")
    assert {w.dropout for _, w in adapters(other)} == {0.1}
    shutil.rmtree(tmp_path / "a")
