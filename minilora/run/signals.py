"""Ctrl-C, SIGTERM and a closed terminal ask a run to stop at its next safe point. A second signal ends it at once."""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}


class StopSignal:
    """A context in which the first signal sets `requested`. Only the main thread can handle signals: in others it does nothing."""

    def __init__(self) -> None:
        self.requested = False
        self.name = ""
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._handle) for number in NAMES}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and "RANK" in os.environ:
            return  # torchrun passes on what has come to all already, and ends a rank that takes too long
        if self.requested:
            raise SystemExit(128 + number)
        self.requested, self.name = True, NAMES[signal.Signals(number)]
