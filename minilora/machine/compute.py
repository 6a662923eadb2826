"""In which dtype, and on how many threads, a CPU computes fastest: measured in milliseconds, on a model's own shapes.

Weights stay in memory as the checkpoint has them. Where 16-bit products are not native (most laptops, many servers) they run
at a fraction of the speed of fp32, so there each weight is widened for its product (kernels/frozen_linear.py) and all else is
fp32. On a GPU, and for weights in fp32, the weights' own dtype it is, and nothing is measured.
"""

import time
from functools import lru_cache
from typing import NamedTuple

import torch

from minilora.kernels.frozen_linear import frozen_linear
from minilora.models.config import Config

from .cpu import usable_cpus

ROWS = 512  # of a stream of training
SHORT = 64  # rows of the product that threads have to share well
TINY = 1e-3  # seconds of such a product on one thread, above which it is shared whatever else the machine does now
LARGEST = 1024  # rows and columns of a weight that is measured: larger ones run at the same rate
WORTH = 1.2  # how much faster 16-bit products have to be: fp32 rounds less, and all other operations like it better


class Compute(NamedTuple):
    """A dtype to compute in, and a sentence that says why."""

    dtype: torch.dtype
    why: str


class Rates(NamedTuple):
    """FLOP/s of products with a weight stored in 16 bits: multiplied as it is, and widened to fp32 first."""

    narrow: float
    widened: float


def choose(c: Config, stored: torch.dtype, device: torch.device, asked: str = "auto") -> Compute:
    """The dtype that a model is computed in: what was asked for, else what is fastest here."""
    if asked != "auto":
        dtype, best = getattr(torch, asked), choose(c, stored, device)
        other = f"; this machine would take {name_of(best.dtype)} ({best.why})"
        return Compute(dtype, "as set for this run" + (other if best.dtype != dtype else ""))
    if device.type != "cpu" or stored.itemsize != 2:
        return Compute(stored, "as the weights are stored")
    return fastest(measured_rates(min(c.width, LARGEST), min(c.ffn, LARGEST), stored), stored)


def fastest(rates: Rates, stored: torch.dtype) -> Compute:
    """Which dtype to compute in with weights of 16 bits, by the rates of its products."""
    name, ratio = short_name(stored), rates.narrow / rates.widened
    if ratio >= WORTH:
        return Compute(stored, f"{name} products run at {ratio:.1f} times fp32's speed on this CPU")
    why = f"{name} products run at {ratio:.2g} of fp32's speed on this CPU; weights stay in {name}"
    return Compute(torch.float32, why)


def measured_rates(k: int, n: int, stored: torch.dtype) -> Rates:
    """Rates for a weight [n, k] stored in 16 bits."""
    return Rates(_rate(k, n, stored, stored), _rate(k, n, stored, torch.float32))


def products_rate(c: Config, stored: torch.dtype, compute: torch.dtype) -> float:
    """FLOP/s of this CPU's products with rows of training."""
    return _rate(min(c.width, LARGEST), min(c.ffn, LARGEST), stored, compute)


@lru_cache
def _rate(k: int, n: int, stored: torch.dtype, compute: torch.dtype) -> float:
    """FLOP/s of a product of ROWS rows; the better one of two timings, after one of fewer rows that warms up."""
    x, weight = torch.randn(ROWS, k).to(compute), torch.randn(n, k).to(stored)
    _seconds(x[:SHORT], weight)
    return 2 * ROWS * k * n / min(_seconds(x, weight) for _ in range(2))


def _seconds(x: torch.Tensor, weight: torch.Tensor) -> float:
    start = time.perf_counter()
    frozen_linear(x, weight)
    return time.perf_counter() - start


def name_of(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def short_name(dtype: torch.dtype) -> str:
    """bf16 for torch.bfloat16."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}.get(dtype, name_of(dtype))


def choose_threads(c: Config) -> int:
    """Threads for a model: as many as torch takes and this process may use, or one where its products are too small to share."""
    most = min(torch.get_num_threads(), usable_cpus())
    if most == 1:
        return 1
    alone, shared = (_with_threads(n, min(c.width, LARGEST), min(c.ffn, LARGEST)) for n in (1, most))
    return most if alone > TINY or alone > WORTH * shared else 1


@lru_cache
def _with_threads(threads: int, k: int, n: int) -> float:
    """Seconds of a product of a short stream on so many threads; the best of a few."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, weight = torch.randn(SHORT, k), torch.randn(n, k)
        return min(_seconds(x, weight) for _ in range(8))
    finally:
        torch.set_num_threads(before)
