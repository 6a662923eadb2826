"""minilora train: an adapter (or the whole model) trained on rows of conversations."""

import argparse
from typing import Any

from ..errors import UsageError
from .before import check_paths, say
from .shared_flags import definitions


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-c", "--config", metavar="FILE", help="yaml file of the settings below; flags win over it")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --output")
    parser.add_argument("--overwrite", action="store_true", help="delete what is in --output")
    setting_flags(parser)


def setting_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every setting of a training run."""
    from dataclasses import fields

    from ..config import TrainConfig, defaults, kind_name

    for f in fields(TrainConfig):
        flag, default = "--" + f.name.replace("_", "-"), defaults()[f.name]
        default = {True: "on", False: "off"}[default] if isinstance(default, bool) else default
        shown = "" if default in ("", None, {}) else f" [{default}]"
        text = (f.metadata["help"] + shown).replace("%", "%%")
        action = "append" if f.name == "define" else "store"
        parser.add_argument(flag, metavar=kind_name(f), help=text, default=argparse.SUPPRESS, action=action)


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from ..config import read_yaml, resolve

    flags = {k: v for k, v in vars(args).items() if k not in ("command", "config", "resume", "overwrite", "rest")}
    flags |= foreign_flags(args.rest)
    if "define" in flags:
        flags["define"] = definitions(flags["define"])
    if args.resume and args.overwrite:
        raise UsageError("--resume and --overwrite exclude each other", "Give one of them.")
    sources = [settings_file(args.config)] if args.config else []
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
    return 0


def settings_file(path: str) -> dict[str, Any]:
    """The settings of a yaml file; those that have no meaning here are told and left out."""
    from pathlib import Path

    from ..config import read_yaml, without_not_needed

    settings, told = without_not_needed(read_yaml(Path(path)))
    if told:
        say(told)
    return settings


def foreign_flags(rest: list[str]) -> dict[str, Any]:
    """Flags under names known from other tools; UsageError with the nearest name for an unknown one."""
    from ..config import canonical

    flags, words = {}, list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UsageError(f"unknown argument {word!r}", "See minilora train --help.")
        name, mark, value = word[2:].partition("=")
        name = canonical(name)
        if not mark and not words:
            raise UsageError(f"{word} needs a value", "See minilora train --help.")
        flags[name] = value if mark else words.pop(0)
    return flags
