"""Every operation at the shapes of real models, beside its reference, torch.compile and the formulations of others.

    python -m bench.kernels [--models qwen2.5-0.5b ...] [--only WORD ...] [--tokens 8192] [--compile] [--save FILE.json]

All sides of a row are timed in turn, forward alone and forward with backward: medians, and the 20th and 80th percentile. TFLOP/s
and GB/s are of what the operation needs at least, so a side that moves more shows less; the share is of the roof that binds. The
error is the largest difference from fp64, relative to the largest value; memory is the peak beyond the arguments. On a GPU times
are those of the GPU's work, launches queued beforehand. Without one the CPU paths run, and for cards only arithmetic is printed:
bytes and operations of ours, of others and the least (bench/proof/counted.py), and the bound of the data sheet.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bench import formulations as others
from bench.figures import Figures
from bench.operations import Entry, Operation, both_ways, leaves, of_model, present, upstream
from bench.proof.counted import arithmetic
from bench.proof.rule import distance
from bench.roof import Roof, machine, roof
from bench.shapes import MODELS, TOY, Shape
from bench.timing import Times, in_turn, peak_bytes
from bench.workers import Row, in_workers, lost, reason, work
from minilora.kernels import dequantize
from minilora.kernels.dispatch import kernels_enabled, use_gemm, use_triton
from minilora.kernels.quantized import QuantizedWeight

SHAPES = {**MODELS, "toy": TOY}
OURS = "minilora"


def entries(models: list[str], tokens: int) -> dict[str, tuple[str, Entry]]:
    """(model, operation at its sizes) by the name of the row."""
    found = {}
    for model in models:
        shape: Shape = SHAPES[model]
        found |= {f"{model}: {entry.name}": (model, entry) for entry in of_model(model, shape, tokens)}
    return found


def sides(operation: Operation, name: str, compile_too: bool, device: torch.device) -> dict[str, Callable[..., Any]]:
    """What computes the operation: ours first."""
    found: dict[str, Callable[..., Any]] = {OURS: operation.op}
    if use_triton(torch.empty(0, device=device)):
        found[f"{OURS}, kernels off"] = inside(lambda: kernels_enabled(False), operation.op)
        if name.startswith(("lora_", "linear_cross")):
            found[f"{OURS}, library GEMM"] = inside(partial(use_gemm, "library"), operation.op)
        if any(isinstance(a, QuantizedWeight) for a in operation.args):
            for way, rows in (("in the loop", 1 << 30), ("two steps", 0)):
                found[f"{OURS}, {way}"] = inside(
                    partial(patch.object, dequantize, "ROWS_IN_THE_LOOP", rows), operation.op
                )
    if compile_too:
        found["torch.compile"] = others.compiled(operation.plain or operation.ref)
    return {**found, "reference": operation.plain or operation.ref, **operation.peers}


def inside(context: Callable[[], Any], op: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with context():
            return op(*args)

    return call


def private(args: list[Any]) -> list[Any]:
    """Arguments that no other side reads."""
    return [a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args]


def error(found: list[torch.Tensor | None], truth: list[torch.Tensor | None]) -> float:
    """The largest difference relative to the largest value, over outputs and gradients."""
    pairs = zip(present(found), present(truth), strict=True)
    return max(distance(f, t) / max(float(t.abs().max()), 1e-30) for f, t in pairs)


def measure(operation: Operation, name: str, device: torch.device, rounds: int, compile_too: bool) -> dict[str, Any]:
    """Times, memory and error of each side; a side that fails says why."""
    args, dys = leaves(operation), upstream(operation)
    truth = both_ways(operation.ref, leaves(operation, wide=True), dys)
    wanted = sides(operation, name, compile_too, device)
    given = {side: private(args) if (name, side) in others.OVERWRITES else args for side in wanted}
    calls = {side: lambda side=side: both_ways(wanted[side], given[side], dys) for side in wanted}
    result: dict[str, Any] = {}
    for side, call in list(calls.items()):
        try:
            wrong = None if side == others.BARE else error(call(), truth)
            result[side] = {"error": wrong, "peak": peak_bytes(call, device)}
        except Exception as problem:  # noqa: BLE001  the other sides have their figures all the same
            result[side] = {"failed": reason(problem)}
            del calls[side]
    del truth
    with torch.no_grad():
        forwards = in_turn({side: lambda side=side: wanted[side](*given[side]) for side in calls}, device, rounds)
    both = in_turn(calls, device, rounds) if operation.trained else forwards
    for side in calls:
        result[side] |= {"forward": forwards[side], "both": both[side]}
    return result


HEAD = (
    "| operation | side | forward, ms (20 to 80 %) | with backward, ms | time / ours | TFLOP/s | GB/s | of the roof "
    "| peak MB | error |\n|" + "---|" * 10
)


def told(row: Row, top: Roof) -> str:
    """The lines of a row in Markdown."""
    if "sides" not in row:
        return f"| {row['name']} | {lost(row)} |" + " |" * 8
    flops, size = row["flops"] + row["backward_flops"], row["bytes"] + row["backward_bytes"]
    mine, lines = row["sides"].get(OURS, {}).get("both"), []
    for side, r in row["sides"].items():
        if "failed" in r:
            lines.append(f"| {row['name']} | {side} | {lost(r)} |" + " |" * 7)
            continue
        forward, t = Times(*r["forward"]), Times(*r["both"])
        wrong = "" if r["error"] is None else f"{r['error']:.1e}"
        against = f"{t.median / mine[0]:.2f}" if mine else ""
        lines.append(
            f"| {row['name']} | {side} | {milliseconds(forward)} | {milliseconds(t)} | {against} "
            f"| {flops / t.median / 1e12:.3g} | {size / t.median / 1e9:.3g} | {top.bound(flops, size) / t.median:.1%} "
            f"| {r['peak'] / 1e6:.1f} | {wrong} |"
        )
    return "\n".join(lines)


def milliseconds(t: Times) -> str:
    return f"{t.median * 1e3:.3g} ({t.low * 1e3:.3g} to {t.high * 1e3:.3g})"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(MODELS) if on_gpu else ["qwen2.5-0.5b"])
    parser.add_argument("--only", nargs="+", metavar="WORD", help="rows whose name has one of these words")
    parser.add_argument("--tokens", type=int, default=8192 if on_gpu else 256)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--rounds", type=int, default=20 if on_gpu else 5)
    parser.add_argument("--compile", action="store_true", help="torch.compile of the reference too (seconds a row)")
    parser.add_argument("--seconds", type=float, default=1e9, help="what is not done by then is skipped")
    parser.add_argument("--save", metavar="FILE", help="write the figures as JSON, and the tables beside it as .md")
    parser.add_argument("--names", nargs="+", help=argparse.SUPPRESS)  # of a worker
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    known = entries(args.models, args.tokens)

    def case(name: str) -> Row:
        torch.manual_seed(0)
        if args.compile:
            torch.compiler.reset()  # or it gives up after a few shapes
        _, entry = known[name]
        operation = entry.make(dtype, device)
        found = measure(operation, entry.op, device, args.rounds, args.compile)
        return {"op": entry.op, **operation.cost._asdict(), "sides": found}

    if args.lines:
        return work(args.names, case, args.lines)
    top = roof(device, dtype)
    form = [f"{key}={getattr(args, key)}" for key in ("tokens", "dtype", "device", "rounds")]
    command = [sys.executable, "-m", "bench.kernels", "--models", *args.models, *(f"--{f}" for f in form)]
    names = [n for n in known if not args.only or any(word in n for word in args.only)]
    heading = [f"Roof: {top.flops / 1e12:.3g} TFLOP/s, {top.bandwidth / 1e9:.4g} GB/s ({told_of(top)})", ""]
    if device.type == "cpu":
        heading += [arithmetic({model: SHAPES[model] for model in args.models}, 8192), ""]
    about = machine(device) | {"dtype": args.dtype, "tokens": args.tokens, "rounds": args.rounds, "roof": top._asdict()}
    figures = Figures(about, [*heading, HEAD], lambda row: told(row, top), args.save)
    in_workers(command + ["--compile"] * args.compile, names, 1, args.seconds, figures.add)


def told_of(top: Roof) -> str:
    return f"{top.device}, " + ("measured here" if top.measured else "its data sheet")


if __name__ == "__main__":
    main()
