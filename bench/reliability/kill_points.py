"""python -m bench.reliability.kill_points: SIGKILL between every two operations that change the disk, and in the middle of every write."""

import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bench.reliability import forked, scoreboard
from bench.reliability.commands import Command, commands
from bench.reliability.invariants import Invariants
from bench.reliability.operations import AFTER, Fault, Operation, Operations


def recorded(command: Command) -> list[Operation]:
    """What a command does to the disk if nobody disturbs it."""

    def record() -> list[Operation]:
        with Operations(command.place) as seen:
            assert command() == 0
        return seen.log

    command.set_up()
    return forked.returned(record)


def trials(invariants: Invariants, every: int) -> Iterator[list[str]]:
    """What is wrong after each."""
    command = invariants.command
    log = recorded(command)
    points = [(number, part) for number, operation in enumerate(log) for part in operation.parts]
    points.append((len(log) - 1, AFTER))
    for number, part in points[::every]:
        command.set_up()
        ended = forked.run(partial(struck, command, Fault(number, part, kill)))
        assert ended.code == forked.KILLED, ended
        where = f"{command.name}, killed {part} operation {number}"
        yield [f"{where}: {wrong}" for check in (invariants.found, invariants.recover) for wrong in check()]


def struck(command: Command, fault: Fault) -> int:
    with Operations(command.place, fault):
        return command()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def all_trials(work: Path, every: int) -> Iterator[list[str]]:
    for command in commands(work):
        yield from trials(Invariants(command), every)


if __name__ == "__main__":
    sys.exit(scoreboard.run("SIGKILL at every durable operation", "points", all_trials))
