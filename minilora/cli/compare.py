"""minilora compare: runs side by side on one page."""

from typing import Annotated

from ..terminal import say
from .arguments import Arg


def run(
    runs: Annotated[list[str], Arg("run folders, folders of minilora predict, or the folder of one sweep", "RUN")],
    *,
    output: Annotated[str, Arg("page to write; a .md stands beside it", "FILE")] = "compare.html",
) -> None:
    from pathlib import Path

    from ..console import Console
    from ..files.atomic import require_place
    from ..report.compare import compare
    from ..report.page import check_page
    from ..report.record import as_written, read_record
    from ..report.score_table import show_scores

    check_page(Path(output), twin=True)
    require_place(Path(output))
    if len(runs) == 1 and (Path(runs[0]) / "sweep.json").is_file():
        from ..tools.experiment import write_experiment  # has torch, for spectra

        say("\n\n".join(write_experiment(Path(runs[0]), Path(output))))
    else:
        say("\n".join([*compare(runs, output), ""]))
        with as_written(", ".join(runs)):
            show_scores([read_record(run) for run in runs], Console())
    say(f"\npage      {output}")
    say(f"markdown  {Path(output).with_suffix('.md')}")
