"""Adapters that other programs wrote: they compute here what they compute there, or are refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model

from minilora import add_lora, load_adapter, load_model, save_adapter
from minilora.__main__ import main
from minilora.checkpoint.factors import read_factors
from minilora.errors import ModelError
from minilora.lora import adapters

GOLDEN = Path(__file__).parents[1] / "golden"
MLX = {"qwen2": 7, "qwen2_dora": 14, "qwen3_moe": 14}  # the adapters of each; one is on the last layer alone


def base_of(name: str) -> Path:
    return GOLDEN / name.removesuffix("_dora")


@pytest.mark.parametrize("name", MLX)
def test_an_adapter_of_mlx_lm_gives_mlx_lms_logits(name: str):
    model, expected = load_model(base_of(name), device="cpu"), load_file(GOLDEN / "mlx" / name / "expected.safetensors")
    ids = expected["input_ids"].long()
    before = model.logits(ids)
    load_adapter(model, GOLDEN / "mlx" / name)
    assert len(dict(adapters(model))) == MLX[name]
    most = float(expected["logits"].abs().max())
    torch.testing.assert_close(model.eval().logits(ids), expected["logits"], rtol=0, atol=1e-5 * most)
    assert (before - expected["logits"]).abs().max() > 0.1 * most


def test_an_adapter_of_mlx_lm_is_exported_for_peft_and_inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = ["export", "--model", str(base_of("qwen2")), "--adapter", str(GOLDEN / "mlx" / "qwen2"), "--for", "peft"]
    assert main([*command, "--output", str(tmp_path / "peft")]) == 0 and "7 of 14 linears" in capsys.readouterr().out
    theirs, ours = (
        load_file(GOLDEN / "mlx" / "qwen2" / "adapters.safetensors"),
        load_file(tmp_path / "peft" / "adapter_model.safetensors"),
    )
    path = "model.layers.1.mlp.down_proj"
    for half in "ab":
        written = ours[f"base_model.model.{path}.lora_{half.upper()}.weight"]
        assert torch.equal(written, theirs[f"{path}.lora_{half}"].T)
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"] == "Org/Base"
    f = read_factors(GOLDEN / "mlx" / "qwen2")[path]
    assert (f.r, f.scale, f.b.shape) == (3, 2.5, (64, 3))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"fine_tune_type": "full"}, "fine_tune_type is 'full'"),
        ({"lora_parameters": None}, "lora_parameters is 'None'"),
        ({"lora_parameters": {"rank": 3, "alpha": 8}}, "scale of lora_parameters"),
        ({"lora_parameters": {"rank": "3", "scale": 1.0}}, "rank of lora_parameters"),
        ({"lora_parameters": {"rank": 4, "scale": 1.0}}, r"lora_A is \[3, 64\]"),
    ],
    ids=str,
)
def test_what_is_no_adapter_of_mlx_lm_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], told: str):
    folder = shutil.copytree(GOLDEN / "mlx" / "qwen2", tmp_path / "a")
    j = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(j | changes))
    with pytest.raises(ModelError, match=told):
        load_adapter(load_model(base_of("qwen2"), device="cpu"), folder)


@pytest.mark.parametrize("key", ["model.embed_tokens.lora_a", "model.layers.1.input_layernorm.weight"])
def test_what_mlx_lm_trained_beside_linears_is_refused_by_name(tmp_path: Path, key: str):
    folder = shutil.copytree(GOLDEN / "mlx" / "qwen2", tmp_path / "a")
    tensors = load_file(folder / "adapters.safetensors")
    save_file(tensors | {key: torch.ones(4, 3)}, folder / "adapters.safetensors")
    with pytest.raises(ModelError, match=key.removesuffix(".lora_a")):
        load_adapter(load_model(base_of("qwen2"), device="cpu"), folder)


def test_a_pickled_adapter_goes_through_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = make_model(tmp_path / "base")
    model = load_model(base, device="cpu")
    add_lora(model, r=3)
    save_adapter(model, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "a" / "adapter_model.bin")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="pickle") as told:
        load_adapter(load_model(base, device="cpu"), tmp_path / "a")
    assert told.value.hint.startswith(f"minilora convert {tmp_path / 'a'}")
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "chat --model BASE --adapter" in capsys.readouterr().out
    again = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[key], tensors[key]) for key in tensors)
    load_adapter(load_model(base, device="cpu"), tmp_path / "b", any_base=True)
    assert main(["convert", str(tmp_path / "b"), str(tmp_path / "c")]) == 2 and not (tmp_path / "c").exists()
    (tmp_path / "b" / "adapter_model.safetensors").unlink()
    assert main(["convert", str(tmp_path / "b"), str(tmp_path / "c")]) == 4 and not (tmp_path / "c").exists()


@pytest.mark.parametrize("layout", [None, "grouped_by_expert", "rank_major"])
def test_experts_of_an_older_unsloth_are_refused(tmp_path: Path, layout: str | None):
    """Their B lies expert by expert, and fits in shape: it would load, and compute something else."""
    folder = shutil.copytree(GOLDEN / "qwen3_moe" / "adapter", tmp_path / "a")
    j = json.loads((folder / "adapter_config.json").read_text())
    assert j["target_parameters"]
    of_unsloth = {"base_model_class": "Qwen3MoeForCausalLM", "parent_library": "transformers", "unsloth_fixed": True}
    j |= {"auto_mapping": of_unsloth} | (
        {} if layout is None else {"lora_B_layout": layout, "unsloth_fused_expert_lora": {"version": 1}}
    )
    (folder / "adapter_config.json").write_text(json.dumps(j))
    model = load_model(GOLDEN / "qwen3_moe", device="cpu")
    if layout == "rank_major":
        load_adapter(model, folder)
    else:
        with pytest.raises(ModelError, match="lora_B_layout"):
            load_adapter(model, folder)


@pytest.mark.parametrize(("shape", "count"), [((1 << 30, 0, 5), 1), ((600_000, 1, 1), 2)])
def test_an_mlx_adapter_of_more_experts_than_any_is_refused(tmp_path: Path, shape: tuple[int, ...], count: int):
    """A header of a few bytes would become an entry for each."""
    keys = [f"model.layers.{i}.mlp.switch_mlp.up_proj.lora_a" for i in range(count)]
    tensors = {key: torch.zeros(shape, dtype=torch.bfloat16) for key in keys}
    save_file(tensors, tmp_path / "adapters.safetensors")
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "lora_parameters": {"rank": 1, "scale": 1.0}})
    )
    with pytest.raises(ModelError, match="matrices of experts are read"):
        read_factors(tmp_path)
