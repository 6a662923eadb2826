"""minilora compare: runs side by side on one page."""

import argparse

from .before import say


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or folders of minilora predict")
    parser.add_argument(
        "--output", default="compare.html", metavar="FILE", help="page to write; a .md stands beside it [compare.html]"
    )


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from ..console import Console
    from ..errors import UsageError
    from ..report.compare import compare
    from ..report.record import read_record
    from ..report.score_table import show_scores

    if Path(args.output).suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--output is {args.output!r}", "Name a file that ends in .html.")
    say("\n".join([*compare(args.runs, args.output), ""]))
    show_scores([read_record(run) for run in args.runs], Console())
    say(f"\npage      {args.output}")
    say(f"markdown  {Path(args.output).with_suffix('.md')}")
