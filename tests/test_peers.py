"""Exchange with transformers and peft: their folders open here, ours open there, and the logits agree.

Runs where they are installed (the extra "peers"); the project itself never needs them.
"""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import IDS, OWN, as_wrong_as, randomise, tiny, tiny_folder
from torch import Tensor

from minilora import add_lora, load_adapter, load_model, loftq_init, merge, save_adapter, save_model
from minilora.checkpoint.merge import merge_folder
from minilora.errors import ModelError
from minilora.files.safetensors import SafetensorsFile
from minilora.lora import adapters

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what they warn about while they are imported is theirs
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
    ),  # peft asks transformers
    # as it should: patterns that match experts, which are parameters, are not among the modules that it looks at
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"]
MLP = ["gate_proj", "up_proj", "gate_up_proj", "down_proj"]
# how Unsloth names attention alone, for a model that may have a vision part
OF_UNSLOTH = (
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mixer).*?\.(?:q_proj|k_proj|v_proj|o_proj))"
    r"|(?:\bmodel\.layers\.[\d]{1,}(?!.*\.experts\.\d)\..*?(?:self_attn|attention|attn|mixer).*?\.(?:(?:q_proj|k_proj|v_proj|o_proj)))"
)
GOLDEN = Path(__file__).parent / "golden" / "tokenizers"
FAMILIES = ["qwen2", "qwen3", "qwen3_5_text", "glm", "glm4", "qwen2_moe", "qwen3_moe"]
kinds = pytest.mark.parametrize("family", FAMILIES)


