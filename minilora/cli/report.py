"""minilora report: one run on one page."""

from typing import Annotated

from ..terminal import say
from .arguments import Arg


def run(
    run: Annotated[str, Arg("run folder; its report.html is written anew", "RUN")],
    *,
    samples: Annotated[int, Arg("answer N rows with the base model and with the adapter first", within=(0, 200))] = 0,
) -> None:
    from ..report.record import read_record
    from ..report.run_page import report
    from ..report.verdict import reading, verdict

    path = report(run, samples)
    record = read_record(run)
    for line in (verdict(record), *reading(record)):
        say(line)
    say(f"page  {path}")
