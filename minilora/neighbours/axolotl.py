"""axolotl: its yaml, with rows in files of this machine.

Keys and defaults: docs/config-reference of axolotl 0.21.
"""

from pathlib import Path
from typing import Any

from .llama_factory import SCHEDULE
from .translate import (
    COMPUTE,
    FORMAT,
    NEW_ADAPTERS,
    OWN_KERNELS,
    PACKED,
    PLACES,
    STREAMED,
    Config,
    Ignored,
    Neighbour,
    Refused,
    Rule,
    adamw,
    one_of,
    only,
)  # fmt: skip

# forms of rows that their keys tell here as well
TYPES = ("alpaca", "chat_template", "sharegpt", "chat_template.default", "alpaca_chat.load_qa", "input_output")
KNOWN = {"path", "type", "data_files", "ds_type", "split", "name", "conversation", "field_messages", "roles_to_train", "train_on_eos",
         "message_property_mappings", "message_field_role", "message_field_content", "chat_template"}  # fmt: skip
LOGGED = Ignored("every step is logged, and loss.png and report.html are always drawn")
OTHER = Refused("this way of training is not supported")


def data_of(value: Any, config: Config) -> Config | Refused:
    paths = []
    for entry in value if isinstance(value, list) else []:
        odd = sorted(set(entry) - KNOWN) if isinstance(entry, dict) else ["no mapping"]
        if odd:
            return Refused(f"its {odd[0]} is not known", "Give --data, and --columns for columns of other names.")
        if entry.get("type") not in (None, *TYPES):
            return Refused(
                f"the type {entry['type']} is a form of its own", f"Rows of {', '.join(TYPES[:3])} are read."
            )
        files = entry.get("data_files") or entry.get("path")
        paths += [str(file) for file in (files if isinstance(files, list) else [files])]
    absent = next((path for path in paths if not Path(path).exists()), None)
    if absent is not None or not paths:
        return Refused(f"{absent or 'the list'} is not a file here, and nothing is downloaded", "Give --data.")
    return {"data": ",".join(paths)}


def val_of(value: Any, config: Config) -> Config | Refused:
    found = data_of(value, config)
    if isinstance(found, Refused):
        return found
    return Refused("it names several files", "Give one with --val.") if "," in found["data"] else {"val": found["data"]}


def adapter_of(value: Any, config: Config) -> Config | Refused:
    method = {"method": "dora" if config.get("peft_use_dora") else "lora"}
    found = {"lora": method, "qlora": method | {"quant": "nf4"}, "": {"method": "full"}}
    return found.get(value) or Refused("this method is not supported", "docs/methods.md says what there is.")


def targets_of(value: Any, config: Config) -> Config | Ignored:
    if config.get("lora_target_linear"):
        return Ignored("lora_target_linear names all")
    return {"lora_targets": ",".join(value) if isinstance(value, list) else str(value)}


def special_tokens(value: Any, config: Config) -> Ignored | Refused:
    added = {"eos_token", "bos_token", "additional_special_tokens"} & set(value or {})
    if added:
        return Refused(
            "the tokenizer stays as it is", "Take all but pad_token out: the folder says what ends an answer."
        )
    return Ignored("nothing is padded")


def checkpointing_of(value: Any, config: Config) -> Config:
    """It may name a form of its own, such as offload."""
    return {"checkpointing": bool(value)} | ({"offload": "on"} if value == "offload" else {})


