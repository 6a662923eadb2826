"""What can be done with a finished run."""

from dataclasses import fields, replace
from pathlib import Path

from ..config import DataConfig, TrainConfig
from ..terminal import shell

BESIDE = ("prefix", "prompt", "bottleneck")  # methods whose adapters cannot be merged


def next_commands(config: TrainConfig) -> list[str]:
    """Commands to type: talk with what was trained, measure it, merge it."""
    from ..rows.sources import validation_rows

    run = Path(config.output)
    if config.method == "full":
        return [shell("chat", "--model", run / "model")]
    both = ("--model", Path(config.model), "--adapter", run / "adapter")
    rows = validation_rows(config, run)
    # a file that was split off is UTF-8
    reading = _reading(replace(config, encoding="") if run in rows.parents else config)
    bits = () if config.quant == "keep" else ("--quant", config.quant)
    measure = [shell("eval", *both, *bits, "--data", rows, *reading)]
    return [
        shell("chat", *both, *bits),
        *(measure if config.objective == "sft" else []),  # eval reads answers as they are
        *([] if config.method in BESIDE else [shell("merge", *both, "--output", run / "merged")]),
    ]


def _reading(config: DataConfig) -> list[object]:
    """The flags with which eval reads rows as a run did."""
    words: list[object] = list(config.reading_flags())
    told = {word for word in words if isinstance(word, str)}
    for f in fields(DataConfig):
        value, flag = getattr(config, f.name), f.name.replace("_", "-")
        if value in (f.default, {}) or f"--{flag}" in told:
            continue
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", value]
    return words
