"""Flags that several commands have, and what they may hold."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..model_folder import ADAPTER_CONFIG
from .parser import group

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


def definitions(given: list[str]) -> dict[str, str]:
    """NAME=TEXT words as a dictionary."""
    pairs = [text.partition("=") for text in given]
    wrong = next((key for key, mark, _ in pairs if not mark or not key), None)
    if wrong is not None:
        raise UsageError(f"--define {wrong!r} is not NAME=TEXT", "For example --define name=Archer.")
    return {key: text for key, _, text in pairs}


def ignore_flag(parser: argparse.ArgumentParser) -> None:
    group(parser, "data").add_argument(
        "--ignore-keys", metavar="A,B", default="", help="keys of the rows to leave out, which stop a command otherwise"
    )


def limit_flags(parser: argparse.ArgumentParser) -> None:
    """How rows become tokens: the flags of `minilora train` of the same names."""
    data = group(parser, "data")
    data.add_argument("--columns", metavar="A=B,..", help="prompt=NAME,response=NAME: columns of other names")
    ignore_flag(parser)
    data.add_argument("--define", metavar="NAME=TEXT", action="append", default=[], help="fill {{name}} in the rows")
    data.add_argument("--loss-on", choices=["all", "last"], default="all", help="which answers count [all]")
    data.add_argument(
        "--train-end", action=argparse.BooleanOptionalAction, help="count the token that ends an answer [on]"
    )
    for name, default in (("max-length", 2048), ("max-source-length", None), ("max-target-length", None)):
        shown = f" [{default}]" if default else ""
        data.add_argument(
            f"--{name}", type=between(int, 1, 2**31), default=default, metavar="N", help=f"in tokens{shown}"
        )
    data.add_argument(
        "--truncate", choices=["drop", "cut", "error"], default="drop", help="what becomes of longer rows [drop]"
    )


def settings_of(args: argparse.Namespace, skip_bad: bool = False) -> Any:
    """The DataConfig of limit_flags."""
    from ..rows.load import DataConfig

    return DataConfig(
        define=definitions(args.define),
        loss_on=args.loss_on,
        max_length=args.max_length,
        max_source_length=args.max_source_length,
        max_target_length=args.max_target_length,
        columns=columns_of(args.columns),
        ignore_keys=args.ignore_keys,
        truncate=args.truncate,
        skip_bad=skip_bad,
        train_end=args.train_end is not False,
    )


def columns_of(given: str | None) -> dict[str, str]:
    """prompt=NAME,response=NAME as a dictionary."""
    pairs = [text.partition("=") for text in (given or "").split(",") if text]
    wrong = next((key for key, mark, name in pairs if not mark or not key.strip() or not name.strip()), None)
    if wrong is not None:
        raise UsageError(
            f"--columns {wrong!r} is not NAME=COLUMN", "For example --columns prompt=question,response=answer."
        )
    return {key.strip(): name.strip() for key, _, name in pairs}
