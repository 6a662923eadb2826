"""Cases in processes of their own: one that takes its process down, or never ends, costs the others nothing.

An illegal address ends all of a process's work on a GPU. So a bench that has cases starts itself again as a worker, with the
names of some of them; a worker appends a line of JSON to a file as each is done. Whoever stops early is blamed on the case that
it was at, and the rest goes to a new worker.
"""

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]  # {"name": ..., and what is found, or "failed": why, or "skipped": why}
PATIENCE = 240.0  # seconds without a case being done, after which a worker is taken to hang


def work(names: Sequence[str], case: Callable[[str], Row], lines: Path) -> None:
    """A worker: case(name) for every name, one line each; ends where the GPU does not answer any more."""
    for name in names:
        start = time.perf_counter()
        try:
            row = case(name)
        except Exception as problem:  # noqa: BLE001  a case may fail in any way
            row = {"failed": reason(problem)}
            print(f"{name}: {row['failed']}", flush=True)
        row = {"name": name, **row, "spent": round(time.perf_counter() - start, 2)}
        with lines.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def reason(problem: BaseException) -> str:
    """The first line of what went wrong."""
    return f"{type(problem).__name__}: {problem}".strip().splitlines()[0][:200]


def in_workers(
    command: Sequence[str], names: Sequence[str], jobs: int, seconds: float, told: Callable[[Row], None]
) -> dict[str, Row]:
    """Rows of all names, in their order, from `jobs` workers at a time: `command --lines FILE --names NAME ...`.

    told(row) is called as rows come. What is not done after `seconds` is skipped, and says so.
    """
    deadline = time.monotonic() + seconds
    found: dict[str, Row] = {}

    def take(row: Row) -> None:
        found[row["name"]] = row
        told(row)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        shares = [list(names[j::jobs]) for j in range(jobs)]
        runs = [
            pool.submit(_share, command, share, Path(folder) / f"{j}.jsonl", deadline, take)
            for j, share in enumerate(shares)
            if share
        ]
        for run in runs:
            run.result()
    return {name: found[name] for name in names}


def _share(command: Sequence[str], names: list[str], lines: Path, deadline: float, take: Callable[[Row], None]) -> None:
    """All names of one worker and its successors."""
    while names and time.monotonic() < deadline:
        lines.write_text("")
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                [*command, "--lines", str(lines), "--names", *names], stdout=output, stderr=subprocess.STDOUT
            )
            done = _follow(process, lines, deadline, take)
            output.seek(0)
            said = [line for line in output.read().splitlines() if line.strip()]
        names = names[done:]
        if names and time.monotonic() < deadline:
            take({"name": names.pop(0), "failed": (said or ["the process ended, and said nothing"])[-1][:200]})
    for name in names:
        take({"name": name, "skipped": "no time was left"})


def _follow(process: subprocess.Popen, lines: Path, deadline: float, take: Callable[[Row], None]) -> int:
    """How many cases a worker did, until it ended or was ended."""
    done, last = 0, time.monotonic()
    while True:
        ended = process.poll() is not None
        rows = lines.read_text().split("\n")[:-1]
        for row in rows[done:]:
            take(json.loads(row))
        if len(rows) > done:
            done, last = len(rows), time.monotonic()
        if ended:
            return done
        now = time.monotonic()
        if now > deadline or now - last > PATIENCE:
            process.kill()
            process.wait()
        else:
            time.sleep(0.1)
