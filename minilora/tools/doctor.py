"""`minilora doctor`: what this machine has, how fast it is by measurements of seconds, what is to be mended, and what binds."""

import os
import platform
import tempfile
from importlib import import_module
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import torch
from torch.cuda import nccl

from minilora.kernels.dispatch import OLDEST, architecture

from .. import __version__
from ..errors import DiskError, OutOfMemory, RankLost, UsageError
from ..files.speed import SIZE as FILE_SIZE
from ..files.speed import FileSpeed, file_speed
from ..machine.compute import LARGEST, fastest, measured_rates, name_of
from ..machine.cpu import device_name, free_gb, memory_gb, usable_cpus
from ..machine.flops import PEAKS, measured_flops
from ..ranks.bandwidth import AllReduce, measure, timed_all_reduce
from ..ranks.cost import all_reduce_bytes
from ..ranks.ranks import ALONE, Ranks
from ..ranks.scale import NF4_BITS, SHAPES

DRIVER = Path("/proc/driver/nvidia/version")
MODEL, R, TOKENS = "Qwen2.5-7B", 16, 2048  # of the step that is estimated
LEAST_GB = 1.0  # of memory: Python with torch, and a small model


class Finding(NamedTuple):
    """A line about the machine; where something is to be mended, how, and the exit code of a run that it would stop."""

    name: str
    text: str
    mend: str = ""
    code: int = 0


def diagnose(folder: Path, gpus: int | None = None, ranks: Ranks = ALONE) -> list[Finding]:
    """The findings on this machine and on a folder that runs are written to.

    gpus: how many ranks add up gradients here for the measurement; None: all GPUs, or two processes of a CPU. Where torchrun started this
    process as one of `ranks`, it is they that do, on all machines, and only the first has findings.
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device("cuda" if there else "cpu")
    reduced = measure(device) if ranks.count > 1 else None
    ranks.leave()
    if not ranks.first:
        return []
    found = [software(there), processor(), *graphics(there, gpus)]
    rate, products = compute(device)
    count = ranks.count if reduced else min(gpus, there or gpus) if gpus else there or 2
    if reduced is None and count > 1:
        reduced = timed_all_reduce(count, device.type)
    speed, files = output(folder)
    exchange = [network(reduced, count, device)] if reduced else []
    return [*found, products, *exchange, files, temporary(), binds(rate, reduced, speed, free_gb(device))]


def software(gpus: int, triton: str = "triton") -> Finding:
    """Versions; Triton is to be there where GPUs are."""
    parts, mend = [f"minilora {__version__}", f"python {platform.python_version()}", f"torch {torch.__version__}"], ""
    if gpus and torch.version.cuda:
        parts += [f"CUDA {torch.version.cuda}", f"NCCL {'.'.join(map(str, nccl.version()))}"]
    try:
        parts.append(f"triton {import_module(triton).__version__}")
    except ImportError:
        parts.append("no triton")
        mend = "without Triton, PyTorch's operations run on the GPU: pip install triton" if gpus else ""
    return Finding("has", "   ".join(parts), mend, UsageError.code if mend else 0)


def processor() -> Finding:
    cpu = torch.device("cpu")
    free, threads, cpus = free_gb(cpu), torch.get_num_threads(), usable_cpus()
    text = f"{device_name(cpu)}, {cpus} CPUs, {torch.backends.cpu.get_cpu_capability()}; {free:,.3g} of {memory_gb(cpu):,.3g} GB free"
    if threads < cpus:
        text += f"; torch takes {threads} of the CPUs (OMP_NUM_THREADS)"
    short = free < LEAST_GB
    return Finding("cpu", text, "there is little memory: close other programs" * short, OutOfMemory.code * short)


def graphics(there: int, asked: int | None = None, driver: Path = DRIVER) -> list[Finding]:
    """A line for each kind of GPU, what keeps torch from them, and which reach each other's memory."""
    build = torch.version.cuda
    if not there and not driver.is_file():
        return [Finding("gpu", "none")]
    if not there:
        mend = (
            f"the driver does not serve CUDA {build}: take a newer driver or an older torch, in a container --gpus all"
        )
        if build is None:
            mend = f"torch {torch.__version__} is built for CPUs: install the one for CUDA (pytorch.org)"
        return [Finding("gpu", "an NVIDIA driver, but no GPU that torch can use", mend, UsageError.code)]
    found, loaded = [], driver.read_text().split("Kernel Module")[-1].split()[0] if driver.is_file() else "unknown"
    kinds: dict[tuple[str, int], list[tuple[int, int]]] = {}  # bytes that are free, and all, of each GPU
    for i in range(there):
        kind = torch.cuda.get_device_name(i), architecture(torch.device("cuda", i))
        kinds.setdefault(kind, []).append(torch.cuda.mem_get_info(i))
    for (name, arch), memory in kinds.items():
        free, size = (f"{number / 1e9:,.3g}" for number in min(memory))
        text = f"{len(memory)} x {name}, sm_{arch}, driver {loaded}; {free} of {size} GB free"
        old = arch < OLDEST
        found.append(Finding("gpu", text + "; PyTorch's operations alone: the kernels take sm_80 or later" * old))
    if asked and asked > there:
        found.append(Finding("", f"{asked} were asked for", f"--gpus {there}: there are no more", UsageError.code))
    if there > 1:
        apart = [f"{i}-{j}" for i, j in combinations(range(there), 2) if not torch.cuda.can_device_access_peer(i, j)]
        text = f"not between {', '.join(apart)}: there NCCL goes through the host's memory"
        found.append(Finding("peers", text if apart else "all reach each other's memory"))
    return found


