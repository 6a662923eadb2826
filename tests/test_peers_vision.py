"""A vision-language folder of transformers: its language model here, and adapters and merged folders back in both of its classes."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import IDS, OWN, randomise
from safetensors.torch import load_file

import minilora
from minilora.checkpoint.export import export_adapter

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what they warn about while they are imported is theirs
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft asks transformers
CLASSES = {"peft": "AutoModelForCausalLM", "vllm": "AutoModelForImageTextToText"}  # whose names are vLLM's
classes = pytest.mark.parametrize("consumer", CLASSES)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder that transformers saved."""
    text = OWN["qwen3_5"] | {"pad_token_id": 0, "layer_types": ["linear_attention", "full_attention"], "head_dim": 16}
    text |= {"tie_word_embeddings": request.param}
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 2,
        "out_hidden_size": 24,
        "num_position_embeddings": 16,
    }
    ids = {
        name: 50 + i
        for i, name in enumerate(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"))
    }
    config = transformers.AutoConfig.for_model(
        "qwen3_5", text_config=text, vision_config=vision, tie_word_embeddings=request.param, **ids
    )
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        p.data = 0.2 * torch.randn(p.shape, generator=generator) + name.endswith("norm.weight")
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def opened(folder: Path, consumer: str) -> Any:
    cls = getattr(transformers, CLASSES[consumer])
    model, info = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@torch.no_grad()
def assert_same(ours: Any, theirs: Any) -> None:
    # text alone: ids below those of images
    ids = IDS.clamp(max=49)
    logits, found = theirs(ids[None]).logits[0], ours.logits(ids)
    assert (found - logits).abs().max() <= 1e-5 * logits.abs().max()


@classes
def test_a_folder_of_transformers_opens_here(base: Path, consumer: str):
    assert any("visual" in name for name in load_file(base / "model.safetensors"))
    assert_same(minilora.load_model(base, device="cpu"), opened(base, consumer))


@classes
def test_an_adapter_reaches_every_linear_of_each_class(base: Path, tmp_path: Path, consumer: str):
    model = minilora.load_model(base, device="cpu")
    minilora.add_lora(model, r=3, alpha=7)
    randomise(model)
    minilora.save_adapter(model, tmp_path / "adapter", base)
    found = export_adapter(base, tmp_path / "adapter", tmp_path / "out", consumer)
    assert found.adapted == found.linears == 15
    theirs = peft.PeftModel.from_pretrained(opened(base, consumer), tmp_path / "out").eval()
    state, file = peft.get_peft_model_state_dict(theirs), load_file(tmp_path / "out" / "adapter_model.safetensors")
    text = {key for key in state if "visual" not in key}
    assert text == file.keys() and all(torch.equal(state[key], file[key]) for key in file)
    assert_same(model.eval(), theirs)


@classes
def test_an_adapter_of_each_class_opens_here(base: Path, tmp_path: Path, consumer: str):
    names = ["q_proj", "o_proj", "in_proj_qkv", "in_proj_a", "up_proj", "down_proj"]
    theirs = peft.get_peft_model(
        opened(base, consumer), peft.LoraConfig(r=4, lora_alpha=6, target_modules=names)
    ).eval()
    generator = torch.Generator().manual_seed(1)
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
    theirs.save_pretrained(tmp_path / "adapter")
    model = minilora.load_model(base, device="cpu")
    minilora.load_adapter(model, tmp_path / "adapter")
    assert_same(model.eval(), theirs)


@classes
def test_a_merged_folder_opens_in_each_class(base: Path, tmp_path: Path, consumer: str):
    model = minilora.load_model(base, device="cpu")
    minilora.add_lora(model, r=3, alpha=7)
    randomise(model)
    minilora.merge(model)
    minilora.save_model(model, tmp_path / "merged", base)
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "merged"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if "visual" in name)
    assert_same(model, opened(tmp_path / "merged", consumer))
