"""minilora sweep: several runs that differ in what a file says, and the page that compares them."""

import argparse

from .before import say


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="yaml of base, zip, product and test, or the name of a recipe")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder for all runs; one that was stopped goes on"
    )
    parser.add_argument("--smoke", action="store_true", help="the file's small version: minutes on a CPU")
    parser.epilog = "Any setting of minilora train can be given as a flag; it wins over the file's base."


def run(args: argparse.Namespace) -> None:
    from ..reports.sweep import sweep
    from .shared_flags import definitions
    from .train import foreign_flags

    settings = foreign_flags(args.rest)
    if "define" in settings:
        settings["define"] = definitions([settings["define"]])
    page = sweep(args.file, args.output, settings, args.smoke)
    if page.is_file():
        say(f"page  {page}")
