"""What a machine can do at most: dense 16-bit FLOP/s and bytes per second, and the time that no kernel can beat.

A known card by its maker's data sheet (A800 is an A100 with slower links between cards). Anything else by measurement: the best of a
few large matrix products, and of a few copies of a tensor that no cache holds.

    python -m bench.roof [--save FILE.json]    this machine's, by its data sheet and as measured
"""

import argparse
import json
import platform
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import torch

from minilora.machine.cpu import device_name
from minilora.machine.flops import PEAKS, measured_flops, peak_flops

# bytes per second of the memory, data sheets; the longer names first
BANDWIDTHS = {
    "H100 PCIe": 2.0e12, "A100-SXM4-40GB": 1.555e12, "A100-PCIE-40GB": 1.555e12, "A100": 2.0e12, "A800": 2.0e12,
    "H200": 4.8e12, "H100": 3.35e12, "H800": 3.35e12,
}  # fmt: skip


class Roof(NamedTuple):
    """Peak rates of a device, and whether they were measured here or are a data sheet's."""

    device: str
    flops: float
    bandwidth: float
    measured: bool

    def bound(self, flops: float, size: float) -> float:
        """Seconds that so many operations and bytes need at least."""
        return max(flops / self.flops, size / self.bandwidth)


# for arithmetic without the card
CARDS = {
    name: Roof(name, PEAKS[key], BANDWIDTHS[key], False)
    for name, key in {"A100-80GB": "A100", "H100-SXM": "H100"}.items()
}


def roof(device: torch.device, dtype: torch.dtype) -> Roof:
    """The roof of this device for GEMMs in dtype."""
    name = device_name(device)
    card = next((key for key in BANDWIDTHS if key in name), None)
    if device.type == "cuda" and card is not None and dtype in (torch.bfloat16, torch.float16):
        return Roof(name, PEAKS[next(key for key in PEAKS if key in name)], BANDWIDTHS[card], False)
    return Roof(name, peak_flops(device, dtype), copy_rate(device), True)


def copy_rate(device: torch.device) -> float:
    """Bytes read and written per second by the best of a few copies."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device) -> dict[str, str | int]:
    """Where a figure comes from: device, versions, commit."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "none"
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version,
        "python": platform.python_version(),
        "commit": commit(),
    }


def commit() -> str:
    """The commit of the checkout, with + where files differ from it; unknown outside one."""
    here = Path(__file__).parent
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=here, capture_output=True, text=True, check=False
    )
    return told.stdout.strip() or "unknown"


def card(device: torch.device) -> dict[str, str | int]:
    """What a kernel's speed hangs on beside the peaks."""
    if device.type != "cuda":
        return {}
    p = torch.cuda.get_device_properties(device)
    asked = "driver_version,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
    told = subprocess.run(
        ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return {
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory": p.total_memory,
        "cuda": str(torch.version.cuda),
        asked: told.stdout.strip(),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--save", metavar="FILE")
    args = parser.parse_args(argv)
    device, dtype = torch.device(args.device), torch.bfloat16
    found = machine(device) | card(device)
    sheet = roof(device, dtype)
    measured = sheet if sheet.measured else Roof(sheet.device, measured_flops(device, dtype), copy_rate(device), True)
    lines = [f"| {key} | {value} |" for key, value in found.items()]
    for name, top in (("roof", sheet), ("measured", measured)):
        lines.append(f"| {name} | {top.flops / 1e12:.4g} TFLOP/s in bf16, {top.bandwidth / 1e9:.4g} GB/s |")
    print("\n".join(["| | |", "|---|---|", *lines]))
    if args.save:
        Path(args.save).write_text(json.dumps(found | {"measured": measured._asdict()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
