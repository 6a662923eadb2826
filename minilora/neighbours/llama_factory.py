"""LLaMA-Factory: its yaml of `llamafactory-cli train`, with the data sets that dataset_info.json names.

Keys and defaults: src/llamafactory/hparams and data/README.md of LLaMA-Factory 0.9.
"""

from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files.model_folder import read_json
from ..rows import open_rows
from ..rows.shapes import CHATS
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

# the column that LLaMA-Factory means by a name, the name here, and what it is called unless it is given
COLUMNS = {
    "prompt": ("instruction", ("instruction",)), "query": ("input", ("input",)), "response": ("output", ("output",)),
    "system": ("system", ("system",)), "history": ("history", ("history",)), "messages": ("messages", CHATS),
}  # fmt: skip
# of preferences, and of tool calls, which rows hold under these names
SAME = ("chosen", "rejected", "tools")
TAGS = {
    "from", "value", "role", "content", "human", "user", "gpt",
    "assistant", "system", "observation", "function_call", "function", "tool",
}  # fmt: skip
HUBS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")


def data_of(value: Any, config: Config) -> Config | Refused:
    """data and columns of dataset: names in dataset_info.json, with commas or as a list."""
    names = [n.strip() for n in (value if isinstance(value, list) else str(value).split(","))]
    folder = Path(str(config.get("dataset_dir") or "data"))
    if not (folder / "dataset_info.json").is_file():
        raise DataError(
            f"{folder / 'dataset_info.json'} is not there", "dataset_dir says where it lies; or give --data."
        )
    known = read_json(folder / "dataset_info.json")
    paths, columns = [], {}
    for number, name in enumerate(names):
        entry = known.get(name)
        if not isinstance(entry, dict):
            raise DataError(
                f"{folder / 'dataset_info.json'} has no data set {name!r}", f"It has {', '.join(known)[:200]}."
            )
        found = _columns_of(entry)
        wrong = found if isinstance(found, Refused) else None
        if "file_name" not in entry:
            hint = f"Download it, and name its file in {folder / 'dataset_info.json'}."
            wrong = Refused(f"{name} is on a hub, and nothing is downloaded", hint)
        elif number and found != columns:
            wrong = Refused(
                "its data sets have columns of different names", "Give --data and --columns, one run for each."
            )
        if wrong or isinstance(found, Refused):
            return wrong or found
        columns = found
        paths.append(_with_count(folder / str(entry["file_name"]), entry.get("num_samples"), config.get("max_samples")))
    return {"data": ",".join(paths)} | ({"columns": columns} if columns else {})


def _columns_of(entry: Config) -> dict[str, str] | Refused:
    """--columns for an entry of dataset_info.json: what is not called as it is by default."""
    found = {}
    for theirs, column in (entry.get("columns") or {}).items():
        ours, usual = COLUMNS.get(theirs, (theirs, (theirs,) if theirs in SAME else ()))
        if not usual:
            return Refused(f"its column {theirs} cannot be trained", "Only text can.")
        if column not in usual and theirs in SAME:
            return Refused(f"its column {theirs} is called {column}", f"Call it {theirs}.")
        if column is not None and column not in usual:
            found[ours] = column
    odd = [tag for tag in (entry.get("tags") or {}).values() if tag not in TAGS]
    return Refused(f"its messages have the tag {odd[0]}", f"Take one of {', '.join(sorted(TAGS))}.") if odd else found


def _with_count(path: Path, drawn: Any, first: Any) -> str:
    """path#N for the rows that are wanted; LLaMA-Factory takes all where there are no more."""
    if not (drawn or first):
        return str(path)
    rows = len(open_rows(path))
    if first and int(first) < min(rows, int(drawn or rows)):
        return f"{path}#:{int(first)}" if not drawn else f"{path}#{int(first)}"
    return f"{path}#{int(drawn)}" if drawn and int(drawn) < rows else str(path)


def val_of(value: Any, config: Config) -> Config | Refused:
    found = data_of(value, config | {"max_samples": None})
    if isinstance(found, Refused):
        return found
    if "," in found["data"]:
        return Refused("it names several data sets", "Give one file with --val.")
    return {"val": found["data"]}


