"""python -m bench.reliability.soak: a training of 20,000 tiny steps, whose memory, open files and threads stay what they were.

With validation, snapshots and their retention on the way; looked at from outside, once a second. A trial is a step; memory is the resident set, which
may grow by 1 % from the second fifth of the run to the last.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bench.reliability import forked, scoreboard
from bench.reliability.commands import RUN
from tests.tiny import make_model, make_rows

STEPS = 20_000
GROWTH = 0.01


class Look(NamedTuple):
    """At a process."""

    kilobytes: int
    files: int
    threads: int

    @classmethod
    def at(cls, pid: int) -> "Look | None":
        process = Path("/proc") / str(pid)
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        if "VmRSS" not in status:  # it has ended
            return None
        return cls(int(status["VmRSS"].split()[0]), len([*(process / "fd").iterdir()]), int(status["Threads"]))


def trials(work: Path, steps: int) -> Iterator[list[str]]:
    """The steps; what is wrong comes with the last one."""
    model = make_model(work / "model", num_hidden_layers=1, hidden_size=16, intermediate_size=24, head_dim=4)
    given = ["--model", str(model), "--data", str(make_rows(work / "rows.json")), *RUN]
    few = ["train", *given, "--max-steps", "2", "--output", str(work / "few")]
    forked.prepare(few)
    often = str(max(steps // 100, 5))
    some = ["--save-every", often, "--eval-every", often, "--lr", "1e-4"]
    child = forked.start(
        partial(forked.command, ["train", *given, *some, "--max-steps", str(steps), "--output", str(work / "run")])
    )
    metrics, looks = work / "run" / "metrics.jsonl", []
    while (look := Look.at(child.pid)) is not None:
        done = _steps(metrics)
        if done >= steps - steps // 100:  # then it makes its report
            break
        if done >= steps // 5:
            looks.append(look)
        time.sleep(steps / STEPS)
    ended = child.wait()
    made = len([line for line in metrics.read_text().splitlines() if "loss" in json.loads(line)])
    yield from ([] for _ in range(made - 1))
    first, last = _typical(looks[: len(looks) // 4]), _typical(looks[-len(looks) // 4 :])
    wrong = (
        [] if ended.code == 0 and made == steps else [f"exit code {ended.code} after {made} steps: {ended.said[-500:]}"]
    )
    if last.kilobytes > (1 + GROWTH) * first.kilobytes or last[1:] != first[1:]:
        wrong.append(f"from {first} to {last}")
    yield wrong
    print(f"{len(looks)} looks, from {first} to {last}")


def _typical(looks: list[Look]) -> Look:
    """The median of each number: a save that is going on has a file open."""
    return Look(*(int(statistics.median(values)) for values in zip(*looks, strict=True)))


def _steps(metrics: Path) -> int:
    """How many are done, by the last whole line."""
    lines = metrics.read_bytes()[-2000:].split(b"\n")[1:-1] if metrics.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def all_trials(work: Path, every: int) -> Iterator[list[str]]:
    return trials(work, STEPS // every)


if __name__ == "__main__":
    sys.exit(scoreboard.run("a long run", "steps", all_trials))
