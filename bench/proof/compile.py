"""Compile every kernel in every configuration for sm_80, sm_86 and sm_90, without a GPU, and say what binds it.

    python -m bench.proof.compile [--only WORDS] [--one] [--jobs N] [--cache DIR] > bench/proof/compiled.json

For every kernel: registers and spilled bytes of a thread, shared bytes, threads, blocks that fit a multiprocessor, tensor-core instructions, global loads
(async into shared memory, wide, narrow), and for one pass of its main loop the cycles that bench/proof/sass.py reads from the code.
Under another Triton, `--needs > bench/proof/compiled-3.6.json` is what a card needs for the same kernels. A summary goes to standard error. What was compiled once is kept by triton under a hash of its source, in --cache.
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

from bench.proof.launches import Launch, recorded
from bench.proof.sass import blocks, cycles, disassemble, main_loop, operation
from minilora.kernels import (
    cross_entropy,
    fp8_rows,
    linear_cross_entropy,
    lora_experts,
    lora_linear,
    lora_mlp,
    lora_swiglu,
    rms_norm,
    rope,
    swiglu,
)
from minilora.kernels.dequantize import FEW_ROWS
from minilora.kernels.dispatch import use_gemm
from minilora.kernels.dropout import DropoutKey
from minilora.kernels.fp8_blocks import FP8Weight
from minilora.kernels.int8_rows import Int8Weight
from minilora.kernels.nf4 import NF4Weight
from minilora.kernels.projection import Adapter, Projection
from minilora.kernels.quantized import QuantizedWeight, weight_as

ARCHITECTURES = (80, 86, 90)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FORMATS: dict[str, type[QuantizedWeight]] = {form.name: form for form in (NF4Weight, Int8Weight, FP8Weight)}
STREAMS = (
    "expert_shrink.",
    "lora_shrink.",
    "swiglu_shrink.",
    "wide_products.",
)  # kernels with tensor cores that read what they multiply from memory, once
RANKS = (16, 32, 64, 128)  # the slots of S: less than a part of a rank in a dot, one, and several
NEEDS = ("registers", "spills", "shared", "threads", "blocks")  # of a card
TOKENS = 4099  # not a multiple of 16: no size that varies may be taken for aligned
FEW = (1511, 711)


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


def _rope_pair(dtype: torch.dtype) -> None:
    """Of Qwen2.5-7B: 28 heads of q and 4 of k."""
    q, cos, sin, _ = rope.example(TOKENS, 28, 128, dtype, "meta")[0]
    k = torch.empty(TOKENS, 4, 128, device="meta", dtype=dtype, requires_grad=True)
    ys = rope.rope_pair(q.requires_grad_(), k, cos, sin)
    torch.autograd.backward(ys, [torch.empty_like(y) for y in ys])


def _rope_sections(dtype: torch.dtype) -> None:
    """Of ChatGLM-6B: each half of a head rotates by its own position."""
    x, cos, sin, _ = rope.example(TOKENS, 32, 128, dtype, "meta")[0]
    y = rope.rope(x.requires_grad_(), cos.unflatten(1, (2, -1)), sin.unflatten(1, (2, -1)))
    y.backward(torch.empty_like(y))


def _train(x: Tensor, *projections: Projection) -> None:
    for t in (x, *(t for p in projections if p.adapter for t in (p.adapter.a, p.adapter.b))):
        t.requires_grad_()


def _lora(
    k: int, ns: tuple[int, ...], r: int, p: float = 0.0, form: str = "triton", tokens: int = TOKENS
) -> Callable[[torch.dtype], None]:
    def once(dtype: torch.dtype) -> None:
        x, projections = lora_linear.group_example(tokens, k, ns, r, dtype, "meta", p)[0]
        _train(x, *projections)
        with use_gemm(form):
            ys = lora_linear.lora_linear_group(x, projections)
        torch.autograd.backward(ys, [torch.empty_like(y) for y in ys])

    return once


def _mlp(r: int, p: float = 0.0, tokens: int = TOKENS) -> Callable[[torch.dtype], None]:
    """Of Qwen2.5-7B; what it launches beside its own kernels is among the groups above."""

    def once(dtype: torch.dtype) -> None:
        x, gate_up, down = lora_mlp.example(tokens, 3584, 18944, r, dtype, "meta", p)[0]
        _train(x, *gate_up, down)
        y = lora_mlp.lora_mlp(x, gate_up, down)
        y.backward(torch.empty_like(y))

    return once


def _quantized(
    name: str, tokens: int, k: int, ns: tuple[int, ...], r: int, p: float = 0.0
) -> Callable[[torch.dtype], None]:
    """Linears whose weights are made in the loop of their products."""

    def once(dtype: torch.dtype) -> None:
        x = torch.empty(tokens, k, device="meta", dtype=dtype, requires_grad=True)
        projections = quantized_group(x, ns, r, FORMATS[name], p)
        ys = lora_linear.lora_linear_group(x, projections)
        torch.autograd.backward(ys, [torch.empty_like(y) for y in ys])

    return once


def _experts(
    r: int, p: float = 0.0, tokens: int = TOKENS, form: str = "wide", shared: bool = False
) -> Callable[[torch.dtype], None]:
    """Of Qwen3-30B-A3B; few tokens are decoded and have no backward. shared: the A of gate_up and the B of down."""

    def once(dtype: torch.dtype) -> None:
        x, w, routing, first, last = lora_experts.example(tokens, 2048, 768, 128, 8, r, dtype, "meta", p)[0]
        if shared and first.adapter and last.adapter:
            first = first._replace(adapter=first.adapter._replace(a=first.adapter.a[:1]))
            last = last._replace(adapter=last.adapter._replace(b=last.adapter.b[:1]))
        if form != "wide":
            first, last = (q._replace(weight=FORMATS[form].empty(q.weight.shape, "meta")) for q in (first, last))
        with torch.set_grad_enabled(tokens > FEW_ROWS):
            _train(x, first, last)
            y = lora_experts.lora_experts(x, w.requires_grad_(), routing, first, last)
        if tokens > FEW_ROWS:
            y.backward(torch.empty_like(y))

    return once


def _widen(name: str) -> Callable[[torch.dtype], None]:
    def once(dtype: torch.dtype) -> None:
        weight_as(FORMATS[name].empty((18944, 3584), "meta"), dtype)

    return once


def _dual(k: int, n: int, r: int) -> Callable[[torch.dtype], None]:
    def once(dtype: torch.dtype) -> None:
        lora_swiglu.lora_swiglu(*lora_swiglu.example(TOKENS, k, n, r, dtype, "meta")[0])

    return once


def _on_logits(v: int, trained: bool, scaled: bool = False) -> Callable[[torch.dtype], None]:
    def once(dtype: torch.dtype) -> None:
        logits, targets = cross_entropy.example(TOKENS, v, dtype, "meta")[0]
        scale = torch.empty((), device="meta") if scaled else None
        loss, _ = cross_entropy.cross_entropy(logits.requires_grad_(trained), targets, scale)
        if trained:
            loss.backward()

    return once


def _of_a_head(d: int, v: int, trained: tuple[int, ...]) -> Callable[[torch.dtype], None]:
    def once(dtype: torch.dtype) -> None:
        x, head, targets = linear_cross_entropy.example(TOKENS, d, v, dtype, "meta")[0]
        x, head = x.requires_grad_(0 in trained), head.requires_grad_(1 in trained)
        linear_cross_entropy.linear_cross_entropy(x, head, targets, linear_cross_entropy.CHUNK_ROWS_CUDA)

    return once


def _in_fp8(k: int, scaled: bool = False) -> Callable[[torch.dtype], None]:
    """x of a product in FP8, or dY, which takes the scales of W in first."""

    def once(dtype: torch.dtype) -> None:
        x = torch.empty(TOKENS, k, dtype=dtype, device="meta")
        fp8_rows.by_rows(x, torch.empty(k, 1, device="meta") if scaled else None)

    return once


# sizes that models have, with one call for each configuration that they lead to
CALLS: dict[str, Callable[[torch.dtype], None]] = {
    "rms_norm 128 frozen": _norm(128, (0,)),
    "rms_norm 896 trained": _norm(896, (0, 1)),
    "rms_norm 2048 trained": _norm(2048, (0, 1)),
    "rms_norm 3584 frozen": _norm(3584, (0,)),
    "rms_norm 3584 trained": _norm(3584, (0, 1)),
    "rms_norm 4096 once": _norm(4096, (0,), round_once=True),
    "rms_norm 8192 frozen": _norm(8192, (0,)),
    "rms_norm 8192 trained": _norm(8192, (0, 1)),
    "add_rms_norm 896 frozen": _add_norm(896, (0, 1)),
    "add_rms_norm 3584 frozen": _add_norm(3584, (0, 1)),
    "add_rms_norm 4096 once": _add_norm(4096, (0, 1), round_once=True),
    "add_rms_norm 8192 trained": _add_norm(8192, (0, 1, 2)),
    "swiglu 4864": call(swiglu.swiglu, swiglu.example, 4864, trained=(0, 1)),
    "swiglu_fused 13696": call(swiglu.swiglu_fused, swiglu.fused_example, 13696, trained=(0,)),
    "rope 2x64": _rope(2, 64),
    "rope 28x128": _rope(28, 128),
    "rope 28x128 and 4x128": _rope_pair,
    "rope 32x128 of which 64 interleaved": _rope(32, 128, rotated=64, interleaved=True),
    "rope 32x128 sections": _rope_sections,
    **{f"lora_qkv r={r}": _lora(3584, (3584, 512, 512), r) for r in RANKS},
    **{f"lora_gate_up r={r}": _lora(3584, (18944, 18944), r) for r in RANKS},
    **{f"lora_down r={r}": _lora(18944, (3584,), r) for r in RANKS},
    **{f"lora_k r={r}": _lora(3584, (512,), r) for r in RANKS},
    **{f"lora_qkv r={r} dropout": _lora(3584, (3584, 512, 512), r, 0.05) for r in RANKS},
    **{f"lora_gate_up r={r} dropout": _lora(3584, (18944, 18944), r, 0.05) for r in RANKS},
    **{f"lora_down r={r} dropout": _lora(18944, (3584,), r, 0.05) for r in RANKS},
    **{f"lora_k r={r} dropout": _lora(3584, (512,), r, 0.05) for r in RANKS},
    # what is left of dX under dropout where the library makes the wide products
    **{f"lora_qkv r={r} dropout, library": _lora(3584, (3584, 512, 512), r, 0.05, "library") for r in RANKS},
    **{f"lora_mlp r={r}": _mlp(r) for r in RANKS},
    **{f"lora_mlp r={r} dropout": _mlp(r, 0.05) for r in RANKS},
    # few rows, few columns: other tiles
    **{f"lora_mlp r=16 of {tokens}": _mlp(16, tokens=tokens) for tokens in FEW},
    **{f"lora_qkv r=16 of {tokens}": _lora(3584, (3584, 512, 512), 16, tokens=tokens) for tokens in FEW},
    **{f"lora_qkv 896 r={r}": _lora(896, (896, 128, 128), r) for r in RANKS},
    **{f"lora_qkv 896 r={r} dropout": _lora(896, (896, 128, 128), r, 0.05) for r in RANKS},
    **{f"lora_swiglu r={r}": _dual(3584, 18944, r) for r in RANKS},
    "fp8_rows 896": _in_fp8(896),
    "fp8_rows 3584 scaled": _in_fp8(3584, scaled=True),
    "fp8_rows 18944 scaled": _in_fp8(18944, scaled=True),
    **{f"{name} widened": _widen(name) for name in FORMATS},
    **{f"{name} qkv of 1 r=16": _quantized(name, 1, 3584, (3584, 512, 512), 16) for name in FORMATS},
    **{
        f"{name} qkv of 259 r={r}": _quantized(name, 259, 3584, (3584, 512, 512), r)
        for name in FORMATS
        for r in (16, 64)
    },
    **{f"{name} qkv of 259 r=16 dropout": _quantized(name, 259, 3584, (3584, 512, 512), 16, 0.05) for name in FORMATS},
    **{f"{name} down of 259 r=16": _quantized(name, 259, 18944, (3584,), 16) for name in FORMATS},
    "lora_experts r=16": _experts(16),
    "lora_experts r=64 dropout": _experts(64, 0.05),
    "lora_experts r=16 shared": _experts(16, shared=True),
    "lora_experts of 1 r=16": _experts(16, tokens=1),
    "lora_experts nf4 r=16": _experts(16, form="nf4"),
    "lora_experts nf4 of 1 r=16": _experts(16, tokens=1, form="nf4"),
    "cross_entropy 152064": _on_logits(152064, True),
    "cross_entropy 152064 scaled": _on_logits(152064, True, scaled=True),
    "cross_entropy 152064 without gradient": _on_logits(152064, False),
    "linear_cross_entropy 3584x152064": _of_a_head(3584, 152064, (0,)),
    "linear_cross_entropy 3584x152064 trained": _of_a_head(3584, 152064, (0, 1)),
    "linear_cross_entropy 3584x152064 without gradient": _of_a_head(3584, 152064, ()),
}
# kernels with tables for sm_86, whose programs have 99 KiB of shared memory and not 163
ON_86 = ("lora_", "linear_cross_entropy", *FORMATS)


def quantized_group(x: Tensor, ns: tuple[int, ...], r: int, form: type[QuantizedWeight], p: float) -> list[Projection]:
    """Projections without data, all of whose adapters want gradients."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta", requires_grad=True)

    k = x.shape[1]
    return [
        Projection(form.empty((n, k), "meta"), None, Adapter(empty(r, k), empty(n, r), 2.0, p, DropoutKey(0, 0, 0, j)))
        for j, n in enumerate(ns)
    ]