def method_of(value: Any, config: Config) -> Config | Refused:
    if value not in ("lora", "full", "freeze"):
        return Refused("this method is not supported", "docs/methods.md says what there is.")
    return {"method": "dora" if value == "lora" and config.get("use_dora") else value}


def targets_of(value: Any, config: Config) -> Config:
    names = ",".join(value) if isinstance(value, list) else str(value)
    return {"lora_targets": "all-linear" if names == "all" else names}


def number_or_none(name: str) -> Rule:
    """A rule for a number that 0 or less switches off."""
    return lambda value, config: {name: value} if float(value) > 0 else Ignored("off")


SCHEDULES: dict[Any, Config | Ignored | Refused] = {
    "cosine": {"schedule": "cosine"}, "linear": {"schedule": "linear"}, "constant": {"schedule": "constant"},
    "constant_with_warmup": {"schedule": "constant"},
}  # fmt: skip
SCHEDULE = one_of(SCHEDULES, Refused("only cosine, linear and constant are supported", "Give --schedule."))
BITS = one_of(
    {4: {"quant": "nf4"}, 8: {"quant": "int8"}}, Refused("only 4 and 8 bits are supported", "Give --quant nf4 or int8.")
)
OTHER = Refused("this way of training is not supported")
ANSWERED = Ignored("minilora predict answers rows, and scores the answers")
LOGGED = Ignored("every step is logged, and loss.png and report.html are always drawn")
KEPT = Ignored("a snapshot is whole, and --keep says which step counts")
OF_SWITCH = Ignored("it belongs to a switch that is off")
TEXT_ALONE = Ignored("only text is trained")
NO_UPLOAD = Ignored("nothing is uploaded")

