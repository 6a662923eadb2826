"""python -m bench.reliability.two_at_once: the same command twice in one folder, the second a moment after the first.

One of them does its work to the end, and its bytes are those of one that was alone; the other says with exit code 8 that the folder is
in use, or finds what the first has made.
"""

import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench.reliability import forked, scoreboard
from bench.reliability.commands import commands
from bench.reliability.invariants import Invariants

TRIALS = 40  # of each command


def trials(invariants: Invariants, count: int, seed: int) -> Iterator[list[str]]:
    """What is wrong after each."""
    command, dice = invariants.command, random.Random(seed)
    for _ in range(count):
        command.set_up()
        apart = dice.choice((0, dice.uniform(0, 0.05)))
        first = forked.start(command)
        time.sleep(apart)
        second = forked.start(command)
        ends = [child.wait() for child in (first, second)]
        codes = [ended.code for ended in ends]
        wrong = (
            [f"exit codes {codes}: {[e.said[-500:] for e in ends if e.code not in (0, 8)]}"]
            if sorted(codes) not in ([0, 0], [0, 8])
            else []
        )
        yield [f"{command.name}, {apart:.3f} s apart: {line}" for line in (*wrong, *invariants.ended())]


def all_trials(work: Path, every: int) -> Iterator[list[str]]:
    for seed, command in enumerate(commands(work)):
        yield from trials(Invariants(command), TRIALS // every, seed)


if __name__ == "__main__":
    sys.exit(scoreboard.run("two at once in one folder", "pairs", all_trials))
