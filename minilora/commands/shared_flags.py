"""Flags that several commands have, and what they may hold."""

import argparse
from collections.abc import Callable
from typing import Any

from ..errors import UsageError


def model_flags(parser: argparse.ArgumentParser, adapter: bool = True) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of a Hugging Face checkpoint")
    parser.add_argument(
        "--adapter", required=not adapter, metavar="DIR", help="PEFT adapter folder, such as RUN/adapter"
    )
    parser.add_argument("--any-base", action="store_true", help="take an adapter that was trained on another base")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 [the GPU if there is one]")


def between(kind: type, low: float, high: float) -> Callable[[str], Any]:
    """An argparse type: a number within bounds, both allowed."""

    def number(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    number.__name__ = kind.__name__
    return number


def definitions(given: list[str]) -> dict[str, str]:
    """NAME=TEXT words as a dictionary."""
    pairs = [text.partition("=") for text in given]
    wrong = next((key for key, mark, _ in pairs if not mark or not key), None)
    if wrong is not None:
        raise UsageError(f"--define {wrong!r} is not NAME=TEXT", "For example --define name=Archer.")
    return {key: text for key, _, text in pairs}
