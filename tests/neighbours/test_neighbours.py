"""Configs of LLaMA-Factory, mlx-lm and axolotl, as their own examples are written: what they mean here, key by key."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from tiny import make_model, make_rows

from minilora import load_model
from minilora.__main__ import main
from minilora.cli.shared_flags import settings_of_file
from minilora.config import FIELDS
from minilora.errors import DataError, UsageError
from minilora.lora import linears
from minilora.neighbours import NEIGHBOURS, writer_of
from minilora.settings import resolve
from minilora.targets import chosen

GOLDEN = Path(__file__).parents[1] / "golden"
LLAMA_FACTORY = """
model_name_or_path: m
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 4
lora_target: all
dataset: own,chat
template: qwen3_nothink
cutoff_len: 1024
max_samples: 1000
preprocessing_num_workers: 16
output_dir: saves/lora
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 2
learning_rate: 1.0e-4
num_train_epochs: 3.0
max_steps: 1
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
shift_attn: false
image_max_pixels: 262144
"""
MLX_LM = """
model: m
train: true
fine_tune_type: lora
optimizer: adamw
optimizer_config:
  adamw:
    betas: [0.9, 0.98]
    weight_decay: 0.05
data: rows
seed: 0
num_layers: 1
batch_size: 4
iters: 100
val_batches: 25
learning_rate: 1e-5
steps_per_report: 10
steps_per_eval: 20
resume_adapter_file: null
adapter_path: adapters
save_every: 50
test: false
max_seq_length: 512
grad_checkpoint: false
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 8
  scale: 20.0
  dropout: 0.0
lr_schedule:
  name: cosine_decay
  warmup: 10
  arguments: [2e-5, 100]
"""
AXOLOTL = """
base_model: m
plugins:
  - axolotl.integrations.liger.LigerPlugin
liger_rope: true
strict: false
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: rows/train.jsonl
    type: chat_template
val_set_size: 0.05
output_dir: outputs/out
sequence_len: 2048
sample_packing: true
adapter: qlora
lora_r: 16
lora_alpha: 32
lora_target_modules: [q_proj, k_proj]
lora_mlp_kernel: true
wandb_project:
wandb_entity:
gradient_accumulation_steps: 2
micro_batch_size: 1
num_epochs: 1
optimizer: adamw_torch_4bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: true
gradient_checkpointing: offload
resume_from_checkpoint:
logging_steps: 1
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
weight_decay: 0.0
special_tokens:
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model of two layers, rows in each tool's places, and dataset_info.json."""
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "m")
    for folder in ("data", "rows"):
        (tmp_path / folder).mkdir()
    rows = json.loads(make_rows(tmp_path / "data" / "own.json").read_text())
    (tmp_path / "data" / "own.json").write_text(json.dumps(rows[:10]))
    (tmp_path / "data" / "chat.json").write_text(json.dumps([{"conversations": rows[-1]["messages"]}]))
    for name in ("train", "valid"):
        (tmp_path / "rows" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:10]))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    info = {"own": {"file_name": "own.json"}, "hub": {"hf_hub_url": "Org/rows"},
            "chat": {"file_name": "chat.json", "formatting": "sharegpt", "columns": {"messages": "conversations"}, "tags": tags},
            "drawn": {"file_name": "own.json", "num_samples": 4},
            "named": {"file_name": "own.json", "columns": {"prompt": "question", "query": "input", "response": "answer"}},
            "pictures": {"file_name": "own.json", "columns": {"messages": "messages", "images": "images"}},
            "odd": {"file_name": "chat.json", "tags": {"user_tag": "visitor"}}}  # fmt: skip
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    return tmp_path


def settings(text: str, **changes: Any) -> dict[str, Any]:
    """What a config means whose keys are replaced by, or get beside them, the changed ones."""
    Path("run.yaml").write_text(yaml.safe_dump(yaml.safe_load(text) | changes, sort_keys=False))
    return settings_of_file("run.yaml", None)


