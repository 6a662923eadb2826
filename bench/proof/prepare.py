"""Compile what bench.gpu will launch, without a GPU, so that its minutes go into measuring.

    python -m bench.proof.prepare --cache DIR [--architectures 80 90] [--toy] [--jobs N]

The operations of bench.proof.parity and bench.kernels and the layers of bench.step run on tensors without data, their launches are
recorded (bench/proof/launches.py), and each is compiled as Triton would compile it on the card. TRITON_CACHE_DIR=DIR then finds it
there, on any machine with the same Triton.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from bench import tiles
from bench.operations import both_ways, leaves, of_model, upstream
from bench.proof.launches import Launch, recorded
from bench.proof.parity import PATHS, Check, ragged, real
from bench.shapes import MODELS, TOY
from bench.step import Form, random_model
from minilora.kernels.dispatch import use_gemm

META = torch.device("meta")
WIDTHS = ("qwen2.5-7b", "qwen2.5-0.5b")  # whose steps are timed
STREAMS = (1024, 2048, 4096, 8192)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def calls(toy: bool) -> Iterator[Callable[[], None]]:
    """What is launched, call by call."""
    checks, dtypes = (list(ragged()), DTYPES[:1]) if toy else ([*ragged(), *real()], DTYPES)
    for check in checks:
        for dtype in dtypes:
            yield operation(check, dtype)
    shapes = {"toy": TOY} if toy else MODELS
    for model, shape in shapes.items():
        for entry in of_model(model, shape, 16 if toy else 8192):
            for path in ("", "library"):
                yield operation(Check(entry, path), torch.bfloat16)
    for model in shapes if toy else WIDTHS:
        for tokens in (16,) if toy else STREAMS:
            for checkpointing in (False, True):
                for gemm in (nullcontext, partial(use_gemm, "library")):
                    yield step(model, tokens, checkpointing, gemm)


def operation(check: Check, dtype: torch.dtype, device: torch.device = META) -> Callable[[], None]:
    """An operation forward and backward, and forward alone."""

    def once() -> None:
        made = check.entry.make(dtype, device)
        made = made._replace(plain=made.op)
        with PATHS[check.path]():
            both_ways(made.op, leaves(made), upstream(made))
            with torch.no_grad():
                made.op(*leaves(made))

    return once


def step(
    model: str, tokens: int, checkpointing: bool, gemm: Callable[[], AbstractContextManager]
) -> Callable[[], None]:
    """Two layers: all others are like the second."""
    shape = TOY if model == "toy" else MODELS[model]._replace(layers=2)

    def once() -> None:
        with gemm():
            whole = random_model(shape, torch.bfloat16, META, 16)
            whole.checkpointing = checkpointing
            whole.loss(Form(tokens, tokens, 16, torch.device("cpu")).stream(shape).to(META)).backward()

    return once


def launched(architecture: int, toy: bool) -> Iterator[Launch]:
    """Every launch of the day on a card of this architecture."""
    for call in calls(toy):
        with recorded(architecture) as made:
            call()
        yield from made
    if not toy:
        yield from tiles.launches(architecture)


def distinct(architecture: int, toy: bool) -> list[Launch]:
    """The launches that are compiled, each once."""
    found = {}
    for launch in launched(architecture, toy):
        source, options = launch.source(architecture)
        found.setdefault((source.hash(), str(sorted(options.items()))), launch)
    return list(found.values())


def compiled(launch: Launch, architecture: int) -> str:
    """Compile a launch into Triton's cache; what went wrong, or nothing."""
    source, options = launch.source(architecture)
    try:
        triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    except Exception as problem:  # noqa: BLE001  the others are compiled all the same
        return f"{launch.name}: {type(problem).__name__}: {problem}".splitlines()[0]
    return ""


_made: list[tuple[Launch, int]] = []  # of the parent, which its forks see: a kernel can't be pickled


def _one(i: int) -> str:
    return compiled(*_made[i])


def prepare(cache: Path, architectures: list[int], toy: bool, jobs: int) -> tuple[int, list[str]]:
    """Fill the cache; returns how many kernels it has, and what could not be compiled."""
    knobs.cache.dir = str(cache)
    torch.set_num_threads(1)  # before the forks
    _made[:] = [(launch, each) for each in architectures for launch in distinct(each, toy)]
    with get_context("fork").Pool(jobs) as pool:
        problems = [found for found in pool.imap_unordered(_one, range(len(_made))) if found]
    return len(_made), problems


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, metavar="DIR")
    parser.add_argument("--architectures", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--toy", action="store_true", help="what bench.gpu --toy launches")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (one for each core)")
    args = parser.parse_args(argv)
    count, problems = prepare(args.cache, args.architectures, args.toy, args.jobs)
    print(f"{count - len(problems)} of {count} kernels compiled with Triton {triton.__version__} into {args.cache}")
    print("\n".join(problems), file=sys.stderr)
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
