"""minilora train: an adapter (or the whole model) trained on rows of conversations."""

from typing import Annotated, Any

from ..errors import UsageError
from ..ranks.start import run_on, several
from ..terminal import say
from .arguments import Arg, Settings
from .next_commands import next_commands
from .serve import start_watch
from .shared_flags import ConfigFile, GPUs, Recipe, check_paths, settings_of_file

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
    gpus: GPUs = 1,
    watch: Annotated[int | None, Arg("show the curves on this port of 127.0.0.1", "PORT", within=(0, 65535))] = None,
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
    check_paths(resolved.model, None, resolved.data, resolved.encoding, resolved.log_to)
    if several(gpus):
        return run_on(gpus)
    if watch is not None:
        start_watch(resolved.output, watch)
    say(f"train   {resolved.model} on {resolved.data}" if resolved.model and resolved.data else "train")
    from ..train import train

    train(resolved, resume, overwrite)
    say("\n".join(["", *(f"  {line}" for line in next_commands(resolved))]))
    return 0
