"""Time and memory of functions, in turn, so that what else the machine does falls on all of them alike."""

import statistics
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.roof import synchronize

FLUSH = 2**28  # bytes written between two timed calls on a GPU: more than any second-level cache
AHEAD = 4_000_000  # cycles for which a GPU sleeps before a timed call, about 2 ms: its launches are queued by then


class Times(NamedTuple):
    """Seconds of a call: the median and the 20th and 80th percentile of the rounds."""

    median: float
    low: float
    high: float


def in_turn(functions: dict[str, Callable[[], Any]], device: torch.device, rounds: int) -> dict[str, Times]:
    """Call every function once a round, the order turning round by round; two rounds before warm up, for one alone none."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    timed = _on_gpu if device.type == "cuda" else _on_cpu
    scratch = torch.empty(FLUSH if device.type == "cuda" else 0, dtype=torch.int8, device=device)
    warm = 2 if rounds > 1 else 0
    for r in range(warm + rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            scratch.zero_()
            spent = timed(functions[name])
            if r >= warm:
                seconds[name].append(spent)
    return {name: spread(s) for name, s in seconds.items()}


def spread(seconds: list[float]) -> Times:
    if len(seconds) < 2:
        return Times(*seconds * 3)
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return Times(statistics.median(seconds), fifths[0], fifths[3])


def _on_cpu(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _on_gpu(function: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(AHEAD)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def wall_and_host(function: Callable[[], Any], device: torch.device, rounds: int) -> tuple[Times, float]:
    """Seconds of a call from an idle device to its end, and the least until it came back: on a GPU, all kernels are launched then.

    A call that waits for its result comes back no earlier than it ends.
    """
    walls, hosts = [], []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        function()
        hosts.append(time.perf_counter() - start)
        synchronize(device)
        walls.append(time.perf_counter() - start)
    return spread(walls), min(hosts)


class Profile(NamedTuple):
    """Of one call on a GPU: seconds in which a kernel or a copy ran, how many did, and the kernels that took the most.

    All are zero or empty on a CPU.
    """

    busy: float
    launches: int
    kernels: list[tuple[str, int, float]]  # name, runs, seconds


def profiled(function: Callable[[], Any], device: torch.device, trace: Path | None = None) -> Profile:
    """What torch's profiler sees of a call; `trace`: a file for chrome://tracing or Perfetto."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as seen:
        function()
        synchronize(device)
    if trace:
        seen.export_chrome_trace(str(trace))
    return summed(
        [(e.name, e.time_range.start, e.time_range.end) for e in seen.events() or [] if e.device_type != DeviceType.CPU]
    )


def summed(runs: list[tuple[str, float, float]]) -> Profile:
    """The profile of (name, start, end in microseconds): two kernels that ran at once kept the device busy once."""
    busy, until = 0.0, 0.0
    for _, start, end in sorted(runs, key=lambda run: run[1]):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    spent: dict[str, list[float]] = {}
    for name, start, end in runs:
        spent.setdefault(name, []).append((end - start) / 1e6)
    most = sorted(((name, len(each), sum(each)) for name, each in spent.items()), key=lambda row: -row[2])
    return Profile(busy / 1e6, len(runs), most[:20])


class _Alive(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                key = storage._cdata
                if key in given or key in self._seen:
                    continue
                self._seen.add(key)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that the call held beyond what was there: the allocator's on a GPU, the tensors' on a CPU.

    On a CPU the scratch memory inside one operation is not seen.
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _Alive() as alive:
        function()
    return alive.peak
