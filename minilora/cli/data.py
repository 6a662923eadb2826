"""minilora data: rows measured, filtered and divided before anything is trained."""

import argparse
from importlib import import_module
from types import ModuleType

# each has a module of its own here, data_NAME.py, with flags and run
KINDS = {
    "score": "perplexity of every row under a model, the strangest rows, and a filter",
    "split": "divide rows into train, val and test files, with their hashes and the rows that are too alike",
}


def flags(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="WHAT", required=True)
    for name, summary in KINDS.items():
        sub = kinds.add_parser(name, help=summary, description=summary.capitalize() + ".", allow_abbrev=False)
        _module(name).flags(sub)


def run(args: argparse.Namespace) -> int:
    return _module(args.kind).run(args) or 0


def _module(kind: str) -> ModuleType:
    return import_module(f"minilora.cli.data_{kind}")
