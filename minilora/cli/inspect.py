"""minilora inspect: what a folder or a file holds, without changing anything."""

import argparse
from importlib import import_module
from types import ModuleType

# each has a module of its own here, inspect_NAME.py, with flags and run
KINDS = {
    "data": "what the model sees of a file of rows: tokens, roles, what is trained, lengths, problems",
    "model": "family, sizes, linears that take adapters, chat format and stop tokens of a model folder",
}


def flags(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="WHAT", required=True)
    for name, summary in KINDS.items():
        sub = kinds.add_parser(name, help=summary, description=summary.capitalize() + ".", allow_abbrev=False)
        _module(name).flags(sub)


def run(args: argparse.Namespace) -> int:
    return _module(args.kind).run(args) or 0


def _module(kind: str) -> ModuleType:
    return import_module(f"minilora.cli.inspect_{kind}")
