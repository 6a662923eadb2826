"""Compile every kernel in every configuration for sm_80 and sm_90, without a GPU, and say what binds it.

    python -m bench.compile [--only WORDS] [--jobs N] [--cache DIR] > bench/compiled.json

For every kernel: registers and spilled bytes of a thread, shared bytes, threads, blocks that fit a multiprocessor, tensor-core instructions, global loads
(async into shared memory, wide, narrow), and for one pass of its main loop the cycles that bench/sass.py reads from the code.
A summary goes to standard error. What was compiled once is kept by triton under a hash of its source, in --cache.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget

from bench.launches import NAMES, Launch, recorded
from bench.sass import blocks, cycles, disassemble, main_loop, operation
from minilora.kernels import rms_norm, rope, swiglu

ARCHITECTURES = (80, 90)
DTYPES = (torch.bfloat16, torch.float16)
TOKENS = 4099  # not a multiple of 16: no size that varies may be taken for aligned


def call(op: Callable, example: Callable, *sizes: int, trained: tuple[int, ...]) -> Callable[[torch.dtype], None]:
    """A forward and a backward of op on the arguments of its example."""

    def once(dtype: torch.dtype) -> None:
        args = example(TOKENS, *sizes, dtype, "meta")[0]
        out = op(*[a.requires_grad_(i in trained) if isinstance(a, Tensor) else a for i, a in enumerate(args)])
        out.backward(torch.empty_like(out))

    return once


# sizes that models have, with one call for each configuration that they lead to
CALLS: dict[str, Callable[[torch.dtype], None]] = {
    f"rms_norm {n} {kind}": call(rms_norm.rms_norm, rms_norm.example, n, trained=trained)
    for n, kind, trained in [
        (128, "frozen", (0,)), (896, "trained", (0, 1)), (2048, "trained", (0, 1)), (3584, "frozen", (0,)),
        (3584, "trained", (0, 1)), (8192, "frozen", (0,)), (8192, "trained", (0, 1)),
    ]
}  # fmt: skip
CALLS["swiglu 4864"] = call(swiglu.swiglu, swiglu.example, 4864, trained=(0, 1))
for _heads, _size in ((2, 64), (28, 128)):
    CALLS[f"rope {_heads}x{_size}"] = call(rope.rope, rope.example, _heads, _size, trained=(0,))


def launches() -> dict[str, tuple[Launch, int]]:
    """A name, a launch and its architecture for every kernel and configuration."""
    found: dict[str, tuple[Launch, int]] = {}
    seen = set()
    for name, once in CALLS.items():
        for dtype in DTYPES:
            for arch in ARCHITECTURES:
                with recorded(arch) as made:
                    once(dtype)
                assert made, f"{name}: no kernel was launched"
                for launch in made:
                    key = (launch.source().hash(), str(sorted(launch.compile_options().items())), arch)
                    if key not in seen:
                        seen.add(key)
                        label = f"{name} {launch.name} {NAMES[dtype]} sm_{arch}"
                        again = sum(other.startswith(label) for other in found)
                        found[label + f" {again + 1}" * bool(again)] = (launch, arch)
    return found


def needs(launch: Launch, arch: int) -> dict[str, Any]:
    """What the launch needs of a card of this architecture."""
    options = launch.compile_options()
    made = triton.compile(launch.source(), target=GPUTarget("cuda", arch, 32), options=options)
    code, usage = disassemble(made.asm["cubin"])
    body, ops = main_loop(code), [operation(i) for i in code.instructions]
    warps = made.metadata.num_warps
    pipes = cycles(body, warps, arch)
    return {
        **usage,
        "shared": made.metadata.shared,
        "threads": 32 * warps,
        "blocks": blocks(usage["registers"], made.metadata.shared, warps, arch),
        "mma": sum(op.startswith(("HMMA", "HGMMA")) for op in ops),
        "async_loads": sum(op.startswith(("LDGSTS", "UTMALDG")) for op in ops),
        "wide_loads": sum(op.startswith("LDG.") and op.endswith(("128", "64")) for op in ops),
        "narrow_loads": sum(op.startswith("LDG.") and not op.endswith(("128", "64")) for op in ops),
        "cycles": pipes,
        "bound": max(pipes, key=lambda pipe: pipes[pipe]),
    }


_found: dict[str, tuple[Launch, int]] = {}  # of a worker: a kernel can't be pickled, so each records for itself


def _start(cache: str) -> None:
    knobs.cache.dir = cache
    _found.update(launches())


def _needs_of(label: str) -> dict[str, Any]:
    return needs(*_found[label])


def table(cache: Path, only: str = "", jobs: int = 1) -> dict[str, dict[str, Any]]:
    """The needs of every kernel whose label has all the words of `only`."""
    labels = [label for label in launches() if all(word in label.split() for word in only.split())]
    with get_context("spawn").Pool(jobs, _start, (str(cache),)) as pool:
        return dict(zip(labels, pool.imap(_needs_of, labels), strict=True))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.compile", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", metavar="WORDS", help='as in "rms_norm._fwd_kernel sm_80": all of these')
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (one for each core)")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "minilora/compile"
    parser.add_argument("--cache", type=Path, default=cache, metavar="DIR", help=f"compiled kernels ({cache})")
    args = parser.parse_args(argv)
    rows = table(args.cache, args.only, args.jobs)
    lines = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()]
    print(f'{{"triton": "{triton.__version__}", "kernels": {{', ",\n".join(lines), "}}", sep="\n")
    for name, row in rows.items():
        pipes = ", ".join(f"{pipe} {n}" for pipe, n in row["cycles"].items() if n)
        print(
            f"{name}: {row['registers']} registers, {row['blocks']} blocks, bound by {row['bound']} (cycles: {pipes})",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
