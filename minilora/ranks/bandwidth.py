"""How fast ranks add up a buffer, by processes of this machine, one for each GPU, that are started for it."""

import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from datetime import timedelta
from math import inf
from pathlib import Path
from statistics import median
from subprocess import PIPE
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..isolated import environment
from ..terminal import say

SIZE = {"cpu": 1 << 24, "cuda": 1 << 28}  # bytes of the buffer
ROUNDS = 5
TIMEOUT = 60.0  # seconds for the processes to start, meet and be done


class AllReduce(NamedTuple):
    """Seconds to add up a buffer of `size` bytes, the median of ROUNDS; `failure` is why the ranks could not meet."""

    size: int
    seconds: float = inf
    failure: str = ""


def timed_all_reduce(ranks: int, device: str) -> AllReduce:
    """Of so many ranks on "cpu", over gloo, or "cuda", over NCCL. They are started here, and have ended when it returns."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as started:
        words = [sys.executable, "-m", __name__, folder, device, str(ranks)]
        processes = [
            started.enter_context(
                subprocess.Popen([*words, str(rank)], stdout=PIPE, stderr=PIPE, text=True, env=environment())
            )
            for rank in range(ranks)
        ]
        until = time.monotonic() + TIMEOUT
        try:
            ended = [process.communicate(timeout=max(0.1, until - time.monotonic())) for process in processes]
        except subprocess.TimeoutExpired:
            return AllReduce(SIZE[device], failure=f"they did not meet within {TIMEOUT:.0f} s")
        finally:
            for process in processes:
                process.kill()
    for process, (_, err) in zip(processes, ended, strict=True):
        if process.returncode:
            return AllReduce(
                SIZE[device], failure=(err.strip().splitlines() or [f"a process ended with {process.returncode}"])[-1]
            )
    return AllReduce(SIZE[device], json.loads(ended[0][0]))


def measure(device: torch.device) -> AllReduce:
    """The same in the process group that there is."""
    buffer, seconds = torch.ones(SIZE[device.type] // 4, device=device), []
    for _ in range(1 + ROUNDS):  # the first one makes the connections
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(buffer)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return AllReduce(SIZE[device.type], median(seconds[1:]))


def _rank(folder: str, kind: str, count: int, rank: int) -> None:
    """One process of timed_all_reduce; rank 0 prints."""
    device = torch.device(f"cuda:{rank}" if kind == "cuda" else kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    store = dist.FileStore(str(Path(folder) / "store"), count)
    wait = timedelta(seconds=TIMEOUT)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo", store=store, rank=rank, world_size=count, timeout=wait
    )
    found = measure(device)
    if rank == 0:
        say(json.dumps(found.seconds))
    dist.destroy_process_group()


if __name__ == "__main__":
    _rank(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
