"""minilora merge: the folder is base + adapter, proven from the disk, or it is not there."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from tiny import make_model

import minilora
import minilora.checkpoint.merge as merge_module
from minilora.checkpoint.merge import merge_folder
from minilora.checkpoint.verify import largest_difference, logits_of, prompt_ids
from minilora.errors import DiskError, ModelError, OutputInUse, UsageError
from minilora.files.safetensors import SafetensorsFile, write_tensors
from minilora.lora import LoRALinear, adapters, add_lora
from minilora.machine import compute
from minilora.text.tokenizer import load_tokenizer


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def trained(request, tmp_path):
    """A model folder and an adapter folder that changes it."""
    folder = make_model(tmp_path / "model", request.param, tie_word_embeddings=request.param == torch.float32)
    model = minilora.load_model(folder, device="cpu")
    add_lora(model, r=3, alpha=6)
    generator = torch.Generator().manual_seed(0)
    for _, wrapper in adapters(model):
        wrapper.lora_B.data.normal_(0, 0.05, generator=generator)
    minilora.save_adapter(model, tmp_path / "adapter")
    return folder, tmp_path / "adapter", model


@pytest.mark.parametrize("family", ["qwen2", "glm", "glm4"])
def test_every_family_merges(tmp_path, family, monkeypatch):
    """With an adapter of other tools, which tells of no base and has a chat template of its own."""

    def with_its_own(*folders):
        tokenizer = load_tokenizer(*folders)
        tokenizer.replaced["chat_template.jinja"] = b"its own"
        return tokenizer

    monkeypatch.setattr(merge_module, "load_tokenizer", with_its_own)
    folder = make_model(tmp_path / "model", torch.bfloat16, model_type=family)
    model = minilora.load_model(folder, device="cpu")
    add_lora(model, r=3, alpha=6)
    for _, wrapper in adapters(model):
        wrapper.lora_B.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
    minilora.save_adapter(model, tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    file = SafetensorsFile(weights)
    weights.unlink()
    write_tensors(weights, {key: file.tensor(key) for key in file.entries})
    proof = merge_folder(folder, tmp_path / "adapter", tmp_path / "merged", device="cpu")
    assert proof.holds and proof.adapter > proof.merged
    assert (tmp_path / "merged" / "chat_template.jinja").read_bytes() == b"its own"


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_every_weight_is_rounded_once(trained, tmp_path, shard_bytes, monkeypatch):
    folder, adapter, model = trained
    monkeypatch.setattr(shutil, "disk_usage", disk(folder))
    proof = merge_folder(folder, adapter, tmp_path / "merged", shard_bytes, device="cpu")
    assert proof.holds and proof.adapter > proof.merged
    merged = dict(minilora.load_model(tmp_path / "merged", device="cpu").named_parameters())
    base = dict(minilora.load_model(folder, device="cpu").named_parameters())
    wrapped = {f"{path}.weight": w for path, w in adapters(model)}
    for name, value in merged.items():
        expected = base[name]
        if name in wrapped:
            w = wrapped[name]
            expected = (base[name].float() + w.scale * (w.lora_B @ w.lora_A)).to(base[name].dtype)
        assert torch.equal(value, expected), name
    assert (len(list((tmp_path / "merged").glob("*.safetensors"))) > 1) == (shard_bytes < 10**9)


def test_a_wrong_merge_is_found_and_not_left(trained, tmp_path, monkeypatch):
    """One number of one weight off by a hundredth."""
    folder, adapter, _ = trained
    write = merge_module.write_checkpoint

    def damaged(stage, shapes, tensor, *rest):
        def wrong(name):
            value = tensor(name).clone()
            if name == "model.layers.1.mlp.up_proj.weight":
                value[3, 4] *= 1.01
            return value

        write(stage, shapes, wrong, *rest)

    monkeypatch.setattr(merge_module, "write_checkpoint", damaged)
    with pytest.raises(ModelError, match="nothing was written"):
        merge_folder(folder, adapter, tmp_path / "merged", device="cpu")
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".tmp-*"))


def disk(folder, missing=0):
    """A disk with room for the weights of a folder, or with a little less."""
    room = sum(e.end - e.start for e in SafetensorsFile(folder / "model.safetensors").entries.values()) - missing
    return lambda _: SimpleNamespace(free=room)


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(trained, tmp_path, monkeypatch):
    folder, adapter, _ = trained
    monkeypatch.setattr(shutil, "disk_usage", disk(folder, 1))
    with pytest.raises(DiskError, match="GB are free"):
        merge_folder(folder, adapter, tmp_path / "in" / "merged", device="cpu")
    assert not (tmp_path / "in").exists()


def test_how_far_the_merged_model_is_from_the_quantised_one_is_told(tmp_path):
    """Of an adapter that was trained on NF4 and goes on the plain base."""
    folder = make_model(tmp_path / "model", hidden_size=64, intermediate_size=64)
    model = minilora.load_model(folder, device="cpu", quant="nf4")
    add_lora(model, r=3, alpha=6)
    minilora.save_adapter(model, tmp_path / "adapter")
    said = []
    merge_folder(folder, tmp_path / "adapter", tmp_path / "merged", device="cpu", say=said.append)
    prompts = prompt_ids(load_tokenizer(folder))
    merged = minilora.load_model(tmp_path / "merged", device="cpu")
    off = largest_difference(logits_of(merged, prompts), logits_of(model.eval(), prompts))
    assert off > 0 and said[-1].endswith(f"nf4: a logit of that model and of the merged one differ by up to {off:.3g}")


def test_the_proof_computes_in_the_dtype_that_is_asked_for(trained, tmp_path, monkeypatch):
    """Not in the one that is fastest here."""
    folder, adapter, _ = trained
    proofs = []
    for name, rates in (("a", compute.Rates(1e9, 1e10)), ("b", compute.Rates(1e10, 1e9))):
        monkeypatch.setattr(compute, "measured_rates", lambda k, n, stored, rates=rates: rates)
        proofs.append(merge_folder(folder, adapter, tmp_path / name, device="cpu", compute="float32"))
    assert proofs[0] == proofs[1]


def test_parts_that_cannot_be_merged_are_told(trained, tmp_path, monkeypatch):
    folder, adapter, _ = trained
    monkeypatch.setattr(LoRALinear, "merges", ())
    with pytest.raises(UsageError, match="cannot be merged"):
        merge_folder(folder, adapter, tmp_path / "merged", device="cpu")
    assert not (tmp_path / "merged").exists()


def test_the_output_must_be_new(trained, tmp_path):
    folder, adapter, _ = trained
    with pytest.raises(OutputInUse):
        merge_folder(folder, adapter, folder, device="cpu")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen3"


def test_logits_prove_it_too(trained, tmp_path, monkeypatch):
    """A merge that forgets the adapter's scale is off by more than rounding."""
    folder, adapter, _ = trained
    right = LoRALinear.merged
    monkeypatch.setattr(
        LoRALinear, "merged", lambda self, name, stored, rows: (right(self, name, stored, rows) + stored) / 2
    )
    with pytest.raises(ModelError, match="would be rounding; nothing was written"):
        merge_folder(folder, adapter, tmp_path / "merged", device="cpu")


def test_an_adapter_of_pickle_is_told(trained, tmp_path):
    folder, adapter, _ = trained
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match="the weights are pickle"):
        merge_folder(folder, adapter, tmp_path / "merged", device="cpu")
