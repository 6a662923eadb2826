"""The ranks of a run: the processes that train together, or share rows, each with the base model, or its part of it, and the same adapters.

Only gradients of what is trained travel, in one buffer a step, and every rank then makes the same step with the same bits. What is
printed and written is rank 0's; what it needs of the others they send through torchrun's store. If one rank ends or is lost, all end,
with one message.
"""

import atexit
import itertools
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import MiniloraError, RankLost, Stopped, UsageError, quote
from .deal import deal, imbalance
from .start import EXIT_CODES
from .watch import DEAD, Watch

if TYPE_CHECKING:
    from .gather import Shards

POLL = 0.05  # seconds between two looks at whether another rank has told something
FOREVER = timedelta(days=365)
_joined = itertools.count()  # a key of torchrun's store for each time that this process joins


class Ranks:
    """This process among those that train together: number `rank` of `count`."""

    def __init__(self, rank: int = 0, count: int = 1, watch: Watch | None = None):
        self.rank, self.count, self.watch = rank, count, watch
        self.shards: Shards | None = None  # of the base model, where the ranks share it out
        self._idle = 0  # streams of other ranks for which this one has none
        self._shared = 0  # calls of share: all ranks make the same

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    @property
    def restarted(self) -> bool:
        """Whether torchrun started the ranks again, after one was lost (--max-restarts)."""
        return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"

    @property
    def launch(self) -> str | None:
        """The torchrun that started this rank, at first or again: the name of its folder of logs, which is new for each."""
        error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # LOGS/LAUNCH/attempt_0/0/error.json
        return Path(error_file).parents[2].name if error_file else None

    def begin(self, place: str) -> None:
        """Say what this rank does from now on, for the message if it gets lost."""
        if self.watch:
            self.watch.begin(place)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one device by their sums over all ranks: the same bits on every one.

        They travel in one buffer. Raises RankLost.
        """
        if self.watch is None:
            return
        if self.shards:
            for _ in range(self._idle):
                self.shards.serve()
            self._idle = 0
        flat = torch.cat([t.flatten() for t in tensors])
        with self.exchanging():
            self.wait([dist.all_reduce(flat, async_op=True)], flat.device)
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(part.view_as(t))

    def sum_step(self, optimizer: torch.optim.Optimizer, loss: Tensor, stop: bool) -> Tensor:
        """Add up over all ranks what is to be stepped by and the loss, in place; a rank without a stream adds zeros.

        Returns on how many ranks a signal asks to stop, as the device will have it.
        """
        stops = torch.full((), float(stop), device=loss.device)
        if self.count > 1:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for p in parameters:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            self.sum([loss, stops, *(p.grad for p in parameters if p.grad is not None)])
        return stops

    def least(self, number: int) -> int:
        """The smallest number of all ranks: what each measured for itself may differ, and all have to do the same."""
        told = torch.zeros(self.count, dtype=torch.int64)
        told[self.rank] = number
        self.sum([told])
        return int(told.min())

    def share(self, value: Any) -> Any:
        """The first rank's value, which is JSON, at every rank. Raises RankLost."""
        if self.watch is None:
            return value
        self._shared += 1
        key = f"shared/{self._shared}"
        with self.exchanging():
            if self.first:
                self.watch.store.set(key, json.dumps(value))
            while not self.watch.store.check([key]) and not self.watch.failed.wait(POLL):
                pass
        return value if self.first else json.loads(self.watch.store.get(key))

    def gather(self, portions: Iterable[list[Any]], stopped: Callable[[], bool]) -> Iterator[Any]:
        """At the first rank the values of all, each as soon as it is there; elsewhere none: they are sent.

        portions: of the values of this rank, which are JSON; between two of them `stopped` is asked whether a signal came, and one
        to any rank ends those of all. Raises RankLost.
        """
        if self.watch is None:
            for portion in portions:
                yield from portion
                if stopped():
                    return
            return
        store, group = self.watch.store, dist.new_group(backend="gloo", timeout=FOREVER)
        # a sum that the first rank begins now, and the others when they are through: the network breaks it once one is lost
        through = dist.all_reduce(torch.zeros(1), group=group, async_op=True) if self.first else None
        for portion in portions:
            with self.exchanging():
                yield from self._exchange(store, portion)
                if through and through.is_completed():
                    through.wait()
                if stopped():
                    store.set("stop", "")
                if store.check(["stop"]):
                    break
        with self.exchanging():
            through = through or dist.all_reduce(torch.zeros(1), group=group, async_op=True)
            assert through is not None
            while not through.is_completed() and not self.watch.failed.wait(POLL):
                yield from self._exchange(store, [])
            if not self.watch.failed.is_set():
                through.wait()
            yield from self._exchange(store, [])

    def _exchange(self, store: dist.Store, values: list[Any]) -> Iterator[Any]:
        """Send values to the first rank; at the first, those and what was sent."""
        if not self.first:
            for value in values:
                store.queue_push("values", json.dumps(value))
            return
        yield from values
        while store.queue_len("values"):
            yield json.loads(store.queue_pop("values"))

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """The block waits for other ranks. Raises RankLost."""
        assert self.watch
        self.watch.wait()
        try:
            yield
        except RuntimeError:  # the network says that a rank is gone
            self.watch.diagnose()
        self.check()
        self.watch.go_on()

    def wait(self, works: Sequence[Any], device: torch.device) -> None:
        """Wait, in a block that is exchanging, for what travels to this device; on a GPU it is queued, and the main thread goes on."""
        assert self.watch
        for work in works:
            while device.type != "cuda" and not work.is_completed():
                if self.watch.failed.wait(0.0005):
                    return
            work.wait()

    def note(self, tokens: Sequence[int]) -> str:
        """How evenly streams of so many tokens are dealt, for people."""
        assert self.watch
        machines = len(set(self.watch.hosts))
        where = f"on {machines} machines" if machines > 1 else "on this machine"
        fullest = imbalance(tokens, self.count)
        hint = "; shorter streams (--micro-tokens), or more rows a step, would share better" if fullest > 1.2 else ""
        return f"{self.count} {where}; in the first step the fullest has {fullest:.2f} of the mean's tokens{hint}"

    def own(self, tokens: Sequence[int]) -> list[int]:
        """Which of the streams of a step, or of an evaluation, are this rank's; tokens: of each stream."""
        dealt = deal(tokens, self.count)
        self._idle = max(map(len, dealt)) - len(dealt[self.rank])
        return dealt[self.rank]

    def check(self) -> None:
        """RankLost if the run has to end because of another rank."""
        if self.watch and self.watch.failed.is_set():
            self.watch.notice()
            raise RankLost(self.watch.code, self.watch.failure)

    def leave(self) -> None:
        """The ranks need nothing of each other any more."""
        if self.watch:
            self.watch.end()

    @contextmanager
    def ending_as_one(self, hint: str) -> Iterator[None]:
        """All ranks end as the first that fails does: one message, one exit code. hint: what to do after a rank was lost."""
        if self.watch is None:
            yield
            return
        try:
            yield
        except MiniloraError as error:
            lost = isinstance(error, RankLost)
            self._end(error.code, follows=lost)
            if lost:
                error.hint = hint
            elif not self.first:
                error.what = f"rank {self.rank} on {socket.gethostname()}: {error.what}"
            # what all ranks find wrong is rank 0's to say; what this rank alone does, its own
            own = self.first if isinstance(error, Stopped) else self.first or lost or not self._first_ends()
            if not (own and error.what and self.watch.speaks()):
                raise SystemExit(error.code) from None
            raise
        except Exception:
            self._end(70)
            raise
        else:
            dist.destroy_process_group()  # so that the same processes can join again
        finally:
            if self.watch.failed.is_set():
                atexit.register(_exit, self.watch.code)
            else:
                self.watch.end()

    def _end(self, code: int, follows: bool = False) -> None:
        """Tell the other ranks, and whoever started this one, how it ends; `follows`: because another one did."""
        assert self.watch
        if EXIT_CODES in os.environ:
            with Path(os.environ[EXIT_CODES]).open("a") as codes:
                codes.write(f"{code}\n")
        if self.watch.answered:
            with suppress(RuntimeError):  # torchrun is gone
                self.watch.store.set(f"ended/{self.rank}", f"{code}{' follows' * follows}")

    def _first_ends(self) -> bool:
        """Whether rank 0 ends by itself, too, within some seconds."""
        assert self.watch
        until = time.monotonic() + DEAD
        while time.monotonic() < until and self.watch.answered:
            if self.watch.store.check(["ended/0"]):
                return b"follows" not in self.watch.store.get("ended/0")
            time.sleep(0.1)
        return False