def their_model(family: str, **changes: Any) -> Any:
    """A tiny model of transformers, with random weights, norms and biases."""
    sizes = {
        "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }  # fmt: skip
    own = {} if family == "qwen2" else {"head_dim": 8, "pad_token_id": 0}
    if family == "qwen3_5_text":
        own = OWN["qwen3_5"] | {"pad_token_id": 0, "layer_types": ["linear_attention", "full_attention"]}
    if family.endswith("_moe"):
        own = {"pad_token_id": 0, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
        own |= (
            {"head_dim": 8}
            if family == "qwen3_moe"
            else {"shared_expert_intermediate_size": 20, "mlp_only_layers": [1]}
        )
    config = transformers.AutoConfig.for_model(family, **{**sizes, **own, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        p.data = 0.2 * torch.randn(p.shape, generator=generator) + name.endswith("norm.weight")
    return model


@torch.no_grad()
def their_logits(model: Any) -> Tensor:
    return model(IDS[None]).logits[0].float()


def their_model_of(folder: Path) -> Any:
    """The folder as transformers opens it, with no tensor missing, too much, or of another shape."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.detach(), theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@pytest.fixture(params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint folder that transformers saved."""
    their_model(request.param).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


# checkpoints


def test_glm_edge_opens_here(tmp_path: Path):
    """Whole heads turn, and there are no biases."""
    theirs = their_model("glm", attention_bias=False, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 1.0})
    theirs.save_pretrained(tmp_path / "base")
    assert_same(load_model(tmp_path / "base").logits(IDS), their_logits(theirs))


@kinds
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_of_transformers_opens_here(tmp_path: Path, family: str, tied: bool):
    theirs = their_model(family, tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path / "base")
    assert_same(load_model(tmp_path / "base").logits(IDS), their_logits(theirs))


@kinds
def test_shards_of_transformers_are_read(tmp_path: Path, family: str):
    theirs = their_model(family)
    theirs.save_pretrained(tmp_path / "base", max_shard_size="10KB")
    assert len(list((tmp_path / "base").glob("model-*-of-*.safetensors"))) > 2
    assert_same(load_model(tmp_path / "base").logits(IDS), their_logits(theirs))


@kinds
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [10_000, 1 << 30])
def test_a_merged_model_opens_in_transformers(tmp_path: Path, family: str, tied: bool, shard_bytes: int):
    their_model(family, tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base")
    before = model.logits(IDS)
    add_lora(model, r=3, alpha=7)
    randomise(model)
    wrapped = model.logits(IDS)
    merge(model)
    save_model(model, tmp_path / "merged", tmp_path / "base", shard_bytes)
    logits = their_logits(their_model_of(tmp_path / "merged"))
    assert_same(wrapped, logits)
    assert (before - logits).abs().max() > 0.1 * logits.abs().max()


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_merge_folder_opens_in_transformers_with_its_tokenizer(tmp_path: Path, family: str):
    tokenizer = GOLDEN / {"qwen2": "qwen2_5", "qwen3": "qwen3"}[family]
    their_model(family, vocab_size=151_700, num_hidden_layers=1).save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, tmp_path / "base" / name)
    model = load_model(tmp_path / "base")
    add_lora(model, r=3, alpha=7)
    randomise(model)
    save_adapter(model, tmp_path / "adapter")
    proof = merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert proof.holds and proof.adapter > 100 * proof.allowed
    assert_same(model.logits(IDS), their_logits(their_model_of(tmp_path / "merged")))
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()


# adapters


@pytest.mark.parametrize(
    "options",
    [
        {"targets": "all-linear"},
        {"targets": "attention", "rslora": True},
        {"targets": "mlp", "dropout": 0.5},
        {"targets": r".*layers\.1\..*down_proj"},
    ],
    ids=str,
)
def test_our_adapter_opens_in_peft(base: Path, tmp_path: Path, options: dict[str, Any]):
    model = load_model(base)
    add_lora(model, r=3, alpha=7, **options)
    randomise(model)
    save_adapter(model, tmp_path / "adapter", str(base))
    theirs = peft.PeftModel.from_pretrained(their_model_of(base), tmp_path / "adapter").eval()
    assert_peft_holds_exactly(theirs, tmp_path / "adapter")
    assert_same(model.logits(IDS), their_logits(theirs))


def assert_peft_holds_exactly(theirs: Any, folder: Path) -> None:
    """peft made the modules that the file has tensors for, all and no more, and holds the file's bits."""
    file = SafetensorsFile(folder / "adapter_model.safetensors")
    state = peft.get_peft_model_state_dict(theirs)
    assert state.keys() == file.entries.keys()
    assert all(torch.equal(state[key], file.tensor(key)) for key in state)
    result = theirs.load_adapter(folder, "again")
    assert not [key for key in result.missing_keys if "lora" in key] and not result.unexpected_keys


def test_our_unequal_ranks_open_in_peft(base: Path, tmp_path: Path):
    """rank_pattern and alpha_pattern as we write them, read by peft."""
    save_their_adapter(
        base, tmp_path / "theirs", rank_pattern={"q_proj": 5, "layers.1.mlp.down_proj": 2}, alpha_pattern={"v_proj": 3}
    )
    model = load_model(base)
    load_adapter(model, tmp_path / "theirs")
    save_adapter(model, tmp_path / "ours", str(base))
    theirs = peft.PeftModel.from_pretrained(their_model_of(base), tmp_path / "ours").eval()
    assert_peft_holds_exactly(theirs, tmp_path / "ours")
    assert_same(model.logits(IDS), their_logits(theirs))


def save_their_adapter(base: Path, folder: Path, **config: Any) -> Tensor:
    """A folder with a random adapter that peft saved, and peft's logits with it."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION + MLP, "task_type": "CAUSAL_LM", **config}
    theirs = peft.get_peft_model(their_model_of(base), peft.LoraConfig(**options)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
    theirs.save_pretrained(folder)
    return their_logits(theirs)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.5},
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.1\..*_proj"},
        {"layers_to_transform": [1]},
        {
            "layers_to_transform": 1,
            "layers_pattern": "layers",
            "exclude_modules": ["down_proj", "layers.1.self_attn.q_proj"],
        },
        {"exclude_modules": r".*layers\.0\..*"},
        {
            "target_modules": OF_UNSLOTH,
            "auto_mapping": {"base_model_class": "X", "parent_library": "x", "unsloth_fixed": True},
        },
        {"rank_pattern": {"q_proj": 5, "up": 9, "layers.1.mlp.down_proj": 2}, "use_rslora": True},
        {
            "rank_pattern": {r".*\.0\..*": 2},
            "alpha_pattern": {"self_attn.v_proj": 3, r"mlp\.(gate|up|gate_up)_proj": 5.5},
        },
    ],
    ids=json.dumps,
)
def test_pefts_adapter_opens_here(base: Path, tmp_path: Path, config: dict[str, Any]):
    logits = save_their_adapter(base, tmp_path / "adapter", **config)
    model = load_model(base)
    before = model.logits(IDS)
    load_adapter(model, tmp_path / "adapter")
    assert_same(model.eval().logits(IDS), logits)
    assert (before - logits).abs().max() > 0.05 * logits.abs().max()
    file = SafetensorsFile(tmp_path / "adapter" / "adapter_model.safetensors")
    assert 2 * len(dict(adapters(model))) == len(file.entries)


@pytest.mark.parametrize(
    "config",
    [
        {"modules_to_save": ["lm_head"]},
        {"bias": "lora_only"},
        {"trainable_token_indices": [1, 2]},
        {"lora_bias": True, "target_modules": ["q_proj"]},
    ],
    ids=json.dumps,
)
@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # peft takes its own bias for a tensor that was cut
def test_what_peft_trained_beside_plain_lora_is_refused_by_name(tmp_path: Path, config: dict[str, Any]):
    their_model("qwen2", tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    save_their_adapter(tmp_path / "base", tmp_path / "adapter", **config)
    with pytest.raises(ModelError, match=next(iter(config))) as told:
        load_adapter(load_model(tmp_path / "base"), tmp_path / "adapter")
    assert told.value.hint


@pytest.mark.parametrize("family", ["chatglm", "chatglm2", "qwen"])
@pytest.mark.parametrize("targets", ["all-linear", "attention"])
def test_adapters_of_original_code_open_in_peft(tmp_path: Path, family: str, targets: str):
    """These families are not in transformers: peft wraps our own modules, which lie under the original code's names."""
    model, other = tiny(family), tiny(family)
    add_lora(model, targets, r=3, alpha=7)
    randomise(model)
    save_adapter(model, tmp_path / "ours")
    config = peft.LoraConfig.from_pretrained(tmp_path / "ours")
    config.task_type = None  # peft would ask for the generation methods of transformers
    theirs = peft.PeftModel.from_pretrained(other, tmp_path / "ours", config=config).eval()
    assert_peft_holds_exactly(theirs, tmp_path / "ours")
    assert_same(model.logits(IDS), theirs.base_model.model.logits(IDS))
    theirs.save_pretrained(tmp_path / "theirs")
    again = tiny(family)
    load_adapter(again, tmp_path / "theirs")
    assert torch.equal(again.logits(IDS), model.logits(IDS))


def test_loftq_is_pefts(tmp_path: Path):
    """PEFT's decomposition of what bitsandbytes' weights are off by; its whole loftq_init asks for a GPU."""
    functional = pytest.importorskip("bitsandbytes").functional
    from peft.utils.loftq_utils import _low_rank_decomposition

    def theirs(wide: Tensor, quantised: Tensor) -> Tensor:
        parts = _low_rank_decomposition(wide - quantised.to(wide.dtype), reduced_rank=4)
        return parts["L"] @ parts["R"]

    # rows of whole blocks: bitsandbytes reads others back wrongly on some CPUs (docs/quantised.md)
    folder = tiny_folder(tmp_path / "base", hidden_size=64, intermediate_size=128)
    plain, model = load_model(folder, device="cpu"), load_model(folder, device="cpu", quant="nf4")
    add_lora(model, r=4, alpha=8)
    loftq_init(model, folder)
    for path, wrapper in adapters(model):
        wide = plain.get_parameter(f"{path}.weight").float()
        codes, state = functional.quantize_4bit(wide, quant_type="nf4", compress_statistics=True)
        quantised = functional.dequantize_4bit(codes, state)
        found = wrapper.scale * wrapper.lora_B.detach() @ wrapper.lora_A.detach()
        as_wrong_as(found, theirs(wide, quantised), theirs(wide.double(), quantised), path)
