"""GPT-2 between minilora, transformers and peft: folders and adapters both ways, equal logits.

Runs where they are installed (the extra "peers").
"""

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import IDS, randomise
from test_peers import assert_peft_holds_exactly, assert_same, their_logits, their_model_of
from torch import Tensor

from minilora import add_lora, load_adapter, load_model, merge, save_adapter, save_model
from minilora.checkpoint.merge import merge_folder
from minilora.lora import adapters
from minilora.run.setup import prepare
from minilora.settings import resolve

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what they warn about while they are imported is theirs
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")

# peft says that it sets fan_in_fan_out where it was not given, and asks transformers
pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to False:UserWarning", "ignore:.is_gradient_checkpointing.:FutureWarning"
)
TOKENIZER = Path(__file__).parent / "golden" / "tokenizers" / "gpt2" / "tokenizer.json"
LINEARS = ["c_attn", "c_proj", "c_fc"]
spellings = pytest.mark.parametrize("prefix", [True, False], ids=["transformers", "OpenAI"])


def perturbed(model: Any, part: str = "") -> Any:
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if part in name:
            p.data = p.data + 0.2 * torch.randn(p.shape, generator=generator)
    return model.eval()


def base_of(folder: Path, prefix: bool = True, tied: bool = True, vocab_size: int = 61) -> Path:
    """A folder that transformers saved, of the whole model or, as OpenAI's is, of its stack alone."""
    sizes = {"vocab_size": vocab_size, "n_embd": 24, "n_inner": 40, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, tie_word_embeddings=tied)
    model = perturbed(transformers.GPT2LMHeadModel(config))
    (model if prefix else model.transformer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("prefix", "tied"), [(True, True), (True, False), (False, True)])
def test_folders_open_on_both_sides(tmp_path: Path, prefix: bool, tied: bool):
    base = base_of(tmp_path / "base", prefix, tied)
    model = load_model(base)
    before = their_logits(their_model_of(base))
    assert_same(model.logits(IDS), before)
    add_lora(model, r=3, alpha=7)
    randomise(model)
    wrapped = model.logits(IDS)
    merge(model)
    save_model(model, tmp_path / "merged", base)
    logits = their_logits(their_model_of(tmp_path / "merged"))
    assert_same(wrapped, logits)
    assert (before - logits).abs().max() > 0.1 * logits.abs().max()


@spellings
def test_merge_folder_opens_in_transformers(tmp_path: Path, prefix: bool):
    base = base_of(tmp_path / "base", prefix, vocab_size=50257)
    shutil.copy(TOKENIZER, base / "tokenizer.json")
    model = load_model(base)
    add_lora(model, r=3, alpha=7)
    randomise(model)
    save_adapter(model, tmp_path / "a")
    proof = merge_folder(base, tmp_path / "a", tmp_path / "merged")
    assert proof.holds and proof.adapter > 100 * proof.allowed
    assert_same(model.logits(IDS), their_logits(their_model_of(tmp_path / "merged")))


@spellings
@pytest.mark.parametrize("targets", ["all-linear", "attention", "mlp", "c_attn", r".*h\.1\..*c_proj"])
def test_our_adapter_opens_in_peft(tmp_path: Path, prefix: bool, targets: str):
    base = base_of(tmp_path / "base", prefix)
    model = load_model(base)
    add_lora(model, targets, r=3, alpha=7)
    randomise(model)
    save_adapter(model, tmp_path / "a", base)
    theirs = peft.PeftModel.from_pretrained(their_model_of(base), tmp_path / "a").eval()
    assert_peft_holds_exactly(theirs, tmp_path / "a")
    assert_same(model.logits(IDS), their_logits(theirs))


CONFIGS = {
    "default": {},
    "all": {"target_modules": "all-linear", "use_rslora": True},
    "not said": {"target_modules": LINEARS, "fan_in_fan_out": False},
    "ranks": {
        "target_modules": LINEARS,
        "rank_pattern": {"c_attn": 5, "h.1.mlp.c_proj": 2},
        "alpha_pattern": {"c_fc": 3},
    },
    "dora": {"target_modules": LINEARS, "use_dora": True},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_pefts_adapter_opens_here(tmp_path: Path, name: str):
    base = base_of(tmp_path / "base")
    options = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **CONFIGS[name]}
    logits = saved(base, peft.LoraConfig(**options), tmp_path / "a")
    model = load_model(base)
    before = model.logits(IDS)
    load_adapter(model, tmp_path / "a")
    assert_same(model.eval().logits(IDS), logits)
    assert (before - logits).abs().max() > 0.05 * logits.abs().max()
    assert len(dict(adapters(model))) == (2 if name == "default" else 8)


def saved(base: Path, config: Any, folder: Path) -> Tensor:
    """Save an adapter that peft made; its logits."""
    theirs = peft.get_peft_model(their_model_of(base), config)
    for part in ("lora_", "ia3_l", "prompt_encoder"):
        perturbed(theirs, part)
    theirs.save_pretrained(folder)
    return their_logits(theirs.eval())[-len(IDS) :]  # without what stands for virtual tokens


METHODS = {
    "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", METHODS)
def test_methods_are_pefts(tmp_path: Path, name: str):
    """Virtual tokens have the first positions, on both sides."""
    base = base_of(tmp_path / "base")
    logits = saved(base, METHODS[name](), tmp_path / "theirs")
    model = load_model(base)
    load_adapter(model, tmp_path / "theirs")
    assert_same(model.eval().logits(IDS), logits)
    ours = prepare(load_model(base), resolve({"method": name, "pre_seq_len": 4}))
    save_adapter(ours, tmp_path / "ours", base)
    theirs = peft.PeftModel.from_pretrained(their_model_of(base), tmp_path / "ours").eval()
    assert_same(ours.eval().logits(IDS), their_logits(theirs)[-len(IDS) :])
