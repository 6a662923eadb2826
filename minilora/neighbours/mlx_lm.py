"""mlx-lm: the yaml of `mlx_lm.lora -c`, and the folder of train.jsonl and valid.jsonl that it reads.

Keys and defaults: mlx_lm/lora.py and LORA.md of mlx-lm 0.32.
"""

import re
from pathlib import Path
from typing import Any

from ..files.model_folder import ModelFolder
from .translate import FORMAT, NEW_ADAPTERS, STREAMED, Config, Ignored, Neighbour, Refused, Rule, one_of, only

LOGGED = Ignored("every step is logged")


def data_of(value: Any, config: Config) -> Config | Refused:
    folder = Path(str(value))
    if not (folder / "train.jsonl").is_file():
        return Refused(f"{folder / 'train.jsonl'} is not there, and nothing is downloaded", "Give --data.")
    found = {"data": str(folder / "train.jsonl")}
    return found | ({"val": str(folder / "valid.jsonl")} if (folder / "valid.jsonl").is_file() else {})


def adapters_of(value: Any, config: Config) -> Config | Refused:
    """The settings of lora_parameters, and of num_layers, which counts from the last layer."""
    if not isinstance(value, dict) or not {"rank", "scale"} <= value.keys():
        return Refused("rank and scale belong there", "Give both.")
    keys = [str(key) for key in value.get("keys") or []]
    odd = [key for key in keys if not re.fullmatch(r"[\w.]+", key)]
    if odd:
        return Refused(f"its key {odd[0]} is not a module name", "Give names of linears, such as self_attn.q_proj.")
    found = {
        "lora_r": value["rank"],
        "lora_alpha": int(value["rank"]) * float(value["scale"]),
        "lora_dropout": value.get("dropout") or 0.0,
    }
    return found | {"lora_targets": _targets(keys, config)}


def _targets(keys: list[str], config: Config) -> str:
    """lora_targets for linears of the last num_layers layers; 16 of them unless it is given, all for -1."""
    last, layers = int(config.get("num_layers") or 16), _layers(config)
    if last < 0 or last >= layers:
        return ",".join(keys) or "all-linear"
    numbers = "|".join(map(str, range(layers - last, layers)))
    names = rf"(.*\.)?({'|'.join(map(re.escape, keys))})" if keys else r"[\w.]+"
    return rf".*\.({numbers})\.{names}"


def _layers(config: Config) -> int:
    if not isinstance(config.get("model"), str):
        raise TypeError("num_layers counts the layers of the model")
    return int(ModelFolder(config["model"]).language.get("num_hidden_layers") or 0)


def schedule_of(value: Any, config: Config) -> Config | Refused:
    arguments = value.get("arguments") if isinstance(value, dict) else None
    if not arguments or value.get("name") != "cosine_decay" or len(arguments) > 2 and arguments[2]:
        return Refused("only cosine to zero, linear and constant are supported", "Give --schedule and --warmup.")
    return {"schedule": "cosine", "lr": arguments[0], "warmup": value.get("warmup") or 0}


def rate_of(value: Any, config: Config) -> Config | Ignored:
    return Ignored("lr_schedule has its own") if config.get("lr_schedule") else {"lr": value}


def steps_of(value: Any, config: Config) -> Config:
    """Optimizer steps; mlx-lm counts batches."""
    return {"max_steps": max(1, int(value) // int(config.get("grad_accumulation_steps") or 1))}


def decay_of(value: Any, config: Config) -> Config | Ignored | Refused:
    """AdamW's own arguments; those of optimizers that are not used mean nothing."""
    own = value.get(config.get("optimizer") or "adam") if isinstance(value, dict) else None
    if not own:
        return Ignored("empty")
    if set(own) - {"weight_decay", "betas"}:
        return Refused("only weight_decay and betas of AdamW can be set", "Take the others out.")
    beta1, beta2 = own.get("betas") or (0.9, 0.999)
    return {"weight_decay": own.get("weight_decay") or 0.0, "beta1": beta1, "beta2": beta2}


RULES: dict[str, Rule] = {
    "model": "model", "train": Ignored("the command decides it"), "fine_tune_type": one_of(
        {"lora": {"method": "lora"}, "dora": {"method": "dora"}, "full": {"method": "full"}}, Refused("this method is not supported")),
    "optimizer": one_of({name: Ignored("AdamW without decay is Adam") for name in ("adam", "adamw")}, Refused("AdamW is the optimizer")),
    "optimizer_config": decay_of, "data": data_of, "seed": "seed", "num_layers": Ignored("read together with lora_parameters"),
    "batch_size": "batch_size", "iters": steps_of, "grad_accumulation_steps": "accumulation", "val_batches": Ignored("all validation rows count"),
    "learning_rate": rate_of, "lr_schedule": schedule_of, "steps_per_report": LOGGED, "steps_per_eval": "eval_every",
    "save_every": "save_every", "resume_adapter_file": NEW_ADAPTERS, "adapter_path": "output", "test": Ignored("minilora eval does this"),
    "test_batches": Ignored("minilora eval does this"), "max_seq_length": lambda value, config: {"max_length": value, "truncate": "cut"},
    "config": Ignored("it is this file"), "grad_checkpoint": "checkpointing", "clear_cache_threshold": STREAMED, "lora_parameters": adapters_of,
    "mask_prompt": lambda value, config: {"loss_on": "last"} if value else Ignored("prompts are never trained here, only answers"),
    "report_to": "log_to", "wandb": lambda value, config: {"log_to": "wandb"}, "project_name": LOGGED,
    "trust_remote_code": Ignored("no code of a folder is ever run"), "chat_template": FORMAT, "prompt_feature": only("prompt", "--columns prompt=NAME"),
    "completion_feature": only("completion", "--columns response=NAME"),
}  # fmt: skip


def defaults(config: Config) -> Config:
    """mlx-lm's where they differ: Adam at one rate, without clipping, for 1,000 batches."""
    found = {
        "lr": 1e-5,
        "schedule": "constant",
        "warmup": 0,
        "clip": 0.0,
        "batch_size": 4,
        "seed": 0,
        "keep": "last",
        "truncate": "cut",
    }
    if config.get("fine_tune_type") != "full" and "lora_parameters" not in config:
        found |= {"lora_r": 8, "lora_alpha": 160.0, "lora_targets": _targets([], config)}
    return found | steps_of(config.get("iters") or 1000, config)


MLX_LM = Neighbour(
    "mlx-lm",
    lambda config: (
        bool({"lora_parameters", "fine_tune_type"} & config.keys()) or {"iters", "adapter_path"} <= config.keys()
    ),
    RULES,
    defaults,
)