def launches(only: str = "") -> dict[str, tuple[Launch, int]]:
    """A name, a launch and its architecture for every kernel and configuration; of one architecture if `only` names it."""
    found: dict[str, tuple[Launch, int]] = {}
    seen = set()
    asked = [arch for arch in ARCHITECTURES if f"sm_{arch}" in only.split()] or ARCHITECTURES
    for name, once in CALLS.items():
        for short, dtype in DTYPES.items():
            for arch in asked:
                if arch == 86 and not name.startswith(ON_86):
                    continue
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


def _start(cache: str, only: str) -> None:
    knobs.cache.dir = cache
    _found.update(launches(only))


def _needs_of(label: str) -> dict[str, Any]:
    return needs(*_found[label])


def table(cache: Path, only: str = "", jobs: int = 1, one: bool = False) -> dict[str, dict[str, Any]]:
    """The needs of every kernel whose label has all the words of `only`; of the first configuration if `one`."""
    there = {label: launch for label, (launch, _) in launches(only).items() if set(only.split()) <= set(label.split())}
    first = {launch.name: label for label, launch in reversed(there.items())}
    labels = [label for label, launch in there.items() if not one or first[launch.name] == label]
    with get_context("spawn").Pool(jobs, _start, (str(cache), only)) as pool:
        return dict(zip(labels, pool.imap(_needs_of, labels), strict=True))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.proof.compile", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", metavar="WORDS", help='as in "rms_norm._fwd_kernel sm_80": all of these')
    parser.add_argument("--one", action="store_true", help="the first configuration of every kernel")
    parser.add_argument("--needs", action="store_true", help=f"{', '.join(NEEDS)} alone: the table of another Triton")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (one for each core)")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "minilora/compile"
    parser.add_argument("--cache", type=Path, default=cache, metavar="DIR", help=f"compiled kernels ({cache})")
    args = parser.parse_args(argv)
    rows = table(args.cache, args.only, args.jobs, args.one)
    shown = {name: {key: row[key] for key in NEEDS} if args.needs else row for name, row in rows.items()}
    lines = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in shown.items()]
    print(f'{{"triton": "{triton.__version__}", "kernels": {{', ",\n".join(lines), "}}", sep="\n")
    for name, row in rows.items():
        pipes = ", ".join(f"{pipe} {n}" for pipe, n in row["cycles"].items() if n)
        print(
            f"{name}: {row['registers']} registers, {row['blocks']} blocks, bound by {row['bound']} (cycles: {pipes})",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