RULES: dict[str, Rule] = {
    "base_model": "model", "base_model_config": Ignored("config.json is in the model's folder"), "model_type": Ignored("config.json sets it"),
    "tokenizer_type": Ignored("read from the folder's files"), "tokenizer_config": Ignored("read from the folder's files"),
    "trust_remote_code": Ignored("no code of a folder is ever run"), "is_qwen_derived_model": Ignored("config.json sets it"),
    "load_in_8bit": lambda value, config: {"quant": "int8"} if value else Ignored("off"),
    "load_in_4bit": lambda value, config: {"quant": "nf4"} if value else Ignored("off"),
    "strict": Ignored("an unknown key is always an error"), "plugins": OWN_KERNELS, "datasets": data_of, "test_datasets": val_of,
    "dataset_prepared_path": Ignored("--cache keeps tokens"), "dataset_processes": STREAMED, "shuffle_merged_datasets": Ignored("--seed orders all rows"),
    "dataset_exact_deduplication": Refused("rows stay as they are", "minilora data split --drop-duplicates takes them out."),
    "val_set_size": lambda value, config: {"val": value} if value else Ignored("off"), "chat_template": FORMAT, "eot_tokens": FORMAT,
    "default_system_message": Refused("a row says its own system prompt", "Write it into the rows."), "train_on_inputs": Refused("only answers are trained"),
    "roles_to_train": only(["assistant"], "only answers are trained"), "train_on_eos": Ignored("--train-end sets it"),
    "output_dir": "output", "adapter": adapter_of, "lora_model_dir": NEW_ADAPTERS, "sequence_len": "max_length",
    "excess_length_strategy": one_of({"drop": {"truncate": "drop"}, "truncate": {"truncate": "cut"}, "raise": {"truncate": "error"}}, OTHER),
    "sample_packing": PACKED, "eval_sample_packing": PACKED, "pad_to_sequence_len": PACKED, "group_by_length": PACKED, "multipack_real_batches": PACKED,
    "lora_r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "lora_target_modules": targets_of,
    "lora_target_linear": lambda value, config: {"lora_targets": "all-linear"} if value else Ignored("off"),
    "lora_fan_in_fan_out": Refused("weights lie as the checkpoint has them"), "lora_modules_to_save": Refused("whole modules are not trained beside adapters"),
    "peft_use_dora": Ignored("read together with adapter"), "peft_use_rslora": "rslora", "loraplus_lr_ratio": "loraplus_lr_ratio",
    "peft_layers_to_transform": Refused("--lora-targets sets it", "Give a regular expression over whole paths."),
    "peft_init_lora_weights": one_of({True: Ignored("B begins as zero"), "pissa": {"lora_init": "pissa"}}, OTHER),
    "lora_mlp_kernel": OWN_KERNELS, "lora_qkv_kernel": OWN_KERNELS, "lora_o_kernel": OWN_KERNELS, "unfrozen_parameters": OTHER,
    "rl": one_of({"dpo": {"objective": "dpo"}}, Refused("only sft and dpo are supported", "See --objective.")), "rl_beta": "beta",
    "wandb_project": lambda value, config: {"log_to": "wandb"} if value else Ignored("off"), "wandb_entity": LOGGED, "wandb_watch": LOGGED,
    "wandb_name": LOGGED, "wandb_run_id": LOGGED, "wandb_log_model": LOGGED, "wandb_mode": Ignored("WANDB_MODE sets it"),
    "use_tensorboard": lambda value, config: {"log_to": "tensorboard"} if value else Ignored("off"),
    "gradient_accumulation_steps": "accumulation", "micro_batch_size": "batch_size", "eval_batch_size": STREAMED, "num_epochs": "epochs",
    "max_steps": "max_steps", "optimizer": adamw, "lr_scheduler": SCHEDULE, "learning_rate": "lr", "weight_decay": "weight_decay",
    "adam_beta1": "beta1", "adam_beta2": "beta2", "adam_epsilon": only(1e-8, "AdamW's epsilon is 1e-8"), "max_grad_norm": "clip",
    "warmup_steps": "warmup", "warmup_ratio": "warmup", "seed": "seed", "bf16": COMPUTE, "fp16": COMPUTE, "float16": COMPUTE, "bfloat16": COMPUTE,
    "tf32": COMPUTE, "gradient_checkpointing": checkpointing_of, "gradient_checkpointing_kwargs": Ignored("--checkpointing has only one form"),
    "flash_attention": OWN_KERNELS, "xformers_attention": OWN_KERNELS, "sdp_attention": OWN_KERNELS, "attn_implementation": OWN_KERNELS,
    "torch_compile": OWN_KERNELS, "early_stopping_patience": Refused("a run always trains to its end", "--keep best holds the best step."),
    "resume_from_checkpoint": Refused("a run is continued with --resume", "minilora train --output RUN --resume"),
    "auto_resume_from_checkpoints": Refused("a run is continued with --resume", "minilora train --output RUN --resume"),
    "logging_steps": LOGGED, "evals_per_epoch": Ignored("--eval-every counts steps; without it, once an epoch"),
    "saves_per_epoch": Ignored("--save-every counts steps; without it, once an epoch"), "eval_steps": "eval_every", "save_steps": "save_every",
    "eval_strategy": Ignored("--eval-every sets it"), "save_strategy": Ignored("--save-every sets it"), "save_total_limit": "keep_checkpoints",
    "save_safetensors": Ignored("always on"), "load_best_model_at_end": lambda value, config: {"keep": "best" if value else "last"},
    "debug": LOGGED, "deepspeed": PLACES, "fsdp": PLACES, "fsdp_config": PLACES, "fsdp_version": PLACES, "ddp_timeout": PLACES, "local_rank": PLACES,
    "special_tokens": special_tokens, "tokens": Refused("the vocabulary stays as it is"), "neftune_noise_alpha": OTHER, "relora": OTHER,
    "hub_*": Ignored("nothing is uploaded"), "push_dataset_to_hub": Ignored("nothing is uploaded"), "trackio_*": LOGGED, "mlflow_*": LOGGED, "swanlab_*": LOGGED,
    "use_swanlab": lambda value, config: {"log_to": "swanlab"} if value else Ignored("off"), "loss_watchdog_threshold": Ignored("a loss that is not finite ends a run"),
    "loss_watchdog_patience": Ignored("a loss that is not finite ends a run"), "activation_offloading": Ignored("--offload sets it"),
    "liger_*": OWN_KERNELS, "cut_cross_entropy": OWN_KERNELS, "use_kernels": OWN_KERNELS, "flash_*": OWN_KERNELS, "flex_*": OWN_KERNELS,
    "processor_type": Ignored("only text is trained"), "skip_prepare_dataset": STREAMED, "remove_unused_columns": PACKED, "save_only_model": LOGGED,
    "ddp_find_unused_parameters": PLACES, "dp_*": PLACES, "tensor_parallel_size": PLACES, "context_parallel_size": PLACES, "expert_parallel_size": PLACES,
    "tokenizer_use_mistral_common": Ignored("read from the folder's files"), "resize_token_embeddings_to_32x": Refused("the vocabulary stays as it is"),
    "cosine_min_lr_ratio": Refused("the learning rate always falls to zero"), "cosine_constant_lr_ratio": Refused("the learning rate always falls to zero"),
    "lora_target_parameters": Refused("--lora-targets names experts", "Give --lora-targets experts."), "dataloader_num_workers": STREAMED, "dataloader_prefetch_factor": STREAMED,
}  # fmt: skip


def defaults(config: Config) -> Config:
    """axolotl's where they differ."""
    found = {"epochs": 1.0, "batch_size": 1, "keep": "last"}
    return found if config.get("adapter") else found | {"method": "full"}


AXOLOTL = Neighbour("axolotl", lambda config: {"base_model", "datasets"} <= config.keys(), RULES, defaults)