def _exit(code: int) -> None:
    """End the process now: torch would wait for what it has sent to the lost rank."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


ALONE = Ranks()


def join(timeout: float) -> Ranks:
    """The ranks that torchrun started, which must all come within `timeout` seconds; without torchrun this process alone.

    On a GPU the current device becomes the one of the rank. Raises UsageError if there are fewer GPUs than ranks, or what torchrun
    sets is missing, RankLost if one does not come.
    """
    count = _number("WORLD_SIZE", "1")
    if count < 2:
        return ALONE
    rank, local, host = _number("RANK"), _number("LOCAL_RANK"), socket.gethostname()
    gpus = torch.cuda.device_count()
    if gpus and local >= gpus:
        raise UsageError(f"rank {rank}: this machine has {gpus} GPUs", f"Start at most {gpus} processes on it.")
    if gpus:
        torch.cuda.set_device(local)
    address, port = os.environ.get("MASTER_ADDR", "localhost"), _number("MASTER_PORT")
    wait, hosts = timedelta(seconds=timeout), []
    try:
        # what torchrun has opened; where something else starts the ranks, the first opens it
        opens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        tcp = dist.TCPStore(address, port, is_master=opens, timeout=wait, wait_for_workers=False)
        started = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"minilora/{started}/{next(_joined)}", tcp)
        store.set(f"host/{rank}", host)
        while len(hosts) < count:
            hosts.append(store.get(f"host/{len(hosts)}").decode())  # waits for it
        how = {"store": store, "rank": rank, "world_size": count, "timeout": wait + timedelta(minutes=1)}
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", **how)
    except RuntimeError as error:
        met = len(hosts) in (0, count)
        what = "the ranks cannot connect" if met else f"rank {len(hosts)} did not come within {timeout:.0f} s"
        raise RankLost(RankLost.code, f"{what}: {str(error).splitlines()[0][:200]} ({address}:{port})") from None
    # a connection of its own: a thread that waits in one keeps the others out
    own = store.clone()  # pyright: ignore[reportAttributeAccessIssue]
    watch = Watch(own, rank, hosts, timeout)
    watch.start()
    atexit.register(watch.end)  # or the interpreter would end below a thread that asks the store
    return Ranks(rank, count, watch)


def _number(name: str, default: str = "") -> int:
    """A variable that torchrun sets; a job system may have left some of them."""
    found = os.environ.get(name, default)
    if not found.isdecimal():
        what = f"WORLD_SIZE is {quote(os.environ.get('WORLD_SIZE', ''))}, and {name} is {quote(found) if found else 'not set'}"
        raise UsageError(what, "Start the ranks with torchrun, or unset WORLD_SIZE.")
    return int(found)
