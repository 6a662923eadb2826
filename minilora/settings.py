"""How settings are given: yaml files and flags, the names that other tools use, and what is wrong with a value."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import yaml

from .config import FIELDS, DataConfig, TrainConfig
from .errors import UsageError
from .files.regular import read_file
from .spelling import SWITCH, nearest

# names known from Hugging Face, PEFT, LLaMA-Factory and others
ALIASES = {
    "model_name_or_path": "model", "base_model": "model", "dataset": "data", "output_dir": "output", "learning_rate": "lr",
    "lr_scheduler_type": "schedule", "warmup_ratio": "warmup", "warmup_steps": "warmup", "num_train_epochs": "epochs",
    "num_epochs": "epochs", "per_device_train_batch_size": "batch_size", "micro_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation", "max_grad_norm": "clip", "cutoff_len": "max_length",
    "max_seq_length": "max_length", "sequence_len": "max_length", "max_input_length": "max_source_length",
    "max_output_length": "max_target_length", "lora_rank": "lora_r", "r": "lora_r", "rank": "lora_r", "alpha": "lora_alpha",
    "lora_target": "lora_targets", "target_modules": "lora_targets", "targets": "lora_targets", "use_rslora": "rslora",
    "dropout": "lora_dropout", "gradient_checkpointing": "checkpointing", "eval_steps": "eval_every",
    "save_steps": "save_every", "save_total_limit": "keep_checkpoints", "adam_beta1": "beta1", "adam_beta2": "beta2",
    "tokenized_path": "cache", "num_virtual_tokens": "pre_seq_len", "virtual_tokens": "pre_seq_len", "test_size": "test",
    "finetuning_type": "method", "val_size": "val", "eval_dataset": "val", "torch_dtype": "dtype", "iters": "max_steps", "report_to": "log_to",
}  # fmt: skip
# settings of LLaMA-Factory, Hugging Face and axolotl that have no meaning here, and why none is needed
NOT_NEEDED = {
    "stage": "supervised rows are what is trained", "do_train": "the command says it", "do_eval": "--val says it",
    "template": "the chat format is read from the model's folder", "chat_template": "the chat format is read from the model's folder",
    "bf16": "the compute dtype is measured, --compute sets it", "fp16": "the compute dtype is measured, --compute sets it",
    "tf32": "the compute dtype is measured, --compute sets it", "flash_attn": "attention takes the fastest path there is",
    "flash_attention": "attention takes the fastest path there is", "packing": "rows are always packed, and never see each other",
    "sample_packing": "rows are always packed, and never see each other", "pad_to_sequence_len": "nothing is padded",
    "group_by_length": "nothing is padded", "remove_unused_columns": "keys that are not read stop the run", "optim": "AdamW is the optimizer",
    "optimizer": "AdamW is the optimizer", "logging_steps": "every step is logged", "plot_loss": "loss.png is always drawn",
    "overwrite_cache": "a cache follows what it was made of",
    "overwrite_output_dir": "nothing is overwritten unless the command says so",
    "preprocessing_num_workers": "rows are read as a stream", "dataloader_num_workers": "rows are read as a stream",
    "trust_remote_code": "no code of a folder is ever run", "use_fast_tokenizer": "there is one tokenizer",
    "ddp_timeout": "one process trains", "dataset_dir": "--data takes a path", "save_strategy": "--save-every says it",
    "eval_strategy": "--eval-every says it", "evaluation_strategy": "--eval-every says it", "save_safetensors": "always",
    "load_best_model_at_end": "--keep says it",
}  # fmt: skip
# settings of the same tools that cannot be had here: why, and what to do instead
QUANTIZED = ("a quantised base is asked for by --quant", "Give --quant nf4 or --quant int8.")
REFUSED = {
    "resume_from_checkpoint": ("a run goes on by --resume", "minilora train --output RUN --resume"),
    "quantization_bit": QUANTIZED, "load_in_4bit": QUANTIZED, "load_in_8bit": QUANTIZED,
    "adapter_name_or_path": (
        "training starts from new adapters",
        "Go on with a run by --resume, or merge the adapter (minilora merge) and train on the result.",
    ),
}  # fmt: skip
POSITIVE = {
    "max_length", "max_source_length", "max_target_length", "source_tail", "lora_r", "lora_alpha", "epochs", "max_steps", "batch_size",
    "accumulation", "micro_tokens", "eval_every", "save_every", "keep_checkpoints", "threads",
    "rank_timeout", "beta", "loraplus_lr_ratio", "pre_seq_len", "freeze_trainable_layers", "bottleneck_size",
}  # fmt: skip
NOT_NEGATIVE = {"lr", "warmup", "clip", "weight_decay", "seed"}
# the first field of each group of the help, in the order of the fields
GROUPS = {
    "data": "data", "model": "model", "lora_r": "LoRA", "lr": "optimisation", "device": "machine", "output": "what is kept",
}  # fmt: skip
MAX_YAML, MAX_DIGITS = 1 << 17, 100
NUMBERS = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}
MOST, MOST_OF_OTHERS = {"seed": 2**63 - 1, "epochs": 2**31 - 1, "rank_timeout": 10**6}, 2**31 - 1  # of whole numbers
BELOW_ONE = {"lora_dropout", "beta1", "beta2"}


def without_not_needed(settings: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The settings without those that have no meaning here, and a line that names them and says why; "" where there are none."""
    found = "; ".join(f"{k} ({NOT_NEEDED[k]})" for k in settings if k in NOT_NEEDED)
    return {k: v for k, v in settings.items() if k not in NOT_NEEDED}, f"not needed here: {found}" if found else ""


