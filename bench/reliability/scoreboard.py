"""The table of all rows: what was tried how often, and how often something was lost. bench/results/reliability.json and docs/reliability.md show it."""

import argparse
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from bench.reliability import forked
from minilora.files.atomic import write_file
from minilora.machine.cpu import device_name

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "bench" / "results" / "reliability.json"
PAGE, START, END = ROOT / "docs" / "reliability.md", "<!-- table -->", "<!-- end of the table -->"
SHOWN = 20  # violations that are printed

Trials = Iterable[list[str]]  # what is wrong after each one


def run(row: str, unit: str, trials: Callable[[Path, int], Trials], argv: list[str] | None = None) -> int:
    """The command of a row: `trials(folder, every)` in a new folder; prints what is wrong. --record puts the counts into the table."""
    name = f"bench.reliability.{Path(sys.argv[0]).stem}"
    parser = argparse.ArgumentParser(prog=f"python -m {name}")
    parser.add_argument("--every", type=int, default=1, metavar="N", help=f"try one of N {unit} [1]")
    parser.add_argument(
        "--record", action="store_true", help=f"put the counts into {TABLE.relative_to(ROOT)} and onto its page"
    )
    options = parser.parse_args(argv)
    began = _seconds()
    with forked.workplace() as folder:
        count, wrong = counted(trials(folder, options.every))
    print(f"{row}: {count:,} {unit}, {wrong:,} violations, {_seconds() - began:,.0f} s of CPU")
    if options.record:
        record(row, {
            "trials": count, "unit": unit, "violations": wrong, "cpu_seconds": round(_seconds() - began), "date": str(date.today()),
            "machine": machine(), "command": f"python -m {name}" + (f" --every {options.every}" if options.every > 1 else ""),
        })  # fmt: skip
    return int(wrong > 0)


def record(row: str, counts: dict[str, Any]) -> None:
    """Put the counts of a row into the file and onto the page."""
    rows = json.loads(TABLE.read_text()) | {row: counts}
    write_file(TABLE, json.dumps(rows, indent=1) + "\n")
    before, after = PAGE.read_text().split(START)[0], PAGE.read_text().split(END)[1]
    write_file(PAGE, before + "\n".join([START, *table(rows), END]) + after)


def counted(trials: Trials) -> tuple[int, int]:
    """(trials, trials after which something was wrong); says what."""
    count = wrong = 0
    shown, began = 0, time.monotonic()
    for found in trials:
        count += 1
        wrong += bool(found)
        for line in found[: SHOWN - shown]:
            print(line, flush=True)
            shown += 1
        if time.monotonic() - began > 60:
            began = time.monotonic()
            print(f"{count:,} trials, {wrong:,} violations", flush=True)
    return count, wrong


def machine() -> str:
    cpu = f"{os.cpu_count()} cores of {device_name(torch.device('cpu'))}"
    return f"{cpu}, {platform.system()} {platform.release()}, Python {platform.python_version()}, torch {torch.__version__}"


def _seconds() -> float:
    """CPU time of this process and of its forks."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def table(rows: dict[str, Any]) -> list[str]:
    """The lines of the page: a row each, and the machines."""
    machines = sorted({r["machine"] for r in rows.values()})
    return [
        "| what | trials | violations | CPU | date | command |",
        "|---|---:|---:|---:|---|---|",
        *(f"| {name} | {r['trials']:,} {r['unit']} | {r['violations']:,} | {r['cpu_seconds']:,} s | {r['date']} | `{r['command']}` |" for name, r in rows.items()),
        "",
        *(f"Machine: {machine}." for machine in machines),
    ]  # fmt: skip
