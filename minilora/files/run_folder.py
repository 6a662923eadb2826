"""The folder of a run, without torch: whether it is one, and what in it no other command may write."""

import os
from pathlib import Path

from ..errors import OutputInUse
from .regular import open_file

FILLED = ("checkpoints", "adapter", "model", "data")  # by the run alone; predict has a command of its own


def is_run(folder: Path) -> bool:
    """Whether a folder has the marks of a run: config.yaml, and metrics.jsonl, which is empty or has steps."""
    metrics = folder / "metrics.jsonl"
    if not (folder / "config.yaml").is_file() or not metrics.is_file():
        return False
    with open_file(metrics, OutputInUse) as file:
        # after a power cut its first line may be there in part, or as zeros
        return b'{"step": '.startswith(file.readline(10)[:9].strip(b"\0"))


def require_outside_runs(path: Path) -> None:
    """OutputInUse for an output within what a run fills: its retention, its end or --overwrite could take it away."""
    there = Path(os.path.realpath(path))
    own = next((p for p in (there, *there.parents) if p.name in FILLED and is_run(p.parent)), None)
    if own is not None:
        what = f"{path} would lie in {own}, which a run fills and deletes from"
        raise OutputInUse(what, f"Give a place beside it, such as {own.parent / 'mine'}.")
