"""python -m bench.reliability.clock: a clock that was set back, or forward, while commands write and before they are gone on with.

A command is killed at an operation chosen at random; then every file gets a time of its own between 1971 and 2050, and the next command
runs under a clock that jumps by up to ten years at each look.
"""

import os
import random
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

from bench.reliability import forked, scoreboard
from bench.reliability.commands import commands
from bench.reliability.invariants import Invariants
from bench.reliability.kill_points import kill, recorded
from bench.reliability.operations import BEFORE, Fault, Operations

TRIALS = 20  # of each command
YEAR = 365 * 86_400.0


def trials(invariants: Invariants, count: int, seed: int) -> Iterator[list[str]]:
    """What is wrong after each."""
    command, dice = invariants.command, random.Random(seed)
    operations = len(recorded(command))

    def jumping(call):
        jumps = random.Random(dice.random())
        with mock.patch.object(time, "time", lambda: YEAR * jumps.uniform(1, 80)):
            return call()

    def struck(fault: Fault) -> int:
        with Operations(command.place, fault):
            return command()

    for _ in range(count):
        command.set_up()
        fault = Fault(dice.randrange(operations), BEFORE, kill)
        ended = forked.run(partial(jumping, partial(struck, fault)))
        assert ended.code == forked.KILLED, ended
        for path in command.place.rglob("*"):
            then = YEAR * dice.uniform(1, 80)
            os.utime(path, (then, then), follow_symlinks=False)
        where = f"{command.name}, killed before operation {fault.number}"
        yield [f"{where}: {line}" for line in (*invariants.found(), *jumping(lambda: [*invariants.recover()]))]


def all_trials(work: Path, every: int) -> Iterator[list[str]]:
    for seed, command in enumerate(commands(work)):
        yield from trials(Invariants(command), TRIALS // every, seed)


if __name__ == "__main__":
    sys.exit(scoreboard.run("a clock that jumps", "kills", all_trials))
