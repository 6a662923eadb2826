"""python -m bench.reliability.power_cut: the states that a disk can be in after its power went, between every two operations of a command.

What the command had said was safe must be there: a snapshot once it was saved, everything once the command had ended. From every state
the next command goes on to the bytes of the undisturbed one.
"""

import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bench.reliability import forked, scoreboard
from bench.reliability.commands import Command, commands
from bench.reliability.disk import Disk, State, restore
from bench.reliability.invariants import Invariants
from bench.reliability.operations import Operation, Operations
from minilora import train
from minilora.run.folder import Run


def recorded(command: Command) -> tuple[Disk, list[Operation]]:
    """The disk before a command, its operations, and its promises: a step that is saved, and its end."""

    def record() -> list[Operation]:
        with Operations(command.place) as seen:
            save = train.save

            def saved(run: Run) -> Any:
                save(run)
                seen.promise(f"step {run.progress.step}")

            train.save = saved
            assert command() == 0
            seen.promise("the end")
        return seen.log

    command.set_up()
    return Disk(command.place), forked.returned(record)


def states(disk: Disk, log: Iterable[Operation], seed: int = 0) -> Iterator[tuple[int, str, State]]:
    """(number of operations, last promise, state) of each power cut; no state comes twice with one promise."""
    dice, promise, seen = random.Random(seed), "", set()
    for number, operation in enumerate(log):
        if operation.kind == "promise":
            promise = operation.path
        else:
            disk.do(operation)
        for state in disk.states(dice):
            key = hash((promise, frozenset(state.items())))
            if key not in seen:
                seen.add(key)
                yield number, promise, state


def trials(invariants: Invariants, every: int) -> Iterator[list[str]]:
    """What is wrong after each."""
    command = invariants.command
    for count, (number, promise, state) in enumerate(states(*recorded(command))):
        if count % every == 0:
            restore(state, command.place)
            wrong = [*invariants.found(), *invariants.kept(promise), *invariants.recover()]
            yield [
                f"{command.name}, power cut after operation {number}, promised {promise!r}: {line}" for line in wrong
            ]


def all_trials(work: Path, every: int) -> Iterator[list[str]]:
    for command in commands(work):
        yield from trials(Invariants(command), every)


if __name__ == "__main__":
    sys.exit(scoreboard.run("a power cut between every two operations", "states", all_trials))