def test_a_llama_factory_yaml_trains(place: Path, capsys: pytest.CaptureFixture[str]):
    (place / "run.yaml").write_text(LLAMA_FACTORY)
    assert main(["train", "run.yaml"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("llama-factory")]
    assert len(lines) == LLAMA_FACTORY.count(": ") + 1  # one for each key, and one for its defaults
    assert any(line.split("->")[-1].strip() == "max_length 1024, truncate cut" for line in lines)
    assert any("ignored: the chat format is read" in line for line in lines)
    config = resolve(settings(LLAMA_FACTORY))
    expected = {"model": "m", "data": "data/own.json,data/chat.json", "output": "saves/lora", "lora_r": 4, "lora_alpha": 8.0, "lr": 1e-4,
                "lora_targets": "all-linear", "max_length": 1024, "truncate": "cut", "batch_size": 1, "accumulation": 2, "epochs": 3.0,
                "schedule": "cosine", "warmup": 0.1, "save_every": 500, "keep": "last", "method": "lora", "max_steps": 1}  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert (place / "saves" / "lora" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dataset": "own", "max_samples": 3}, {"data": "data/own.json#:3"}),
        ({"dataset": "drawn"}, {"data": "data/own.json#4"}),
        ({"dataset": "drawn", "max_samples": 3}, {"data": "data/own.json#3"}),
        ({"dataset": ["named"]}, {"data": "data/own.json", "columns": {"instruction": "question", "output": "answer"}}),
        ({"eval_dataset": "own"}, {"val": "data/own.json"}),
        ({"val_size": 0.1}, {"val": 0.1}),
        ({"quantization_bit": 4}, {"quant": "nf4"}),
        ({"use_dora": True}, {"method": "dora"}),
        ({"pissa_init": True, "lora_alpha": 5}, {"lora_init": "pissa", "lora_alpha": 5}),
        ({"warmup_steps": 0}, {"warmup": 0.1}),
        ({"warmup_ratio": 0.0, "learning_rate": None}, {"warmup": 0, "lr": 5e-5}),
        ({"report_to": "tensorboard"}, {"log_to": "tensorboard"}),
        ({"lora_target": "q_proj,v_proj", "mask_history": True}, {"lora_targets": "q_proj,v_proj", "loss_on": "last"}),
        ({"stage": "dpo", "pref_beta": 0.2, "pref_loss": "sigmoid"}, {"objective": "dpo", "beta": 0.2}),
    ],
    ids=str,
)
def test_what_keys_of_llama_factory_mean(place: Path, changes: dict[str, Any], expected: dict[str, Any]):
    found = settings(LLAMA_FACTORY, **changes)
    resolve(found)
    assert {name: found.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"stage": "ppo"}, "'stage'"),
        ({"shift_attn": True}, "'shift_attn'"),
        ({"lora_target": 5, "num_train_epochs": 1, "max_steps": "many"}, "'max_steps'"),
        ({"neftune_noise_alpha": 5, "additional_target": "embed_tokens"}, "'neftune_noise_alpha', 'additional_target'"),
        ({"optim": "adafactor"}, "'optim'"),
        ({"dataset": "hub"}, "hub is on a hub, and nothing is downloaded"),
        ({"dataset": "pictures"}, "column images"),
        ({"dataset": "odd"}, "tag visitor"),
        ({"dataset": "own,named"}, "columns of different names"),
        ({"max_samples": float("inf")}, "its value is not one"),
        ({"warmup_steps": 5}, "another key gave warmup 0.1"),
        ({"lorra_rank": 5}, "'lorra_rank'"),
        ({"adapter_name_or_path": "a"}, "new adapters"),
    ],
    ids=str,
)
def test_what_llama_factory_can_and_this_cannot_is_refused_by_name(
    place: Path, changes: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(UsageError, match=told) as error:
        settings(LLAMA_FACTORY, **changes)
    assert error.value.hint and "refused: " in capsys.readouterr().err


def test_a_value_that_is_no_number_is_an_error_of_usage(place: Path):
    with pytest.raises(UsageError, match="clip is"):
        resolve(settings(LLAMA_FACTORY, max_grad_norm=float("nan")))


def test_a_data_set_that_nobody_knows_is_an_error_of_data(place: Path):
    with pytest.raises(DataError, match="no data set 'nobody'"):
        settings(LLAMA_FACTORY, dataset="nobody")
    with pytest.raises(DataError, match="elsewhere/dataset_info.json is not there"):
        settings(LLAMA_FACTORY, dataset_dir="elsewhere")


def test_an_mlx_lm_config(place: Path):
    found = settings(MLX_LM)
    config = resolve(found)
    expected = {"model": "m", "data": "rows/train.jsonl", "val": "rows/valid.jsonl", "output": "adapters", "max_steps": 100, "lr": 2e-5,
                "schedule": "cosine", "warmup": 10.0, "clip": 0.0, "lora_r": 8, "lora_alpha": 160.0, "weight_decay": 0.05, "beta2": 0.98,
                "eval_every": 20, "save_every": 50, "max_length": 512, "seed": 0}  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    paths = list(linears(load_model("m", device="cpu")))
    assert chosen(paths, config.lora_targets) == [f"model.layers.1.self_attn.{part}_proj" for part in "qv"]
    assert settings(MLX_LM, num_layers=-1)["lora_targets"] == "self_attn.q_proj,self_attn.v_proj"
    assert settings(MLX_LM, grad_accumulation_steps=4)["max_steps"] == 25
    constant = resolve(settings(MLX_LM, lr_schedule=None))
    assert (constant.lr, constant.schedule, constant.warmup) == (1e-5, "constant", 0)
    for changes in (
        {"lr_schedule": {"name": "exponential_decay", "arguments": [1, 2]}},
        {"optimizer": "muon"},
        {"data": "mlx-community/WikiSQL"},
    ):
        with pytest.raises(UsageError, match=next(iter(changes))):
            settings(MLX_LM, **changes)


@pytest.mark.parametrize(
    "changes",
    [{"num_layers": "x"}, {"iters": float("inf")}, {"model": None}, {"iters": None, "grad_accumulation_steps": "x"}],
    ids=str,
)
@pytest.mark.parametrize("own", [True, False])
def test_an_mlx_lm_config_of_no_sense_is_an_error_of_usage(place: Path, changes: dict[str, Any], own: bool):
    with pytest.raises(UsageError):
        resolve(settings(MLX_LM if own else MLX_LM.partition("lora_parameters")[0], **changes))


def test_the_linears_of_an_mlx_lm_config_are_those_that_mlx_lm_adapts(place: Path):
    """By the keys of an adapter that mlx-lm wrote, whose config says the last layer and no names."""
    base, written = GOLDEN / "qwen2", load_file(GOLDEN / "mlx" / "qwen2" / "adapters.safetensors")
    found = settings(
        MLX_LM.partition("lora_parameters")[0],
        model=str(base),
        lora_parameters={"rank": 3, "scale": 2.5, "dropout": 0.1},
    )
    assert found["lora_r"] == 3 and found["lora_alpha"] == 7.5
    paths = chosen(list(linears(load_model(base, device="cpu"))), found["lora_targets"])
    assert sorted(paths) == sorted(key.removesuffix(".lora_a") for key in written if key.endswith(".lora_a"))


def test_an_axolotl_config(place: Path):
    config = resolve(settings(AXOLOTL))
    expected = {"model": "m", "data": "rows/train.jsonl", "val": "0.05", "output": "outputs/out", "quant": "nf4", "method": "lora",
                "lora_targets": "q_proj,k_proj", "epochs": 1.0, "batch_size": 1, "accumulation": 2, "checkpointing": True, "offload": "on",
                "warmup": 10.0, "log_to": ""}  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert settings(AXOLOTL, adapter="", load_in_4bit=False)["method"] == "full"
    for changes in (
        {"train_on_inputs": True},
        {"rl": "kto"},
        {"datasets": [{"path": "Org/rows"}]},
        {"special_tokens": {"eos_token": "x"}},
    ):
        with pytest.raises(UsageError, match=next(iter(changes))):
            settings(AXOLOTL, **changes)


def test_a_file_of_ours_is_nobody_elses():
    assert (
        writer_of({"model": "m", "data": "d", "output": "o", "lr": 1e-4, "lora_r": 8, "finetuning_type": "lora"})
        is None
    )
    assert writer_of({"base_model": "m", "dataset": "d"}) is None and writer_of({}) is None


@pytest.mark.parametrize("neighbour", NEIGHBOURS, ids=lambda n: n.name)
def test_every_key_that_is_renamed_becomes_a_setting(neighbour: Any):
    assert {rule for rule in neighbour.rules.values() if isinstance(rule, str)} <= FIELDS.keys()