RULES: dict[str, Rule] = {
    # model
    "model_name_or_path": "model", "adapter_name_or_path": NEW_ADAPTERS, "trust_remote_code": Ignored("no code of a folder is ever run"),
    "model_revision": only("main", "the folder is what it is"), "resize_vocab": Refused("the vocabulary stays as it is"),
    "add_tokens": Refused("the vocabulary stays as it is"), "add_special_tokens": Refused("the vocabulary stays as it is"),
    "rope_scaling": Refused("config.json sets it", "Write rope_scaling into the model's config.json."), "shift_attn": OTHER,
    "mixture_of_depths": OTHER, "moe_aux_loss_coef": OTHER, "train_from_scratch": OTHER,
    "flash_attn": Ignored("attention takes the fastest path there is"), "use_unsloth": OWN_KERNELS, "use_unsloth_gc": OWN_KERNELS,
    "enable_liger_kernel": OWN_KERNELS, "use_fast_tokenizer": Ignored("there is one tokenizer"),
    "split_special_tokens": Ignored("what a row writes never becomes a special token"), "low_cpu_mem_usage": Ignored("always on"),
    "disable_gradient_checkpointing": Ignored("--checkpointing sets it"),
    "use_reentrant_gc": Ignored("--checkpointing has only one form"), "upcast_layernorm": COMPUTE, "upcast_lmhead_output": COMPUTE,
    "cache_dir": Ignored("the caches of the hubs are looked up"), "print_param_status": LOGGED,
    "quantization_bit": BITS, "quantization_method": one_of({"bnb": Ignored("--quant rounds as bitsandbytes does"),
                                                             "bitsandbytes": Ignored("--quant rounds as bitsandbytes does")}, OTHER),
    "quantization_type": only("nf4", "4 bits are NF4"), "double_quantization": Ignored("it only changes memory"),
    "infer_*": ANSWERED, "use_cache": ANSWERED, "use_kv_cache": ANSWERED,
    # data
    "template": FORMAT, "dataset": data_of, "eval_dataset": val_of, "dataset_dir": Ignored("it tells where dataset_info.json is"),
    "max_samples": Ignored("read together with the data"), "cutoff_len": lambda value, config: {"max_length": value, "truncate": "cut"},
    "train_on_prompt": Refused("only answers are trained"), "mask_history": lambda value, config: {"loss_on": "last" if value else "all"},
    "val_size": number_or_none("val"), "packing": PACKED, "neat_packing": PACKED, "streaming": STREAMED, "buffer_size": STREAMED,
    "mix_strategy": only("concat", "rows of all data sets are trained; path@RATE repeats some"),
    "interleave_probs": Refused("rows of all data sets are trained", "path@RATE repeats some."), "tool_format": FORMAT,
    "default_system": Refused("a row says its own system prompt", "Write it into the rows."), "enable_thinking": FORMAT,
    "overwrite_cache": STREAMED, "preprocessing_num_workers": STREAMED, "preprocessing_batch_size": STREAMED,
    "dataloader_num_workers": STREAMED, "dataloader_pin_memory": STREAMED, "ignore_pad_token_for_loss": PACKED,
    "data_shared_file_system": STREAMED, "tokenized_path": "cache", "eval_num_beams": ANSWERED, "eval_on_each_dataset": ANSWERED,
    "disable_shuffling": Refused("rows are shuffled by --seed"), "group_by_length": PACKED, "remove_unused_columns": PACKED,
    # method
    "stage": one_of({"sft": {"objective": "sft"}, "dpo": {"objective": "dpo"}}, Refused("only sft and dpo are supported", "See --objective.")),
    "finetuning_type": method_of, "lora_rank": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "lora_target": targets_of,
    "loraplus_lr_ratio": "loraplus_lr_ratio", "loraplus_lr_embedding": Ignored("no embedding is trained"), "use_rslora": "rslora",
    "use_dora": Ignored("read together with finetuning_type"), "create_new_adapter": Ignored("every run begins a new one"),
    "pissa_init": lambda value, config: {"lora_init": "pissa" if value else "kaiming"}, "pissa_convert": Ignored("RUN/adapter fits the plain base"),
    "pissa_iter": Ignored("the decomposition is exact"), "additional_target": Refused("whole modules are not trained beside adapters"),
    "freeze_trainable_layers": "freeze_trainable_layers", "freeze_trainable_modules": only("all", "whole layers are trained"),
    "freeze_extra_modules": OTHER, "use_llama_pro": OTHER, "use_galore": OTHER, "use_apollo": OTHER, "use_badam": OTHER,
    "use_adam_mini": OTHER, "use_muon": OTHER, "use_dft_loss": OTHER, "use_asft_loss": OTHER, "use_eaft_loss": OTHER,
    "freeze_vision_tower": Ignored("vision is kept as it is"), "freeze_multi_modal_projector": Ignored("vision is kept as it is"),
    "freeze_language_model": Refused("the language model is what is trained"), "pref_beta": "beta", "pref_ftx": OTHER,
    "pref_loss": only("sigmoid", "dpo's loss is the sigmoid's"), "dpo_label_smoothing": OTHER, "ref_model": Refused("the base is the reference"),
    "pure_bf16": COMPUTE, "plot_loss": LOGGED, "compute_accuracy": ANSWERED, "include_effective_tokens_per_second": LOGGED,
    "include_num_input_tokens_seen": LOGGED, "early_stopping_steps": Refused("a run always trains to its end", "--keep best holds the best step."),
    # training
    "output_dir": "output", "overwrite_output_dir": Ignored("--overwrite sets it"), "do_train": Ignored("the command decides it"),
    "do_eval": Ignored("--val sets it"), "do_predict": ANSWERED, "predict_with_generate": ANSWERED, "learning_rate": "lr",
    "num_train_epochs": "epochs", "max_steps": number_or_none("max_steps"), "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": STREAMED, "eval_accumulation_steps": STREAMED, "gradient_accumulation_steps": "accumulation",
    "lr_scheduler_type": SCHEDULE, "warmup_ratio": number_or_none("warmup"), "warmup_steps": number_or_none("warmup"),
    "optim": adamw, "weight_decay": "weight_decay", "adam_beta1": "beta1", "adam_beta2": "beta2",
    "adam_epsilon": only(1e-8, "AdamW's epsilon is 1e-8"), "max_grad_norm": "clip", "seed": "seed", "data_seed": Ignored("--seed orders the rows"),
    "bf16": COMPUTE, "fp16": COMPUTE, "tf32": COMPUTE, "bf16_full_eval": COMPUTE, "fp8": OTHER,
    "gradient_checkpointing": "checkpointing", "torch_compile": OWN_KERNELS, "neftune_noise_alpha": OTHER, "label_smoothing_factor": OTHER,
    "logging_steps": LOGGED, "logging_strategy": LOGGED, "logging_first_step": LOGGED, "report_to": "log_to", "run_name": LOGGED,
    "disable_tqdm": LOGGED, "logging_dir": LOGGED, "save_steps": "save_every", "save_strategy": KEPT, "save_total_limit": "keep_checkpoints",
    "save_only_model": KEPT, "save_safetensors": KEPT, "load_best_model_at_end": lambda value, config: {"keep": "best" if value else "last"},
    "metric_for_best_model": only("eval_loss", "the best step is that of the lowest validation loss"), "greater_is_better": KEPT,
    "eval_steps": "eval_every", "eval_strategy": Ignored("--val and --eval-every set it"), "evaluation_strategy": Ignored("--val and --eval-every set it"),
    "resume_from_checkpoint": Refused("a run is continued with --resume", "minilora train --output RUN --resume"), "deepspeed": PLACES, "fsdp": PLACES,
    "fsdp_config": PLACES, "ddp_timeout": PLACES, "ddp_find_unused_parameters": PLACES, "local_rank": PLACES, "ray_run_name": PLACES,
    "push_to_hub": NO_UPLOAD, "hub_model_id": NO_UPLOAD, "use_swanlab": lambda value, config: {"log_to": "swanlab"} if value else Ignored("off"),
    "swanlab_*": LOGGED, "profiler_*": LOGGED, "enable_torch_profiler": LOGGED, "ray_*": PLACES, "master_addr": PLACES, "master_port": PLACES,
    "image_*": TEXT_ALONE, "video_*": TEXT_ALONE, "audio_*": TEXT_ALONE, "media_dir": TEXT_ALONE, "use_audio_in_video": TEXT_ALONE,
    "crop_to_patches": TEXT_ALONE, "galore_*": OF_SWITCH, "apollo_*": OF_SWITCH, "badam_*": OF_SWITCH, "oft_*": OF_SWITCH, "ppo_*": OF_SWITCH,
    "kto_*": OF_SWITCH, "kt_*": OF_SWITCH, "asft_alpha": OF_SWITCH, "eaft_alpha": OF_SWITCH, "use_kt": OTHER, "use_mca": PLACES,
    "vllm_*": ANSWERED, "sglang_*": ANSWERED, "export_*": ANSWERED, "do_sample": ANSWERED, "temperature": ANSWERED, "top_p": ANSWERED,
    "top_k": ANSWERED, "num_beams": ANSWERED, "max_new_tokens": ANSWERED, "repetition_penalty": ANSWERED, "length_penalty": ANSWERED,
    "skip_special_tokens": ANSWERED, "use_v1_kernels": OWN_KERNELS, "gradient_checkpointing_kwargs": Ignored("--checkpointing has only one form"),
}  # fmt: skip


def defaults(config: Config) -> Config:
    """LLaMA-Factory's and the Trainer's where they differ; the scale of an adapter is 2 unless it is given."""
    found = {
        "lr": 5e-5,
        "schedule": "linear",
        "warmup": 0,
        "epochs": 3.0,
        "max_length": 2048,
        "truncate": "cut",
        "keep": "last",
    }
    if config.get("finetuning_type", "lora") != "lora":
        return found
    rank = config.get("lora_rank") or 8
    return found | {"lora_r": rank, "lora_alpha": 2 * rank}


LLAMA_FACTORY = Neighbour(
    "llama-factory",
    lambda config: "stage" in config or {"finetuning_type", "template"} <= config.keys(),
    RULES,
    defaults,
)
