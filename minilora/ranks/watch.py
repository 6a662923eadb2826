"""Notice that a rank died or hangs, and say which one: its host, and the step and stream that it was last seen in.

Every rank leaves a sign of life in torchrun's store twice a second and reads those of the others, in a thread, and judges them in another
one: a store that is cut off never answers. A rank whose signs end has died, or its host or the network has; one whose signs go on
while the others wait for it hangs.
"""

import json
import os
import threading
import time
from contextlib import suppress
from typing import NamedTuple

from torch.distributed import Store

from ..terminal import say
from .start import SAVING

PERIOD = 0.5  # seconds between two signs
DEAD = 5 * PERIOD  # without a sign, of a rank that the network already says is gone
GRACE = (
    10.0  # seconds in which the main thread has to notice a failure; on a GPU it may wait for the lost rank for good
)


class Sign(NamedTuple):
    """What a rank says of itself: a number that grows, what it does, and whether it waits for the others."""

    number: int
    place: str
    waiting: bool


class Watch(threading.Thread):
    """The thread of one rank that judges. `failed` is set once the run has to end; `failure` says why, and is empty where another rank says it."""

    def __init__(self, store: Store, rank: int, hosts: list[str], timeout: float):
        """store: of a connection in which nobody waits for long; hosts: of every rank; timeout: seconds to wait for a rank."""
        super().__init__(daemon=True, name="watch")
        self.store, self.rank, self.hosts, self.timeout = store, rank, hosts, timeout
        self.silence = timeout / 2  # without a sign, so that the run has ended before the timeout
        self.failed, self.failure, self.code = threading.Event(), "", 10
        self._noticed = threading.Event()
        self._done, self._signs = threading.Event(), threading.Thread(target=self._exchange, daemon=True, name="signs")
        self._place, self._waiting_since = "at the start", 0.0
        self._parent = os.getppid()
        now = self._answered = time.monotonic()  # when the store last did
        self._moved = now  # when another rank last went on to something else
        self._others = {r: (Sign(0, self._place, False), now) for r in range(len(hosts)) if r != rank}

    # called by the main thread

    def begin(self, place: str) -> None:
        """The main thread does something of its own, as in "step 12, stream 3"."""
        self._place, self._waiting_since = place, 0.0

    def wait(self) -> None:
        """The main thread waits for the other ranks."""
        self._waiting_since = time.monotonic()

    def go_on(self) -> None:
        """The others have come."""
        self._waiting_since = 0.0

    def end(self) -> None:
        """All ranks have what they need of each other."""
        self._done.set()
        for thread in (self, self._signs):
            thread.join(DEAD)

    def notice(self) -> None:
        """The main thread knows of the failure, and saves what there is."""
        self._noticed.set()

    def diagnose(self) -> None:
        """Find out which rank is gone, once the network said that one is: `failed` is set, and `failure` says it."""
        self._waiting_since, until, dead = 0.0, time.monotonic() + 2 * DEAD, []
        while not dead and time.monotonic() < until and not self.failed.wait(PERIOD):
            dead = self._silent(DEAD)
        self._fail("; ".join(self._said(r, "died") for r in dead) or "the connection between the ranks broke")

    @property
    def answered(self) -> bool:
        """Whether the store has answered of late: one that is cut off keeps whoever asks it."""
        return time.monotonic() - self._answered < DEAD

    def speaks(self) -> bool:
        """Whether this rank is the one of all that says what went wrong."""
        if self.answered:
            with suppress(RuntimeError):
                return self.store.compare_set("speaks", "", str(self.rank)) == str(self.rank).encode()
        return os.environ["LOCAL_RANK"] == "0"  # no store on this side of the network

    # the threads

    def run(self) -> None:
        self._signs.start()
        while not self._done.wait(PERIOD) and not self.failed.is_set():
            if os.getppid() != self._parent:
                self._fail("torchrun, which started this rank, was killed")
            self._judge(time.monotonic())
        if self.failed.is_set() and not self._done.wait(SAVING if self._noticed.wait(GRACE) else 0):
            if not self._noticed.is_set() and self.failure and self.speaks():
                say(f"error: {self.failure}", quiet=True)
            os._exit(self.code)  # the main thread is in a call that does not come back

    def _exchange(self) -> None:
        number = 0
        while not self._done.wait(PERIOD):
            number += 1
            with suppress(RuntimeError):  # the store may come back
                self.store.set(f"sign/{self.rank}", json.dumps(Sign(number, self._place, self._waiting_since > 0)))
                self._read()
                self._answered = time.monotonic()

    def _read(self) -> None:
        for r, (sign, _) in self._others.items():
            if not self.failed.is_set() and self.store.check([f"ended/{r}"]):
                self.code = int(self.store.get(f"ended/{r}").split()[0])
                self._fail("")
            if self.store.check([f"sign/{r}"]):
                now = Sign(*json.loads(self.store.get(f"sign/{r}")))
                if now.number != sign.number:
                    self._others[r] = (now, time.monotonic())
                if now.place != sign.place:
                    self._moved = time.monotonic()

    def _silent(self, seconds: float) -> list[int]:
        """The ranks that gave no sign for so long."""
        return [r for r, (_, when) in self._others.items() if time.monotonic() - when > seconds]

    def _judge(self, now: float) -> None:
        if now - self._answered > self.silence:
            self._fail(f"{self.hosts[self.rank]} cannot reach torchrun on {self.hosts[0]} ({self._place})")
        elif silent := self._silent(self.silence):
            self._fail("; ".join(self._said(r, f"gave no sign for {self.silence:.0f} s") for r in silent))
        elif self._waiting_since and now - max(self._waiting_since, self._moved) > self.timeout:
            late = self._silent(DEAD) or [r for r, (sign, _) in self._others.items() if not sign.waiting]
            hangs = f"hangs or is cut off: the others have waited {self.timeout:.0f} s for it"
            self._fail(
                "; ".join(self._said(r, hangs) for r in late) or f"no answer over the network for {self.timeout:.0f} s"
            )

    def _said(self, rank: int, what: str) -> str:
        last = self._others[rank][0].place  # up to a period old
        seen = "" if last == self._place else f"; it was last seen: {last}"
        return f"rank {rank} on {self.hosts[rank]} {what} ({self._place}{seen})"

    def _fail(self, what: str) -> None:
        if not self.failed.is_set():
            self.failure = what
            self.failed.set()