def resolve(*sources: dict[str, Any]) -> TrainConfig:
    """Merge settings over the defaults, later sources over earlier ones; UsageError names a wrong key or value."""
    values: dict[str, Any] = {}
    for source in sources:
        unknown = [given for given in source if _field_of(given) is None]
        if len(unknown) > 1:
            more = f" and {len(unknown) - 20:,} more" if unknown[20:] else ""
            raise UsageError(f"unknown settings {', '.join(unknown[:20])}{more}", "See minilora train --help.")
        names: dict[str, str] = {}  # as they are given
        for given, value in source.items():
            name = canonical(given)
            if name == "keep" and str(value).isdigit():
                name = "keep_checkpoints"  # its name in older runs
            if name in names:
                raise UsageError(f"{names[name]}, {given} are one setting", "Give one of them.")
            names[name] = given
            values[name] = convert(FIELDS[name], value)
    return TrainConfig(**values)


def canonical(given: str) -> str:
    """The field that a name or an alias means; UsageError with the nearest one otherwise."""
    name, refused = _field_of(given), refusal(given)
    if name is not None:
        return name
    if refused is not None:
        raise refused
    near = nearest(given.replace("-", "_"), [*FIELDS, *ALIASES])
    hint = f"Did you mean {near!r}?" if near else "See minilora train --help."
    raise UsageError(f"unknown setting {given!r}", hint)


def refusal(given: str) -> UsageError | None:
    """What to say of a setting of another tool that has no meaning here, or cannot be had; None for any other name."""
    name = given.lstrip("-").replace("-", "_")
    if name in REFUSED:
        why, hint = REFUSED[name]
        return UsageError(f"{given}: {why}", hint)
    if name in NOT_NEEDED:
        why = NOT_NEEDED[name]
        return UsageError(f"{given} is not needed here", f"{why[0].upper()}{why[1:]}: leave it out.")
    return None


def _field_of(given: str) -> str | None:
    name = given.replace("-", "_")
    name = ALIASES.get(name, name)
    return name if name in FIELDS else None


def convert(f: Field, value: Any) -> Any:
    """A value from yaml or a flag in the type of its field: 1e-4 is a number whatever yaml thinks. UsageError if it cannot be one."""
    kind, *none = get_args(f.type) if isinstance(f.type, UnionType) else [f.type]
    if value is None and none:
        return None
    try:
        return _pairs(value) if kind is dict else _scalar(f.name, kind, value)
    except (KeyError, ValueError):
        said = value[0] if kind is dict and isinstance(value, list) and len(value) == 1 else value
        shown = "of the wrong type" if isinstance(said, (dict, list)) else "empty" if said is None else repr(said)[:80]
        raise UsageError(f"{f.name} is {shown}", f"It can be {_allowed(f.name, kind)}: {f.metadata['help']}.") from None


def _pairs(value: Any) -> dict[str, str]:
    """NAME=TEXT,NAME=TEXT, a list of NAME=TEXT (one for each --define), or a mapping."""
    if isinstance(value, (str, list)):
        parts = [str(part).partition("=") for part in (value.split(",") if isinstance(value, str) else value)]
        if not all(name.strip() and mark for name, mark, _ in parts):
            raise ValueError(value)
        value = {name.strip(): text.strip() for name, _, text in parts}
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ValueError(value)
    return {_sound(name): _sound(str(text)) for name, text in value.items()}


