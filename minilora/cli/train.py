"""minilora train: an adapter (or the whole model) trained on rows of conversations."""

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

from ..errors import UsageError
from ..terminal import say
from .arguments import Arg, Settings
from .shared_flags import ConfigFile, Recipe, check_paths, settings_of_file

if TYPE_CHECKING:
    from ..config import TrainConfig

USAGE = "minilora train [RUN.yaml] [--SETTING VALUE ...]\n       minilora train --output RUN --resume"
EPILOG = """examples:
  minilora train --model DIR --data rows.json --val 0.05 --output runs/first
  minilora train run.yaml --lr 1e-4 --lora-r 8 --checkpointing --output runs/second

A switch is --name or --no-name. Names known from Hugging Face and LLaMA-Factory
are understood: --learning_rate, --cutoff_len, ..."""


def run(
    recipe: Recipe | None = None,
    *,
    config: ConfigFile | None = None,
    resume: Annotated[bool, Arg("go on from the newest checkpoint in --output")] = False,
    overwrite: Annotated[bool, Arg("delete what is in --output")] = False,
    gpus: Annotated[
        int | None,
        Arg("train on so many GPUs of this machine, or processes on its CPU", group="machine", within=(1, 1024)),
    ] = None,
    **settings: Annotated[Any, Settings()],
) -> int:
    from pathlib import Path

    from ..settings import read_yaml, resolve

    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other", "Give one of them.")
    sources = [settings_of_file(recipe, config), settings]
    if resume:
        if "output" not in settings:
            raise UsageError("--output is missing", "minilora train --output RUN --resume")
        saved = Path(settings["output"]) / "config.yaml"
        if not saved.is_file():
            raise UsageError(f"{saved} is not there", "Give the --output of the run to go on with.")
        sources.insert(0, read_yaml(saved))
    resolved = resolve(*sources)
    check_paths(resolved.model, None, resolved.data, resolved.encoding)
    if gpus is not None and gpus > 1 and "RANK" not in os.environ:
        from ..ranks.start import train_on

        return train_on(gpus, sys.argv[1:])
    if os.environ.get("RANK", "0") != "0":
        from ..train import train

        train(resolved, resume, overwrite)
        return 0
    say(f"train   {resolved.model} on {resolved.data}" if resolved.model and resolved.data else "train")
    from ..train import train

    train(resolved, resume, overwrite)
    say("\n".join(["", *(f"  {line}" for line in next_commands(resolved))]))
    return 0


def next_commands(config: "TrainConfig") -> list[str]:
    """What can be done with a finished run, as commands to type."""
    from dataclasses import replace
    from pathlib import Path

    from ..terminal import shell

    run = Path(config.output)
    if config.method == "full":
        return [shell("chat", "--model", run / "model")]
    both = ("--model", config.model, "--adapter", run / "adapter")
    split_off = run / "data" / "val.jsonl"
    rows = config.val if Path(config.val).is_file() else split_off if split_off.is_file() else config.data
    # a file that was split off is UTF-8
    reading = (replace(config, encoding="") if rows == split_off else config).reading_flags()
    reading += [] if config.train_end else ["--no-train-end"]
    bits = () if config.quant == "keep" else ("--quant", config.quant)
    return [
        shell("chat", *both, *bits),
        shell("eval", *both, *bits, "--data", rows, *reading),
        shell("merge", *both, "--output", run / "merged"),
    ]
