"""What can be done with a finished run."""

from dataclasses import replace
from pathlib import Path

from ..config import TrainConfig
from ..terminal import shell

BESIDE = ("prefix", "prompt", "bottleneck")  # methods whose adapters cannot be merged


def next_commands(config: TrainConfig) -> list[str]:
    """Commands to type: talk with what was trained, measure it, merge it."""
    run = Path(config.output)
    if config.method == "full":
        return [shell("chat", "--model", run / "model")]
    both = ("--model", Path(config.model), "--adapter", run / "adapter")
    split_off = run / "data" / "val.jsonl"
    rows = config.val if Path(config.val).is_file() else split_off if split_off.is_file() else config.data
    # a file that was split off is UTF-8
    reading = (replace(config, encoding="") if rows == split_off else config).reading_flags()
    reading += [] if config.train_end else ["--no-train-end"]
    bits = () if config.quant == "keep" else ("--quant", config.quant)
    measure = [shell("eval", *both, *bits, "--data", Path(rows), *reading)]
    return [
        shell("chat", *both, *bits),
        *(measure if config.objective == "sft" else []),  # eval reads answers as they are
        *([] if config.method in BESIDE else [shell("merge", *both, "--output", run / "merged")]),
    ]
