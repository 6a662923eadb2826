"""The figures of a bench, printed and on disk as they come: a run that is stopped has lost nothing."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.workers import Row
from minilora.files.atomic import write_file


class Figures:
    """Rows below a heading; `lines_of(row)` has the lines of one in Markdown, and may look at the rows that are there."""

    def __init__(self, about: dict[str, Any], heading: Sequence[str], lines_of: Callable[[Row], str], save: str | None):
        self.about, self.heading, self.lines_of = about, list(heading), lines_of
        self.save = Path(save) if save else None
        self.rows: dict[str, Row] = {}
        print("\n".join(self.heading), flush=True)

    def add(self, row: Row) -> None:
        """Print a row, and write FILE.json and FILE.md with all rows so far."""
        self.rows[row["name"]] = row
        print(self.lines_of(row), flush=True)
        if self.save:
            found = {"machine": self.about, "rows": list(self.rows.values())}
            write_file(self.save, json.dumps(found, indent=1) + "\n")
            lines = [json.dumps(self.about), "", *self.heading, *map(self.lines_of, self.rows.values())]
            write_file(self.save.with_suffix(".md"), "\n".join(lines) + "\n")
