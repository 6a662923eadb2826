"""Flags that several commands have, and what they may hold."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.model_folder import ADAPTER_CONFIG
from .parser import group

if TYPE_CHECKING:
    from dataclasses import Field

    from ..config import DataConfig

COMPUTE = ("auto", "float32", "bfloat16")


def model_flags(parser: argparse.ArgumentParser, adapter: bool = True) -> None:
    model, machine = group(parser, "model"), group(parser, "machine")
    model.add_argument("--model", required=True, metavar="DIR", help="folder of a Hugging Face checkpoint")
    model.add_argument(
        "--adapter", required=not adapter, metavar="DIR", type=adapter_folder, help="PEFT adapter folder, or a run's"
    )
    model.add_argument("--allow-partial", action="store_true", help="take an adapter that lacks linears which it names")
    model.add_argument("--any-base", action="store_true", help="take an adapter that was trained on another base")
    machine.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 [the GPU if there is one]")
    machine.add_argument(
        "--compute",
        choices=COMPUTE,
        default="auto",
        help="dtype to compute in; auto is the fastest one on this machine",
    )


def adapter_folder(given: str) -> str:
    """An argparse type: the folder of an adapter; of a run it is RUN/adapter."""
    inside = Path(given) / "adapter"
    return str(inside) if inside.is_dir() and not (Path(given) / ADAPTER_CONFIG).exists() else given


def opening(args: argparse.Namespace) -> dict[str, Any]:
    """How open_model shall open a model, by the flags of model_flags and int8_flag."""
    names = ("any_base", "allow_partial", "device", "compute", "int8")
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def int8_flag(parser: argparse.ArgumentParser) -> None:
    group(parser, "machine").add_argument(
        "--int8", action="store_true", help="weights in 8 bits, for speed on a CPU; eval --int8 tells what it costs"
    )


def between(kind: type, low: float, high: float) -> Callable[[str], Any]:
    """An argparse type: a number within bounds, both allowed."""

    what = f"{'a whole number' if kind is int else 'a number'} from {low:,g} " + (
        f"to {high:,g}" if high < 2**31 else "on"
    )

    def number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return number


def setting_flags(parser: Any, settings: Sequence["Field"], shown: bool = True) -> None:
    """A flag for each setting of a run, and one that is not shown for each of its other names."""
    from ..config import ALIASES, default_of, kind_name

    for f in settings:
        default = default_of(f)
        is_switch = isinstance(default, bool)
        default = {True: "on", False: "off"}[default] if is_switch else default
        note = "" if default in ("", None, {}) else f" [{default}]"
        flag, names = "--" + f.name.replace("_", "-"), [f.name, *(k for k, v in ALIASES.items() if v == f.name)]
        others = sorted({f"--{n}" for name in names for n in (name, name.replace("_", "-"))} - {flag})
        how: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS}
        if is_switch:
            how["action"] = argparse.BooleanOptionalAction
        else:
            how |= {"metavar": kind_name(f), "action": "append" if f.name == "define" else "store"}
        text = (f.metadata["help"] + note).replace("%", "%%")
        parser.add_argument(flag, help=text if shown else argparse.SUPPRESS, **how)
        if others:
            parser.add_argument(*others, help=argparse.SUPPRESS, **how)


def data_flags(parser: argparse.ArgumentParser, *names: str) -> None:
    """How rows become tokens: the settings of a run of these names, or all."""
    from dataclasses import fields

    from ..config import DataConfig

    setting_flags(group(parser, "data"), [f for f in fields(DataConfig) if not names or f.name in names])


def data_config(args: argparse.Namespace) -> "DataConfig":
    """What was given by data_flags; UsageError for a value that cannot be."""
    from dataclasses import fields

    from ..config import DataConfig, convert

    return DataConfig(**{f.name: convert(f, vars(args)[f.name]) for f in fields(DataConfig) if f.name in vars(args)})
