"""minilora train: an adapter (or the whole model) trained on rows of conversations."""

import os
import sys
from typing import Annotated, Any

from ..errors import UsageError
from ..terminal import say
from .arguments import Arg, Settings
from .next_commands import next_commands
from .shared_flags import ConfigFile, Recipe, check_paths, settings_of_file

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
        int | None, Arg("train on so many GPUs of this machine, or processes on its CPU", within=(1, 1024))
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
    if (gpus or 1) > 1 and "RANK" not in os.environ:  # which torchrun gives to those that it starts
        from ..ranks.start import train_on

        return train_on(gpus or 1, sys.argv[1:])
    first = os.environ.get("RANK", "0") == "0"
    if first:
        say(f"train   {resolved.model} on {resolved.data}" if resolved.model and resolved.data else "train")
    from ..train import train

    train(resolved, resume, overwrite)
    if first:
        say("\n".join(["", *(f"  {line}" for line in next_commands(resolved))]))
    return 0
