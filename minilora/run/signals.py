"""Ctrl-C, SIGTERM and a closed terminal ask a run to stop at its next safe point. A second signal ends it at once.

What comes within half a second of the first is the same request, sent to a process and to its group. Nobody sees a traceback.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}
SAME = 0.5  # seconds
_one_command = False  # whether this process runs one command and ends


@contextmanager
def one_command(alone: bool) -> Iterator[None]:
    """The process runs one command and ends (alone), or there are others beside it, for which nothing is changed.

    A Ctrl-C that Python notices where it cannot be raised, as in a finaliser, comes again; one after the command is too late.
    """
    global _one_command
    if alone:
        _one_command, sys.unraisablehook = True, _again
        signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        yield
    finally:
        for number in NAMES if alone else ():
            signal.signal(number, signal.SIG_IGN)


def _again(lost: Any) -> None:
    if isinstance(lost.exc_value, KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, 0.1)  # after this has returned: here it would be lost again
    else:
        sys.__unraisablehook__(lost)


class StopSignal:
    """A context in which the first signal sets `requested`. Only the main thread can handle signals: in others it does nothing."""

    def __init__(self) -> None:
        self.requested = False
        self.name = ""
        self._at = 0.0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._handle) for number in NAMES}
        return self

    def __exit__(self, *_) -> None:
        if self.requested and _one_command:
            return  # the command ends now, with the code of a stop
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self.name, self._at = True, NAMES[signal.Signals(number)], time.monotonic()
        elif "RANK" in os.environ or time.monotonic() - self._at < SAME:
            return  # torchrun passes on what has come to all already, and ends a rank that takes too long
        else:
            end_at_once(number)


def end_at_once(number: int) -> None:
    """End the process without a last look at anything: what is on the disk is whole."""
    if sys.stdout.isatty():
        os.write(sys.stdout.fileno(), b"\x1b[?25h\n")  # a progress line hides the cursor
    os.write(sys.stderr.fileno(), f"error: ended at once by a second {NAMES[signal.Signals(number)]}\n".encode())
    os._exit(128 + number)
