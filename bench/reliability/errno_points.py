"""python -m bench.reliability.errno_points: a disk that is full, over its quota, broken or read-only at every operation that changes it.

Each operation fails before it does anything, a write also in the middle, a flush and a rename also after they did their work; the four
errors take turns.
"""

import errno
import os
import sys
from collections.abc import Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import NoReturn

from bench.reliability import forked, scoreboard
from bench.reliability.commands import commands
from bench.reliability.invariants import Invariants
from bench.reliability.kill_points import recorded, struck
from bench.reliability.operations import AFTER, Fault

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


def trials(invariants: Invariants, every: int) -> Iterator[list[str]]:
    """What is wrong after each."""
    command = invariants.command
    log = recorded(command)
    points = [
        (number, part)
        for number, operation in enumerate(log)
        for part in (*operation.parts, *([AFTER] if operation.kind in ("fsync", "rename") else []))
    ]
    for (number, part), error in zip(points[::every], cycle(ERRORS)):
        command.set_up()
        ended = forked.run(partial(struck, command, Fault(number, part, partial(fail, error))))
        where = f"{command.name}, {errno.errorcode[error]} {part} operation {number} ({log[number].kind} {Path(log[number].path).name})"
        checks = (partial(invariants.told, ended), invariants.found, invariants.recover)
        yield [f"{where}: {wrong}" for check in checks for wrong in check()]


def fail(error: int) -> NoReturn:
    raise OSError(error, os.strerror(error))


def all_trials(work: Path, every: int) -> Iterator[list[str]]:
    for command in commands(work):
        yield from trials(Invariants(command), every)


if __name__ == "__main__":
    sys.exit(scoreboard.run("a failing disk at every durable operation", "points", all_trials))