def compute(device: torch.device) -> tuple[float, Finding]:
    """FLOP/s of the products of a bf16 base in the dtype that they are computed in."""
    if device.type == "cuda":
        rate = measured_flops(device, torch.bfloat16)
        peak = next((f", of a peak of {p / 1e12:,.0f}" for gpu, p in PEAKS.items() if gpu in device_name(device)), "")
        return rate, Finding("compute", f"bfloat16: {rate / 1e12:,.3g} TFLOP/s{peak}")
    rates = measured_rates(LARGEST, LARGEST, torch.bfloat16)
    chosen = fastest(rates, torch.bfloat16)
    rate = rates.narrow if chosen.dtype == torch.bfloat16 else rates.widened
    return rate, Finding("compute", f"{name_of(chosen.dtype)}: {rate / 1e9:,.3g} GFLOP/s; {chosen.why}")


def network(reduced: AllReduce, ranks: int, device: torch.device) -> Finding:
    """How fast ranks exchange what they add up."""
    how = "NCCL" if device.type == "cuda" else "gloo"
    if reduced.failure:
        mend = f"{ranks} ranks cannot train together; {how.upper()}_SOCKET_IFNAME names the network"
        mend += ", NCCL_DEBUG=INFO says more, a container wants --shm-size 1g" * (how == "NCCL")
        return Finding("ranks", f"{ranks} over {how}: {reduced.failure}", mend, RankLost.code)
    rate = all_reduce_bytes(reduced.size, ranks) / reduced.seconds
    text = f"{ranks} over {how}: each sends {rate / 1e9:,.3g} GB/s while {reduced.size / 1e6:,.0f} MB are added up"
    return Finding("ranks", text)


def output(folder: Path) -> tuple[FileSpeed | None, Finding]:
    """The file system of a folder, or of the one that it would be made in."""
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    try:
        speed = file_speed(place)
    except OSError as error:
        mend = f"nothing can be written to {place}: give another --output"
        return None, Finding("files", f"{place}: {error.strerror}", mend, DiskError.code)
    text = f"{place}: {speed.write / 1e9:,.2g} GB/s written and flushed, {speed.read / 1e9:,.2g} read ({FILE_SIZE / 1e6:,.0f} MB); {speed.free / 1e9:,.3g} GB free"
    # a run keeps three checkpoints: the newest two and the best, each of the adapter and AdamW's two numbers in fp32
    needed = 3 * 12 * SHAPES[MODEL].trained(R)
    short = speed.free < needed
    mend = f"{place} has less than the {needed / 1e9:.1f} GB that the checkpoints of a run can take" * short
    return speed, Finding("files", text, mend, DiskError.code * short)


def temporary() -> Finding:
    """Where the tokens of the rows wait while a run goes on."""
    try:
        with tempfile.TemporaryFile() as file:
            disk = os.fstatvfs(file.fileno())
    except OSError as error:
        return Finding(
            "", f"temporary files: {error.strerror}", "TMPDIR must name a folder that can be written", DiskError.code
        )
    return Finding(
        "", f"{tempfile.gettempdir()}, for the tokens of rows: {disk.f_bavail * disk.f_frsize / 1e9:,.3g} GB free"
    )


def binds(rate: float, reduced: AllReduce | None, speed: FileSpeed | None, free: float) -> Finding:
    """What a step of a known model waits for most, by the rates that were measured, and whether its base fits; `free` in GB."""
    shape = SHAPES[MODEL]
    seconds = {"products": shape.flops(TOKENS, R) / rate}
    if reduced and not reduced.failure:
        seconds["gradients between ranks"] = reduced.seconds * 4 * shape.trained(R) / reduced.size
    told = ", ".join(f"{value:,.2g} s of {name}" for name, value in seconds.items())
    wide, narrow = shape.base_bytes() / 1e9, shape.base_bytes(NF4_BITS) / 1e9
    most = max(seconds, key=seconds.__getitem__) if narrow < free else "memory"
    read = f"; read in {wide * 1e9 / speed.read:,.2g} s" if speed else ""
    lines = [
        f"{most}: a step of {TOKENS:,} tokens a rank on {MODEL}, r={R}, takes {told}",
        f"its base takes {wide:.1f} GB in bf16, {narrow:.1f} in NF4, of {free:,.3g} free{read}",
    ]
    return Finding("binds", "\n".join(lines))


def text_of(found: list[Finding]) -> str:
    """The findings for people, and at the end what is to be mended."""
    lines = [(f.name, line) for f in found for line in f.text.split("\n")]
    lines += [("mend", f.mend) for f in found if f.mend]
    if not any(f.mend for f in found):
        lines.append(("ready", "nothing is to be mended"))
    told, last = [], ""
    for name, line in lines:
        told.append(f"{name if name != last else '':<8}{line}")
        last = name
    return "\n".join(told)
