"""python -m bench.reliability.random_kills: 20,000 SIGKILLs at random times, and after each the command that its user types next is killed too.

A command is begun, killed, gone on with, killed again, until it comes to its end between two kills; what it ends with must be the bytes of the
undisturbed one, and the invariants hold after every kill.
"""

import random
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bench.reliability import forked, scoreboard
from bench.reliability.commands import commands
from bench.reliability.invariants import Invariants

KILLS = 20_000
TRAININGS = 0.5  # of the kills


def trials(invariants: Invariants, kills: int, seed: int) -> Iterator[list[str]]:
    """What is wrong after each kill, and after each end."""
    command, dice = invariants.command, random.Random(seed)
    command.set_up()
    began = time.monotonic()
    assert forked.run(command).code == 0
    longest, killed, words = time.monotonic() - began, 0, None
    while killed < kills:
        if words is None:
            command.set_up()
            words = command.words
        ended = forked.killed_after(dice.uniform(0, longest), partial(forked.command, words))
        wrong = [*invariants.found()]
        if ended.code == forked.KILLED:
            killed += 1
            yield [f"{command.name}, kill {killed}: {line}" for line in wrong]
            words = command.again()
        elif ended.code == 0:
            wrong += invariants.ended()
            if wrong:
                yield [f"{command.name}, ended after kill {killed}: {line}" for line in wrong]
            words = None
        else:
            yield [f"{command.name} after kill {killed}: exit code {ended.code}: {ended.said[-800:]}"]
            words = None


def all_trials(work: Path, every: int) -> Iterator[list[str]]:
    chosen = commands(work)
    trainings = [command for command in chosen if command.runs]
    for seed, command in enumerate(chosen):
        share = TRAININGS / len(trainings) if command.runs else (1 - TRAININGS) / (len(chosen) - len(trainings))
        yield from trials(Invariants(command), round(KILLS * share / every), seed)


if __name__ == "__main__":
    sys.exit(scoreboard.run("SIGKILL at random times", "kills", all_trials))
