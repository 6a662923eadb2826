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

from bench.launches import Launch, recorded
from bench.sass import blocks, cycles, disassemble, main_loop, operation
from minilora.kernels import rms_norm, rope, swiglu

ARCHITECTURES = (80, 90)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
STREAMS = ("lora_narrow.",)  # kernels with tensor cores that read what they multiply from memory, once
TOKENS = 4099  # not a multiple of 16: no size that varies may be taken for aligned


def call(
    op: Callable, example: Callable, *sizes: int, trained: tuple[int, ...], **form: Any
) -> Callable[[torch.dtype], None]:
    """A forward and a backward of op on the arguments of its example."""

    def once(dtype: torch.dtype) -> None:
        args = example(TOKENS, *sizes, dtype, "meta", **form)[0]
        out = op(*[a.requires_grad_(i in trained) if isinstance(a, Tensor) else a for i, a in enumerate(args)])
        outputs = out if isinstance(out, tuple) else (out,)
        torch.autograd.backward(outputs, [torch.empty_like(o) for o in outputs])

    return once


def _norm(n: int, trained: tuple[int, ...], **form: Any) -> Callable[[torch.dtype], None]:
    return call(rms_norm.rms_norm, rms_norm.example, n, trained=trained, **form)


def _add_norm(n: int, trained: tuple[int, ...], **form: Any) -> Callable[[torch.dtype], None]:
    return call(rms_norm.add_rms_norm, rms_norm.add_example, n, trained=trained, **form)


def _rope(heads: int, size: int, **form: Any) -> Callable[[torch.dtype], None]:
    return call(rope.rope, rope.example, heads, size, trained=(0,), **form)


# sizes that models have, with one call for each configuration that they lead to
CALLS: dict[str, Callable[[torch.dtype], None]] = {
    "rms_norm 128 frozen": _norm(128, (0,)),
    "rms_norm 896 trained": _norm(896, (0, 1)),
    "rms_norm 2048 trained": _norm(2048, (0, 1)),
    "rms_norm 3584 frozen": _norm(3584, (0,)),
    "rms_norm 3584 trained": _norm(3584, (0, 1)),
    "rms_norm 4096 once": _norm(4096, (0,), once=True),
    "rms_norm 8192 frozen": _norm(8192, (0,)),
    "rms_norm 8192 trained": _norm(8192, (0, 1)),
    "add_rms_norm 896 frozen": _add_norm(896, (0, 1)),
    "add_rms_norm 3584 frozen": _add_norm(3584, (0, 1)),
    "add_rms_norm 4096 once": _add_norm(4096, (0, 1), once=True),
    "add_rms_norm 8192 trained": _add_norm(8192, (0, 1, 2)),
    "swiglu 4864": call(swiglu.swiglu, swiglu.example, 4864, trained=(0, 1)),
    "swiglu_fused 13696": call(swiglu.swiglu_fused, swiglu.fused_example, 13696, trained=(0,)),
    "rope 2x64": _rope(2, 64),
    "rope 28x128": _rope(28, 128),
    "rope 32x128 of which 64 interleaved": _rope(32, 128, rotated=64, interleaved=True),
}


def launches() -> dict[str, tuple[Launch, int]]:
    """A name, a launch and its architecture for every kernel and configuration."""
    found: dict[str, tuple[Launch, int]] = {}
    seen = set()
    for name, once in CALLS.items():
        for short, dtype in DTYPES.items():
            for arch in ARCHITECTURES:
                with recorded(arch) as made:
                    once(dtype)
                assert made, f"{name}: no kernel was launched"
                for launch in made:
                    source, options = launch.source(arch)
                    key = (source.hash(), str(sorted(options.items())), arch)
                    if key not in seen:
                        seen.add(key)
                        label = f"{name} {launch.name} {short} sm_{arch}"
                        again = sum(other.startswith(label) for other in found)
                        found[label + f" {again + 1}" * bool(again)] = (launch, arch)
    return found


def needs(launch: Launch, arch: int) -> dict[str, Any]:
    """What the launch needs of a card of this architecture."""
    source, options = launch.source(arch)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    code, usage = disassemble(made.asm["cubin"])
    body, ops = main_loop(code), [operation(i) for i in code.instructions]
    warps = made.metadata.num_warps
    mma = sum(op.startswith(("HMMA", "HGMMA")) for op in ops)
    pipes = cycles(body, warps, arch, streams=not mma or launch.name.startswith(STREAMS))
    return {
        **usage,
        "shared": made.metadata.shared,
        "threads": 32 * warps,
        "blocks": blocks(usage["registers"], made.metadata.shared, warps, arch),
        "mma": mma,
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
