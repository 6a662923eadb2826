"""minilora report: one run on one page."""

import argparse

from .before import say
from .shared_flags import between


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder; its report.html is written anew")
    parser.add_argument(
        "--samples",
        type=between(int, 0, 200),
        default=0,
        metavar="N",
        help="answer N rows with the base model and with the adapter first [0]",
    )


def run(args: argparse.Namespace) -> None:
    from ..report.record import read_record
    from ..report.run_page import report
    from ..report.verdict import reading, verdict

    path = report(args.run, args.samples)
    run = read_record(args.run)
    for line in (verdict(run), *reading(run)):
        say(line)
    say(f"page  {path}")
