"""The one thread that runs the model: requests come from the event loop, and it is told of every token."""

import asyncio
import threading
import traceback
from collections import deque
from collections.abc import Sequence
from typing import Self

from ..errors import MiniloraError
from ..generate import decode
from ..terminal import say
from .models import Asked, Models

CANCELLED, FAILED = "cancelled", "error"  # finish reasons beside those of generate.py


class Busy(Exception):
    """The queue has no room for these requests."""


class Engine:
    """Answers up to `slots` requests at a time, while up to `queue` wait; a context, in which its thread runs.

    A request whose finish_reason is set by its owner leaves at the next pass. If a pass fails (memory, a fault), the requests in it
    end with the reason FAILED, and the thread goes on with those that wait.
    """

    def __init__(self, models: Models, slots: int, queue: int):
        self.models, self.slots, self.queue = models, slots, queue
        self.waiting: deque[Asked] = deque()
        self.answered = 0
        self.unfinished: set[Asked] = set()  # of the event loop alone
        self._arrived, self._closing = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(self, *_) -> None:
        self._closing = True
        for request in self.unfinished:
            request.finish_reason = CANCELLED
        self._arrived.set()
        await asyncio.to_thread(self._thread.join)

    def submit(self, requests: Sequence[Asked]) -> None:
        """Let requests wait for a slot; raises Busy, and takes none, if that is more than the queue holds."""
        if len(self.unfinished) + len(requests) > self.slots + self.queue:
            raise Busy
        self.unfinished.update(requests)
        self.waiting.extend(requests)
        self._arrived.set()

    def release(self, requests: Sequence[Asked]) -> None:
        """End requests that their owner needs no longer, finished or not."""
        for request in requests:
            self.unfinished.discard(request)
            request.finish_reason = request.finish_reason or CANCELLED

    def _run(self) -> None:
        while not self._closing:
            self._arrived.wait()
            self._arrived.clear()
            while self.waiting and not self._closing:
                self._decode()

    def _decode(self) -> None:
        """Answer what waits, until nothing does and nothing runs."""
        running: set[Asked] = set()

        def before(requests: list[Asked]) -> None:
            running.difference_update([r for r in running if r.finish_reason])
            running.update(requests)
            self.models.choose(requests)

        try:
            for passed in decode(self.models.decoder, self.waiting, self.slots, before):
                self._tell(passed)
        except Exception as error:  # noqa: BLE001 whatever it was, it is told, and the server goes on
            say(str(error) if isinstance(error, MiniloraError) else traceback.format_exc(), quiet=True)
            for request in running:
                request.finish_reason = request.finish_reason or FAILED
            self._tell([*running])

    def _tell(self, requests: list[Asked]) -> None:
        self.answered += sum(r.finish_reason in ("stop", "length") for r in requests)
        self._loop.call_soon_threadsafe(_changed, requests)


def _changed(requests: list[Asked]) -> None:
    for request in requests:
        request.changed()
