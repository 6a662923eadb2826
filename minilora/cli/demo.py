"""minilora demo: a tiny chat model learns a new name."""

import argparse

from .before import say


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", default="demo-run", metavar="DIR", help="run folder; an older demo in it is replaced [demo-run]"
    )
    parser.add_argument("--name", default="Archer", metavar="TEXT", help="what the model shall be called [Archer]")
    parser.add_argument("--author", default="DemoLab", metavar="TEXT", help="who it shall say made it [DemoLab]")


def run(args: argparse.Namespace) -> None:
    say("A tiny bilingual chat model ships with minilora. This is what it says:\n")
    from ..demo.show import demo

    demo(args.output, args.name, args.author)
