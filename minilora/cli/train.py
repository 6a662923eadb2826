"""minilora train: an adapter (or the whole model) trained on rows of conversations."""

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .before import check_paths, say
from .shared_flags import setting_flags

if TYPE_CHECKING:
    from ..config import TrainConfig

EXAMPLES = """examples:
  minilora train --model DIR --data rows.json --val 0.05 --output runs/first
  minilora train run.yaml --lr 1e-4 --lora-r 8 --checkpointing --output runs/second

A switch is --name or --no-name. Names known from Hugging Face and LLaMA-Factory
are understood: --learning_rate, --cutoff_len, ..."""


def flags(parser: argparse.ArgumentParser) -> None:
    parser.usage = "minilora train [RUN.yaml] [--SETTING VALUE ...]\n       minilora train --output RUN --resume"
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EXAMPLES
    file_flags(parser)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --output")
    parser.add_argument("--overwrite", action="store_true", help="delete what is in --output")
    run_flags(parser)


def file_flags(parser: argparse.ArgumentParser) -> None:
    """A yaml file of settings, given by itself or with -c."""
    parser.add_argument(
        "recipe", nargs="?", metavar="RUN.yaml", help="yaml file of the settings below; flags win over it"
    )
    parser.add_argument("-c", "--config", metavar="FILE", help="the same")


def run_flags(parser: argparse.ArgumentParser, shown: bool = True, left_out: tuple[str, ...] = ()) -> None:
    """A flag for every setting of a training run, in groups."""
    from ..config import by_group

    for title, settings in by_group().items():
        group = parser.add_argument_group(title)
        setting_flags(group, [f for f in settings if f.name not in left_out], shown)


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from ..config import read_yaml, resolve

    flags = given_settings(args)
    if args.resume and args.overwrite:
        raise UsageError("--resume and --overwrite exclude each other", "Give one of them.")
    sources = settings_files(args)
    if args.resume:
        if "output" not in flags:
            raise UsageError("--output is missing", "minilora train --output RUN --resume")
        saved = Path(flags["output"]) / "config.yaml"
        if not saved.is_file():
            raise UsageError(f"{saved} is not there", "Give the --output of the run to go on with.")
        sources.insert(0, read_yaml(saved))
    config = resolve(*sources, flags)
    check_paths(config.model, None, config.data, config.encoding)
    say(f"train   {config.model} on {config.data}" if config.model and config.data else "train")
    from ..train import train

    train(config, args.resume, args.overwrite)
    say("\n".join(["", *(f"  {line}" for line in next_commands(config))]))
    return 0


def settings_files(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The settings of the yaml file of file_flags, if there is one; those that have no meaning here are told and left out."""
    from pathlib import Path

    from ..config import read_yaml, without_not_needed

    if args.recipe and args.config:
        raise UsageError(f"{args.recipe} and --config {args.config} are two files", "Give one of them.")
    if args.recipe and not Path(args.recipe).is_file():
        raise UsageError(
            f"unknown argument {args.recipe!r}",
            "What stands alone is a yaml file of settings, or on or off after a switch.",
        )
    path = args.recipe or args.config
    if not path:
        return []
    settings, told = without_not_needed(read_yaml(Path(path)))
    if told:
        say(told)
    return [settings]


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given as flags."""
    from ..config import defaults

    return {name: vars(args)[name] for name in defaults() if name in vars(args)}


def next_commands(config: "TrainConfig") -> list[str]:
    """What can be done with a finished run, as commands to type."""
    from pathlib import Path

    from ..run.monitor import shell

    run = Path(config.output)
    if config.method == "full":
        return [shell("chat", "--model", run / "model")]
    both = ("--model", config.model, "--adapter", run / "adapter")
    split_off = run / "data" / "val.jsonl"
    rows = config.val if Path(config.val).is_file() else split_off if split_off.is_file() else config.data
    reading = [word for key, text in config.define.items() for word in ("--define", f"{key}={text}")]
    if config.columns:
        reading += ["--columns", ",".join(f"{ours}={theirs}" for ours, theirs in config.columns.items())]
    if config.encoding and rows != split_off:  # what was split off is UTF-8
        reading += ["--encoding", config.encoding]
    if config.ignore_keys:
        reading += ["--ignore-keys", config.ignore_keys]
    reading += [] if config.train_end else ["--no-train-end"]
    return [
        shell("chat", *both),
        shell("eval", *both, "--data", rows, *reading),
        shell("merge", *both, "--output", run / "merged"),
    ]
