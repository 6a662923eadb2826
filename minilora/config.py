"""Every setting of a training run, with its default; settings.py reads them from yaml files and flags."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import yaml


def setting(default: Any, help: str, same: bool = True) -> Any:
    """A field with its help text; same: a resumed run must have the same value (files are compared by what they hold)."""
    return field(default=default, metadata={"help": help, "same": same})


@dataclass(frozen=True)
class DataConfig:
    """How rows become tokens."""

    columns: dict = field(
        default_factory=dict, metadata={"help": "prompt=NAME,response=NAME: columns of other names", "same": True}
    )
    encoding: str = setting("", "of the rows, such as big5; default utf-8, gb18030 for a csv that looks Chinese", False)
    ignore_keys: str = setting("", "keys of the rows, with commas, that are knowingly left out")
    define: dict = field(default_factory=dict, metadata={"help": "fill {{name}} in the rows", "same": False})
    skip_bad: bool = setting(False, "leave rows out that cannot be used, and count them, instead of stopping")
    loss_on: Literal["all", "last"] = setting("all", "train every answer of a conversation, or its last alone")
    train_end: bool = setting(True, "train the token that ends an answer, too; off where one token is the whole answer")
    max_length: int = setting(2048, "longest row in tokens; longer ones are dropped and counted")
    max_source_length: int | None = setting(None, "most masked tokens of a row")
    max_target_length: int | None = setting(None, "most trained tokens of a row")
    source_tail: int | None = setting(None, "keep only this many tokens of a row's last question, from its end")
    truncate: Literal["drop", "cut", "error"] = setting("drop", "leave rows over a limit out, shorten them, or stop")

    @property
    def ignored(self) -> frozenset[str]:
        """The keys that are knowingly left out."""
        return frozenset(key.strip() for key in self.ignore_keys.split(",") if key.strip())

    def over(self, masked: int, trained: int) -> str | None:
        """The first limit that a row of so many tokens is over, as "max_length 2048"."""
        sizes = {"max_length": masked + trained, "max_source_length": masked, "max_target_length": trained}
        limits = {name: getattr(self, name) for name in sizes}
        return next((f"{k} {limits[k]}" for k, n in sizes.items() if limits[k] is not None and n > limits[k]), None)

    def reading_flags(self) -> list[str]:
        """The flags with which eval and predict read rows as this run did."""
        words = [word for name, text in self.define.items() for word in ("--define", f"{name}={text}")]
        columns = ",".join(f"{ours}={theirs}" for ours, theirs in self.columns.items())
        given = {"--columns": columns, "--encoding": self.encoding, "--ignore-keys": self.ignore_keys,
                 "--source-tail": str(self.source_tail or "")}  # fmt: skip
        return words + [word for flag, text in given.items() if text for word in (flag, text)]

    def data_settings(self) -> dict[str, Any]:
        """All that decides the tokens of a row."""
        return {f.name: getattr(self, f.name) for f in fields(DataConfig)}


PLAIN = DataConfig()
RANK_TIMEOUT = 300.0  # seconds


@dataclass(frozen=True)
class TrainConfig(DataConfig):
    """A training run. Field names are the yaml keys and, with dashes, the flags."""

    data: str = setting("", "rows: json, jsonl, csv, xlsx, txt, path#500@0.2, several with commas", same=False)
    val: str = setting("", "validation rows: a file, a number of rows, or a share such as 0.05", same=False)
    test: str = setting("", "rows kept for a test, a number or a share; written to RUN/data/test.jsonl", same=False)
    mix_general: str = setting("", "file of general rows to mix in", same=False)
    mix_ratio: str = setting("1:1", "own rows : general rows")
    cache: str = setting("", "folder that keeps the tokens of the rows for the next run", same=False)
    model: str = setting("", "folder of a Hugging Face checkpoint, or its name on the hub", same=False)
    method: Literal["lora", "dora", "prefix", "prompt", "ia3", "freeze", "bitfit", "bottleneck", "full"] = setting(
        "lora", "what is trained (docs/methods.md); full: every weight in fp32, for small models"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "of the base weights; auto is the checkpoint's, bfloat16 for float16"
    )
    quant: Literal["keep", "off", "nf4", "int8"] = setting(
        "keep", "bits of the base's linears: nf4, int8, keep those of the folder, or off to widen them to dtype"
    )
    fp8: Literal["off", "on"] = setting("off", "on: the base's linears and their products in FP8, on a GPU that has it")
    lora_r: int = setting(16, "rank of the adapters")
    lora_alpha: float = setting(32.0, "adapter scale is alpha / r")
    lora_dropout: float = setting(0.0, "dropout in front of the adapters")
    lora_targets: str = setting(
        "all-linear", "all-linear, attention, mlp, experts, names with commas, or a regex over whole paths"
    )
    rslora: bool = setting(False, "scale by alpha / sqrt(r)")
    shared_outer: bool = setting(False, "experts share the factor on the side of the hidden state")
    lora_init: Literal["kaiming", "loftq", "pissa"] = setting(
        "kaiming", "start of A and B; loftq: the error of --quant; pissa: the largest part of each weight"
    )
    pre_seq_len: int = setting(128, "virtual tokens of prefix and prompt tuning")
    prefix_projection: bool = setting(False, "an MLP makes the prefix while it is trained")
    freeze_trainable_layers: int = setting(2, "last layers that freeze trains")
    bottleneck_size: int = setting(64, "width of bottleneck adapters")
    objective: Literal["sft", "dpo"] = setting(
        "sft", "sft: train answers; dpo: prefer the chosen answer of each row to the rejected one"
    )
    beta: float = setting(0.1, "dpo's: how far the model may move from the base")
    lr: float = setting(2e-4, "peak learning rate")
    loraplus_lr_ratio: float = setting(1.0, "LoRA+: the rate of B over that of A; 16 is its paper's")
    schedule: Literal["cosine", "linear", "constant"] = setting("cosine", "learning rate after the warmup")
    warmup: float = setting(0.03, "warmup: a share of the steps below 1, else a number of steps")
    epochs: float | None = setting(
        None, "passes over the data; default 3, up to 20 for a set so small that it makes < 100 steps"
    )
    max_steps: int | None = setting(None, "stop after so many optimizer steps")
    batch_size: int = setting(8, "rows of a batch")
    accumulation: int = setting(1, "batches of an optimizer step")
    clip: float = setting(1.0, "largest gradient norm; 0 clips nothing")
    weight_decay: float = setting(0.0, "AdamW's")
    beta1: float = setting(0.9, "AdamW's")
    beta2: float = setting(0.999, "AdamW's")
    seed: int = setting(42, "of the order, the adapters' start and the dropout")
    device: str = setting("auto", "cpu, cuda, cuda:1; auto is the GPU if there is one", same=False)
    compute: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "dtype of activations and products; auto is the fastest one on this machine", same=False
    )
    threads: int | None = setting(None, "CPU threads; default all, or one where products are too small", same=False)
    micro_tokens: int | None = setting(
        None, "most tokens of one forward and backward pass; default max_length, on a GPU what fits", same=False
    )
    checkpointing: bool = setting(
        False, "recompute activations in the backward pass: less memory, more time", same=False
    )
    keep_attention: bool = setting(
        False, "with checkpointing, keep what attention gave: more memory, less time", same=False
    )
    offload: Literal["off", "on"] = setting("off", "on: checkpointing's inputs wait on the host", same=False)
    kernels: Literal["auto", "off"] = setting(
        "auto", "auto: this project's Triton kernels on a GPU; off: PyTorch's operations", same=False
    )
    gemm: Literal["auto", "triton", "augmented", "library"] = setting(
        "auto", "form of the products on a GPU; auto: the fastest one, measured on the model's shapes", same=False
    )
    deterministic: bool = setting(False, "the same bits also on a GPU: attention adds in one order", same=False)
    graphs: Literal["auto", "on", "off"] = setting(
        "auto", "CUDA graphs; auto: where a CPU takes longer to launch a stream than the GPU to compute it", same=False
    )
    rank_timeout: float = setting(
        RANK_TIMEOUT, "seconds to wait for a rank that gives no answer, with torchrun or --gpus", same=False
    )
    shard: Literal["off", "on"] = setting("off", "on: ranks share the frozen base, each keeps 1/N of it", same=False)
    output: str = setting("", "run folder to write", same=False)
    log_to: str = setting("", "log to tensorboard, wandb, swanlab, mlflow too; several with commas", same=False)
    eval_every: int | None = setting(None, "steps between evaluations; default an epoch")
    save_every: int | None = setting(None, "steps between checkpoints; default an epoch", same=False)
    study: bool = setting(False, "every few steps, log how each adapter learns; the report draws it", same=False)
    keep: Literal["best", "last"] = setting(
        "best", "step that RUN/adapter holds: the one of the lowest validation loss, or the last", same=False
    )
    keep_checkpoints: int = setting(2, "checkpoints to keep, beside the best", same=False)


FIELDS = {f.name: f for f in fields(TrainConfig)}


def to_yaml(config: TrainConfig) -> str:
    """A config as yaml that -c reads back."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def must_match(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide the losses of a run; a resumed run must have the same."""
    return {f.name: getattr(config, f.name) for f in fields(config) if f.metadata["same"]}


def defaults() -> dict[str, Any]:
    """Every field's default."""
    return asdict(TrainConfig())
