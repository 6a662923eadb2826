"""python -m bench.reliability.signals: SIGINT, SIGTERM and SIGHUP at 300 random times of every command.

A training stops with exit code 75 and its state saved, or with 130 (Ctrl-C) or the signal itself before there is a state; it ends within ten seconds,
nothing shows a traceback, and the next command goes on to the bytes of the undisturbed one.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from bench.reliability import forked, scoreboard
from bench.reliability.commands import Command, commands
from bench.reliability.forked import Ended
from bench.reliability.invariants import Invariants
from minilora import __main__ as command_line

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TRIALS = 300
PATIENCE = 10.0  # seconds


def trials(invariants: Invariants, count: int, seed: int) -> Iterator[list[str]]:
    """What is wrong after each."""
    command, dice = invariants.command, random.Random(seed)
    command.set_up()
    began = time.monotonic()
    assert forked.run(command).code == 0
    longest = time.monotonic() - began
    for number in range(count):
        command.set_up()
        sent, after = SIGNALS[number % len(SIGNALS)], dice.uniform(0, longest)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the fork waits for it until the command has begun
        child = forked.start(partial(_begin, command))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        time.sleep(after)
        os.kill(child.pid, sent)
        then = time.monotonic()
        ended = child.wait()
        where = f"{command.name}, {sent.name} after {after:.3f} s"
        wrong = [*told(ended, sent), *invariants.found(), *invariants.recover()]
        if time.monotonic() - then > PATIENCE:
            wrong.append(f"ended {time.monotonic() - then:.0f} s later")
        yield [f"{where}: {line}" for line in wrong]


def _begin(command: Command) -> int:
    """The command; a signal that came earlier reaches it where it begins."""
    begin = command_line.one_command

    @contextmanager
    def begun(alone: bool) -> Iterator[None]:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        with begin(alone):
            yield

    command_line.one_command = begun
    return command()


def told(ended: Ended, sent: signal.Signals) -> Iterator[str]:
    if ended.code not in (0, 75, -sent, 130 if sent == signal.SIGINT else 0) or "Traceback" in ended.said:
        yield f"I6 exit code {ended.code}: {ended.said[-800:]}"
    if ended.code == 75 and "stopped by" not in ended.said:
        yield f"I6 exit code 75 without a word: {ended.said[-800:]}"


def all_trials(work: Path, every: int) -> Iterator[list[str]]:
    chosen = commands(work)
    for seed, command in enumerate(chosen):
        yield from trials(Invariants(command), TRIALS // len(chosen) // every + 1, seed)


if __name__ == "__main__":
    sys.exit(scoreboard.run("signals at random times", "signals", all_trials))
