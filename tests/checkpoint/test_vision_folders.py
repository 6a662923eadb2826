"""Folders of vision-language models: the language model is trained, the rest is carried; and adapters as each consumer spells them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import config_json, randomise
from safetensors.torch import load_file, save_file
from tiny import make_model, make_rows
from torch import Tensor

import minilora
from minilora.__main__ import main
from minilora.checkpoint.export import export_adapter
from minilora.checkpoint.merge import merge_folder
from minilora.errors import ModelError
from minilora.files.model_folder import ModelFolder
from minilora.files.safetensors import SafetensorsFile
from minilora.lora import adapters, add_lora
from minilora.models.quantized import quantized_weights

GOLDEN = Path(__file__).parents[1] / "golden"
IDS = torch.arange(2, 40)
BESIDE = {
    "model.visual.patch_embed.weight": torch.arange(12.0).view(3, 4),
    "model.visual.blocks.0.norm.bias": torch.ones(3).bfloat16(),
    "mtp.layers.0.mlp.up_proj.weight": torch.ones(2, 2),
}


def vision_folder(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Of a tiny Qwen3.5: its config.json nested as published, tensors of vision and MTP beside the language model."""
    flat = config_json("qwen3_5", vocab_size=260, hidden_size=32) | changes
    make_model(folder, dtype, **{key: value for key, value in flat.items() if key != "dtype"})
    flat = json.loads((folder / "config.json").read_text())
    text = {key: value for key, value in flat.items() if key not in ("model_type", "tie_word_embeddings")}
    tied = {"tie_word_embeddings": flat["tie_word_embeddings"]}
    nested = {
        "model_type": "qwen3_5",
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        **tied,
        "image_token_id": 7,
    }
    nested |= {
        "text_config": text | {"model_type": "qwen3_5_text"},
        "vision_config": {"depth": 1, "model_type": "qwen3_5"},
    }
    (folder / "config.json").write_text(json.dumps(nested))
    save_file(load_file(folder / "model.safetensors") | BESIDE, folder / "model.safetensors", {"format": "pt"})
    return folder


def beside(folder: Path) -> dict[str, Tensor]:
    return {name: t for name, t in load_file(folder / "model.safetensors").items() if name in BESIDE}


def assert_carried(folder: Path) -> None:
    found = beside(folder)
    assert found.keys() == BESIDE.keys() and all(torch.equal(found[name], t) for name, t in BESIDE.items())
    assert all(found[name].dtype == t.dtype for name, t in BESIDE.items())


def adapted(folder: Path, targets: str = "all-linear", **options: Any) -> Any:
    model = minilora.load_model(folder, device="cpu", **options)
    add_lora(model, targets, r=3, alpha=6)
    randomise(model)
    return model


@pytest.mark.parametrize("quant", ["keep", "nf4"])
def test_merge_carries_what_is_not_trained(tmp_path: Path, quant: str):
    folder = vision_folder(tmp_path / "base", torch.bfloat16)
    minilora.save_adapter(adapted(folder, quant=quant), tmp_path / "adapter")
    proof = merge_folder(folder, tmp_path / "adapter", tmp_path / "merged", device="cpu")
    assert proof.holds and proof.adapter > proof.merged
    assert_carried(tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == ModelFolder(folder).config
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "merged"))
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}


@pytest.mark.parametrize("golden", ["qwen3_nf4", "qwen3_fp8"])
@pytest.mark.parametrize("saved", [False, True], ids=["merged", "saved"])
def test_what_is_quantised_beside_it_is_widened(tmp_path: Path, golden: str, saved: bool):
    """A folder whose config.json says no more that it is quantised may hold no codes."""
    folder, name, stem = (
        vision_folder(tmp_path / "base", torch.bfloat16),
        "model.layers.0.self_attn.q_proj.weight",
        "model.visual.blocks.0.qkv.weight",
    )
    quantised = {
        stem + n.removeprefix(name): t
        for n, t in load_file(GOLDEN / golden / "model.safetensors").items()
        if n.startswith(name)
    }
    save_file(load_file(folder / "model.safetensors") | quantised, folder / "model.safetensors", {"format": "pt"})
    j = json.loads((folder / "config.json").read_text())
    j["quantization_config"] = json.loads((GOLDEN / golden / "config.json").read_text())["quantization_config"]
    (folder / "config.json").write_text(json.dumps(j))
    model = adapted(folder)
    if saved:
        minilora.merge(model)
        minilora.save_model(model, tmp_path / "out", folder)
    else:
        minilora.save_adapter(model, tmp_path / "adapter")
        merge_folder(folder, tmp_path / "adapter", tmp_path / "out", device="cpu")
    found = load_file(tmp_path / "out" / "model.safetensors")
    wide = quantized_weights(minilora.load_model(GOLDEN / golden, device="cpu"))[name].weight_as(torch.bfloat16)
    assert torch.equal(found[stem], wide) and [n for n in found if n.startswith(stem)] == [stem]
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert_carried(tmp_path / "out")
    minilora.load_model(tmp_path / "out", device="cpu")


