"""minilora sweep: several runs that differ in what a file says, and the page that compares them."""

import argparse

from .before import say
from .train import given_settings, run_flags


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="yaml of base, zip, product and test, or the name of a recipe")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder for all runs; one that was stopped goes on"
    )
    parser.add_argument("--smoke", action="store_true", help="the file's small version: minutes on a CPU")
    parser.usage = "minilora sweep FILE --output DIR [--smoke] [--SETTING VALUE ...]"
    parser.epilog = (
        "Any setting of minilora train can be given as a flag; it wins over the file's base: see minilora train --help."
    )
    run_flags(parser, shown=False, left_out=("output",))


def run(args: argparse.Namespace) -> None:
    from ..tools.sweep import sweep

    settings = given_settings(args)
    del settings["output"]  # of the sweep; each run has its own in there
    page = sweep(args.file, args.output, settings, args.smoke)
    if page.is_file():
        say(f"page  {page}")
