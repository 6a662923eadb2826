"""The losses and scores of runs on a terminal, a line each, in the columns that it has."""

import re

from rich.cells import cell_len
from rich.table import Table

from ..console import Console
from ..terminal import printable
from .record import LETTERS, Record

SHOWN = ("bleu4_char", "rouge1_words", "rouge2_words", "rougeL_words", "rougeL_char", "exact")


def show_scores(runs: list[Record], console: Console) -> None:
    """Print the lowest validation loss and the test scores of runs under the letters of their comparison."""
    columns = {"lowest\nval\nloss": [f"{run.best[1]:.4f}" if run.best else "" for run in runs]}
    for name in SHOWN:
        values = [run.scores[name]["value"] if name in run.scores else None for run in runs]
        columns[name.replace("_", "\n")] = ["" if v is None else f"{v:.2f}" for v in values]
    cells = {head: texts for head, texts in columns.items() if any(texts)}
    wide = sum(2 + max(map(len, [*head.split("\n"), *texts])) for head, texts in cells.items())
    names = [run.name for run in runs]
    names = names if len(set(names)) == len(names) else [str(run.folder) for run in runs]
    names = shortened(list(map(printable, names)), max(console.width - wide - 3, 8))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("run", no_wrap=True)
    for head in cells:
        table.add_column(head, justify="right", no_wrap=True)
    for letter, name, *texts in zip(LETTERS, names, *cells.values(), strict=False):
        table.add_row(f"{letter}: {name}", *texts)
    console.print(table)


def shortened(names: list[str], width: int) -> list[str]:
    """The names, cut in the middle to `width` columns, not inside a number if possible; names that differ still do."""
    wide = [name.split(",") for name in names if cell_len(name) > width]
    shared = set.intersection(*map(set, wide)) if len(wide) > 1 else set()  # settings, in the names of a sweep
    apart = [
        ",".join(part for part in name.split(",") if part not in shared) if cell_len(name) > width else name
        for name in names
    ]
    heads = sorted(range(1, width - 1), key=lambda n: abs(n - width // 2))
    for texts in (apart, names):
        cuts = [[_cut(text, head, "…", width) for text in texts] for head in heads]
        found = [cut for cut in cuts if len(set(cut)) == len(set(names))]
        if found:
            return min(found, key=lambda cut: bool(re.search(r"[\d.]…|…[\d.]", " ".join(cut))))
    # the parts that differ are too long: a number takes their place
    return [_cut(name, width // 3, f"…{number}…", width) for number, name in enumerate(names, 1)]


def _cut(name: str, head: int, gap: str, width: int) -> str:
    """A name, with `gap` after its first `head` columns in place of the middle if it is too wide."""
    if cell_len(name) <= width:
        return name
    start, end = name, name
    while cell_len(start) > head:
        start = start[:-1]
    while cell_len(end) > width - head - cell_len(gap):
        end = end[1:]
    return start + gap + end
