"""What a process sets up once on a CPU: how its threads wait, how many there are, and how it keeps memory.

Threads of OpenMP spin while they have nothing to do, by default for long. Beside another busy process that is ruinous: each
short parallel region waits for a thread that does not run. Asleep at once they are slow to wake between the products of one token.
So they spin for a short while, unless the user said otherwise.

glibc hands large blocks back to the system at every free and takes page faults at every allocation. A training step allocates
the same blocks again and again, so the thresholds are raised once, at the start of a command. oneDNN keeps its last 1024
matrix products with their buffers; streams of tokens have a new length every step, so most of them are never used again. 128 are
enough for a step of a mixture, whose experts have products of some 64 sizes (kernels/expert_rows.py). The
machine code of a 16-bit product it keeps for good, 256 KB for each number of rows, and has no setting for that: one weight
[896, 896] and 900 lengths from 100 to 1,000 made 265 MB (torch 2.13, AVX512-BF16; none in fp32).
"""

import ctypes
import gc
import os
import platform
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
SPINS = 10_000  # turns of libgomp's waiting loop before a thread sleeps; its own are 300,000
CGROUP = Path("/sys/fs/cgroup")


def before_torch() -> None:
    """Settings that libraries read when they are loaded; what the user set stays."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # weights on huge pages, where the system lends them
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        # streams have new lengths all the time: on a GPU, segments that grow keep no gaps between them
        os.environ["PYTORCH_ALLOC_CONF"] = os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def tune_memory() -> None:
    """Raise glibc's mmap and trim thresholds where there is glibc, and look through all of Python's objects less often."""
    gc.set_threshold(700, 10, 1000)  # torch's modules are 300,000 objects that never go: 0.5 of the demo's 14 seconds
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, 1 << 30)
    mallopt(M_TRIM_THRESHOLD, 1 << 30)


def usable_cpus(cgroup: Path = CGROUP) -> int:
    """CPUs that this process may run on: its affinity, and the quota of its control group, rounded up; its share, beside other ranks."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, _quota(cgroup) or allowed) // _beside())


def _beside() -> int:
    """The ranks of this machine, which share it: 1 where nothing usable is said."""
    said = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(int(said), 1) if said.isdecimal() else 1


def _quota(cgroup: Path) -> int | None:
    """Whole CPUs of a control group's quota (version 2, then 1); None where there is no limit."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((cgroup / name).read_text().strip() for name in names).split()
            return None if quota in ("max", "-1") else -(-int(quota) // int(period))
        except (OSError, ValueError):
            continue
    return None


def memory_gb(device: "torch.device", cgroup: Path = CGROUP) -> float:
    """10^9 bytes of a card, or of the memory that this process may use: the machine's or its control group's, shared with other ranks."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_properties(device).total_memory / 1e9
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # not there, or "max"
            limits.append(int((cgroup / name).read_text()))
    return min(limits) / _beside() / 1e9


def free_gb(device: "torch.device", cgroup: Path = CGROUP) -> float:
    """10^9 bytes that are free on a card (the one with the least of several), or for this process."""
    if device.type == "cuda":
        import torch

        return min(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())) / 1e9
    free = memory_gb(device, cgroup)
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text().splitlines() if meminfo.is_file() else []:
        if line.startswith("MemAvailable:"):
            free = min(free, int(line.split()[1]) * 1024 / 1e9)
    return free


def device_name(device: "torch.device") -> str:
    """What the system calls a card, or its processor."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