def _sound(text: str) -> str:
    """The text; ValueError where it holds a NUL or half a surrogate pair, which no path and no file can hold."""
    if "\0" in text:
        raise ValueError(text)
    text.encode()
    return text


def _scalar(name: str, kind: Any, value: Any) -> Any:
    if kind is str and isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        return ",".join(value)
    choices = get_args(kind)  # of a Literal
    if isinstance(value, bool) and "off" in choices:  # yaml reads on and off as truth values
        value = "on" if value else "off"
    if value is None or isinstance(value, (dict, list)) or (choices and value not in choices):
        raise ValueError(value)
    if choices or kind is str:
        return _sound(str(value))
    if kind is bool:
        return SWITCH[str(value).lower()]
    number = int(str(value)) if kind is int else float(str(value))
    if not _bounds(name)[1](number) or number == math.inf:
        raise ValueError(value)
    most = MOST.get(name, MOST_OF_OTHERS if kind is int else math.inf)
    if number > most:
        raise UsageError(
            f"{name} is {str(value)[:80]!r}", f"It can be up to {most:,}: {FIELDS[name].metadata['help']}."
        )
    return number


def _bounds(name: str) -> tuple[str, Callable[[float], bool]]:
    """What a number can be, in words and as a check."""
    if name in POSITIVE:
        return " above 0", lambda number: number > 0
    if name in NOT_NEGATIVE:
        return " from 0 on", lambda number: number >= 0
    assert name in BELOW_ONE, name
    return " from 0 to below 1", lambda number: 0 <= number < 1


def _allowed(name: str, kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(get_args(kind))
    texts = {bool: "true or false", str: "a text", dict: "NAME=TEXT"}
    return texts.get(kind) or ("a whole number" if kind is int else "a number") + _bounds(name)[0]


class _Loader(yaml.SafeLoader):
    """Safe yaml that refuses duplicate keys, and what grows out of proportion: aliases of aliases, numbers of thousands of digits."""

    def get_single_node(self):
        node = super().get_single_node()
        if node is not None and _size(node, {}) > MAX_YAML:
            raise yaml.YAMLError(f"with its aliases written out it is larger than {MAX_YAML:,} characters")
        return node

    def construct_object(self, node, deep=False):
        if node.tag in NUMBERS and len(node.value) > MAX_DIGITS:
            raise _wrong(node, f"a number of {len(node.value):,} characters")
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, IndexError, AttributeError, OverflowError):  # such as the 45th of a month
            raise _wrong(node, f"{node.value[:40]!r} is not of the type that it looks like: quote it") from None

    def construct_mapping(self, node, deep=False):
        pairs = (
            node.value if isinstance(node, yaml.MappingNode) else []
        )  # else the tag !!map is a lie, which yaml tells
        keys = Counter(repr(self.construct_object(k, deep=True)) for k, _ in pairs)
        twice = next((key for key, count in keys.items() if count > 1), None)
        if twice is not None:
            raise _wrong(node, f"duplicate key {twice}")
        return super().construct_mapping(node, deep)


def _wrong(node: yaml.Node, what: str) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, what, node.start_mark)


def _size(node: Any, known: dict[int, float]) -> float:
    """How many characters a node has with its aliases written out; more than any number if it is an alias within itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        inside = node.value if isinstance(node.value, list) else []
        parts = [part for entry in inside for part in (entry if isinstance(entry, tuple) else [entry])]
        known[id(node)] = 1 + (sum(_size(part, known) for part in parts) if parts else len(node.value))
    return known[id(node)]


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a yaml file."""
    try:
        text = read_file(path, UsageError, MAX_YAML).decode("utf-8")
        value = yaml.load(text, _Loader)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", "Give a yaml file with -c.") from None
    except yaml.MarkedYAMLError as error:
        at = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{path}{at}: {error.problem or error.context}", "Correct the yaml there.") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())}", "Correct the yaml there.") from None
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
        raise UsageError(f"{path} holds no settings", "Write lines of `name: value`.")
    return value


def by_group() -> dict[str, list[Field]]:
    """The settings of a run under the titles of GROUPS; how rows become tokens stands with the data."""
    found: dict[str, list[Field]] = {}
    title, data = "", fields(DataConfig)
    for f in list(FIELDS.values())[len(data) :]:
        title = GROUPS.get(f.name, title)
        found.setdefault(title, []).append(f)
    found["data"] += data
    return found