def test_a_saved_model_has_what_was_beside_it(tmp_path: Path):
    folder = vision_folder(tmp_path / "base", torch.bfloat16)
    model = adapted(folder)
    minilora.merge(model)
    minilora.save_model(model, tmp_path / "saved", folder)
    assert_carried(tmp_path / "saved")
    again = minilora.load_model(tmp_path / "saved", device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_decay_stays_in_fp32(tmp_path: Path):
    folder = vision_folder(tmp_path / "base", torch.bfloat16)
    exact = {name: torch.rand(4) for name in ("A_log", "dt_bias")}
    weights = load_file(folder / "model.safetensors")
    weights |= {f"model.language_model.layers.0.linear_attn.{name}": t for name, t in exact.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    model = minilora.load_model(folder, device="cpu")
    minilora.save_model(model, tmp_path / "saved", folder)
    for found in (dict(model.named_parameters()), load_file(tmp_path / "saved" / "model.safetensors")):
        for name, t in exact.items():
            assert torch.equal(found[f"model.language_model.layers.0.linear_attn.{name}"], t)


@pytest.mark.parametrize(
    ("top", "text", "tied"), [(True, None, True), (None, True, True), (False, True, True), (None, None, False)]
)
def test_the_flag_of_tying_stands_in_two_places(tmp_path: Path, top: bool | None, text: bool | None, tied: bool):
    folder = vision_folder(tmp_path / "base", tie_word_embeddings=tied)
    j = json.loads((folder / "config.json").read_text())
    j["tie_word_embeddings"], j["text_config"]["tie_word_embeddings"] = top, text
    (folder / "config.json").write_text(json.dumps(j))
    assert minilora.load_model(folder, device="cpu").config.tied == tied


def test_an_unknown_key_is_named_in_both_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = vision_folder(tmp_path / "base")
    j = json.loads((folder / "config.json").read_text())
    j["outer_key"], j["text_config"]["inner_key"] = 1, 1
    (folder / "config.json").write_text(json.dumps(j))
    assert main(["inspect", "model", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "'outer_key', 'inner_key'" in out and "model.visual, mtp: not trained" in out


def keys_of(folder: Path) -> set[str]:
    return set(SafetensorsFile(folder / "adapter_model.safetensors").entries)


@pytest.mark.parametrize("consumer", ["peft", "vllm"])
@pytest.mark.parametrize("targets", ["all-linear", "model.language_model.layers.1.mlp.up_proj"])
def test_an_adapter_as_a_consumer_spells_it(tmp_path: Path, consumer: str, targets: str):
    folder = vision_folder(tmp_path / "base")
    model = adapted(folder, targets)
    minilora.save_adapter(model, tmp_path / "adapter", folder)
    count = len(dict(adapters(model)))
    found = export_adapter(folder, tmp_path / "adapter", tmp_path / "out", consumer)
    assert found == (count, 15, 3, False)
    prefix = "base_model.model.model." + ("layers." if consumer == "peft" else "language_model.layers.")
    keys = keys_of(tmp_path / "out")
    assert len(keys) == 2 * count and all(key.startswith(prefix) for key in keys)
    named = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]
    full = "layers.1.mlp.up_proj" if targets != "all-linear" else None
    assert (
        named == [prefix.removeprefix("base_model.model.").removesuffix("layers.") + full]
        if full
        else "in_proj_a" in named
    )
    other = minilora.load_model(folder, device="cpu")
    minilora.load_adapter(other, tmp_path / "out")
    assert torch.equal(other.logits(IDS), model.eval().logits(IDS))


def test_unequal_ranks_are_made_alike_for_vllm(tmp_path: Path):
    folder = vision_folder(tmp_path / "base")
    model = adapted(folder)
    minilora.save_adapter(model, tmp_path / "adapter")
    path = tmp_path / "adapter"
    j, tensors = json.loads((path / "adapter_config.json").read_text()), load_file(path / "adapter_model.safetensors")
    j |= {"rank_pattern": {"mlp.up_proj": 2}, "alpha_pattern": {"q_proj": 5}}
    for name, t in tensors.items():
        if "up_proj" in name:
            tensors[name] = (t[:2] if "lora_A" in name else t[:, :2]).contiguous()
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps(j))
    assert export_adapter(folder, path, tmp_path / "out", "vllm") == (15, 15, 3, True)
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (written["r"], written["rank_pattern"], written["alpha_pattern"]) == (3, {}, {})
    logits = []
    for each in (path, tmp_path / "out"):
        model = minilora.load_model(folder, device="cpu")
        minilora.load_adapter(model, each)
        logits.append(model.logits(IDS))
    assert (logits[0] - logits[1]).abs().max() < 1e-5 * logits[0].abs().max()


def test_a_key_that_no_linear_has_is_told(tmp_path: Path):
    folder = vision_folder(tmp_path / "base")
    minilora.save_adapter(adapted(folder), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name.replace("in_proj_z", "in_proj_g"): t for name, t in tensors.items()}, path)
    with pytest.raises(ModelError, match="in_proj_g"):
        export_adapter(folder, tmp_path / "adapter", tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


def test_train_predict_export_and_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """By the commands, from a folder as it is published."""
    folder, rows = str(vision_folder(tmp_path / "base", num_hidden_layers=4)), str(make_rows(tmp_path / "rows.json"))
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    given = ["--model", folder, "--adapter", run]
    assert main(["train", "--model", folder, "--data", rows, "--output", run, "--epochs", "1", "--device", "cpu"]) == 0
    assert main(["export", *given, "--for", "peft", "--output", out]) == 0
    assert "adapters on 30 of 30 linears" in capsys.readouterr().out
    assert (
        main(
            [
                "predict",
                "--model",
                folder,
                "--adapter",
                out,
                "--data",
                rows,
                "--output",
                str(tmp_path / "p"),
                "--max-tokens",
                "4",
            ]
        )
        == 0
    )
    assert main(["merge", *given, "--output", str(tmp_path / "merged")]) == 0
    assert_carried(tmp_path / "merged")
