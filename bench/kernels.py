"""Every operation at the shapes of real models, beside its reference, torch.compile and the formulations of others.

    python -m bench.kernels [--models qwen2.5-0.5b ...] [--ops rms_norm ...] [--tokens 8192] [--save FILE.json]

All sides of a row are timed in turn, forward alone and forward with backward: medians, and the 20th and 80th percentile. TFLOP/s
and GB/s are of what the operation needs at least, so a side that moves more shows less; the share is of the roof that binds. The
error is the largest difference from fp64, relative to the largest value; memory is the peak beyond the arguments. Without a GPU
the CPU paths run, and for a GPU only arithmetic is printed: bytes and operations, and the bound of the data sheet.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import formulations as others
from bench.roof import CARDS, Roof, machine, roof
from bench.shapes import MODELS, Shape
from bench.timing import Times, in_turn, peak_bytes
from bench.traffic import lora_layer
from minilora.kernels import (
    cross_entropy,
    linear_cross_entropy,
    lora_linear,
    rms_norm,
    rope,
    swiglu,
)
from minilora.kernels.dispatch import force, use_triton
from minilora.kernels.lang import HAVE_TRITON

RANK = 16


class Case(NamedTuple):
    """One row of the table: the arguments, which of them are trained, the sides, and what a perfect kernel needs."""

    op: str
    where: str
    args: tuple[Any, ...]
    trained: tuple[int, ...]
    ref: Callable[..., Any]
    sides: dict[str, Callable[..., Any]]
    cost: dict[str, float]


def cases(model: str, shape: Shape, m: int, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """The operations of one layer and the loss, at the sizes of a model and m tokens."""
    liger = others.liger()

    def case(op: str, module: Any, where: str, sizes: tuple[int, ...], trained: tuple[int, ...], **peers: Any) -> Case:
        args, cost = module.example(*sizes, dtype, device)
        ours, ref = getattr(module, op), getattr(module, op + "_ref")
        sides = {"minilora": ours}
        if use_triton(*(a for a in args if isinstance(a, Tensor))):
            sides["minilora, torch path"] = without_triton(ours)
        sides |= {"torch.compile": others.compiled(ref), **peers}
        sides |= {"liger": liger[op]} if op in liger else {}
        return Case(op, f"{model} {where}", args, trained, ref, sides, cost)

    s, peft = shape, {"peft": others.peft_linear, "peft 16 bit": others.peft_linear_16bit}
    yield case("rms_norm", rms_norm, f"{m} x {s.width}", (m, s.width), (0,), hf=others.hf_rms_norm)
    yield case("rope", rope, f"{m} x {s.heads} x {s.head_size}", (m, s.heads, s.head_size), (0,), hf=others.hf_rope)
    yield case("swiglu", swiglu, f"{m} x {s.ffn}", (m, s.ffn), (0, 1), hf=others.hf_swiglu)
    for name, k, n in (("o", s.query, s.width), ("gate", s.width, s.ffn), ("down", s.ffn, s.width)):
        where = f"{name} {m} x {k} -> {n}, r={RANK}"
        yield case("lora_linear", lora_linear, where, (m, k, n, RANK), (0, 3, 4), **peft)
    yield case(
        "cross_entropy", cross_entropy, f"{m // 4} x {s.vocab}", (m // 4, s.vocab), (0,), hf=others.hf_cross_entropy
    )
    losses = {"hf": others.hf_linear_cross_entropy}
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        losses["torch"] = others.torch_linear_cross_entropy
    where = f"{m // 2} x {s.width} x {s.vocab}"
    yield case("linear_cross_entropy", linear_cross_entropy, where, (m // 2, s.width, s.vocab), (0,), **losses)


def without_triton(op: Callable[..., Any]) -> Callable[..., Any]:
    def torch_path(*args: Any) -> Any:
        with force(False):
            return op(*args)

    return torch_path


def leaves(case: Case) -> list[Any]:
    return [
        a.detach().requires_grad_(i in case.trained) if isinstance(a, Tensor) and a.is_floating_point() else a
        for i, a in enumerate(case.args)
    ]


def both_ways(side: Callable[..., Any], args: list[Any]) -> Callable[[], Any]:
    """Forward and backward, with the gradients taken but not added to anything."""
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]

    def call() -> list[Tensor]:
        out = first(side(*args))
        return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]

    return call


def first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def error(found: list[Tensor], truth: list[Tensor]) -> float:
    """The largest difference relative to the largest value, over output and gradients."""
    return max(
        float((f.double() - t).abs().max() / t.abs().max().clamp_min(1e-30)) for f, t in zip(found, truth, strict=True)
    )


def measure(case: Case, device: torch.device, rounds: int) -> dict[str, dict[str, Any]]:
    """Times, memory and error of each side."""
    args = leaves(case)
    wide = [
        a.detach().double().requires_grad_(a.requires_grad) if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in args
    ]
    truth = both_ways(case.ref, wide)()
    calls = {name: both_ways(side, args) for name, side in case.sides.items()}
    result: dict[str, dict[str, Any]] = {}
    for name, call in list(calls.items()):
        try:
            found = call()
        except Exception as problem:
            if name.startswith("minilora"):
                raise
            result[name] = {"failed": f"{type(problem).__name__}: {problem}".splitlines()[0][:100]}
            del calls[name]
            continue
        result[name] = {"error": error(found, truth), "peak": peak_bytes(call, device)}
        del found
    with torch.no_grad():
        forwards = in_turn({n: lambda n=n: case.sides[n](*args) for n in calls}, device, rounds)
    both = in_turn(calls, device, rounds)
    for name in calls:
        result[name] |= {"forward": forwards[name], "both": both[name]}
    return result


def table(case: Case, result: dict[str, dict[str, Any]], top: Roof) -> list[str]:
    """The lines of a case in Markdown."""
    flops = case.cost.get("flops", 0) + case.cost.get("backward_flops", 0)
    size = case.cost.get("bytes", 0) + case.cost.get("backward_bytes", 0)
    bound = top.bound(flops, size)
    mine, lines = result["minilora"]["both"].median, []
    for name, r in result.items():
        if "failed" in r:
            lines.append(f"| {case.op} {case.where} | {name} | {r['failed']} | | | | | | |")
            continue
        t: Times = r["both"]
        lines.append(
            f"| {case.op} {case.where} | {name} | {milliseconds(r['forward'])} | {milliseconds(t)} | {t.median / mine:.2f} "
            f"| {flops / t.median / 1e12:.2f} | {size / t.median / 1e9:.1f} | {bound / t.median:.0%} "
            f"| {r['peak'] / 1e6:.1f} | {r['error']:.1e} |"
        )
    return lines


HEAD = (
    "| operation | side | forward, ms (20 to 80 %) | with backward, ms | time / ours | TFLOP/s | GB/s | of the roof "
    "| peak MB | error |\n|" + "---|" * 10
)


def milliseconds(t: Times) -> str:
    return f"{t.median * 1e3:.3g} ({t.low * 1e3:.3g} to {t.high * 1e3:.3g})"


def arithmetic(m: int) -> str:
    """What no measurement here backs: bytes and bounds of one layer's LoRA linears on cards, labelled as arithmetic."""
    lines = [
        f"Arithmetic, not measured: LoRA on all linears of one layer, {m} tokens, rank {RANK}, 16 bit, on data-sheet peaks",
        "", "| model | formulation | forward GB | backward GB | TFLOP | " + " | ".join(f"{c} bound, ms" for c in CARDS) + " |",
        "|" + "---|" * (5 + len(CARDS)),
    ]  # fmt: skip
    for model, shape in MODELS.items():
        sides = lora_layer(shape, m, RANK)
        if HAVE_TRITON:
            from bench import layer_bytes  # asks triton for the launches

            sides["minilora"] = layer_bytes.layer(shape, m, RANK)["layer"]["minilora"]
        for name, cost in sides.items():
            bounds = " | ".join(
                f"{(c.bound(cost.flops, cost.bytes) + c.bound(cost.backward_flops, cost.backward_bytes)) * 1e3:.2f}"
                for c in CARDS.values()
            )
            lines.append(
                f"| {model} | {name} | {cost.bytes / 1e9:.3f} | {cost.backward_bytes / 1e9:.3f} "
                f"| {cost.total_flops / 1e12:.2f} | {bounds} |"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument(
        "--models", nargs="+", choices=list(MODELS), default=list(MODELS) if on_gpu else ["qwen2.5-0.5b"]
    )
    parser.add_argument("--ops", nargs="+", help="only these operations")
    parser.add_argument("--tokens", type=int, default=8192 if on_gpu else 512)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--rounds", type=int, default=20 if on_gpu else 7)
    parser.add_argument("--save", metavar="FILE", help="write the figures as JSON, and the tables beside it as .md")
    args = parser.parse_args(argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    top, rows, lines = roof(device, dtype), [], [HEAD]
    for model in args.models:
        for case in cases(model, MODELS[model], args.tokens, dtype, args.device):
            if args.ops and case.op not in args.ops:
                continue
            result = measure(case, device, args.rounds)
            rows.append({"op": case.op, "where": case.where, "cost": case.cost, "sides": result})
            lines += table(case, result, top)
            print("\n".join(lines[:1] + lines[-len(result) :] if len(rows) == 1 else lines[-len(result) :]), flush=True)
    lines = [f"Roof: {top}", "", *lines, "", arithmetic(8192)]
    print("\n" + lines[0] + "\n\n" + lines[-1])
    if args.save:
        about = machine(device) | {"dtype": args.dtype, "tokens": args.tokens, "rounds": args.rounds}
        Path(args.save).write_text(json.dumps({"machine": about, "roof": top._asdict(), "rows": rows}, indent=1) + "\n")
        Path(args.save).with_suffix(".md").write_text("\n".join([json.dumps(about), "", *lines]) + "\n")


if __name__ == "__main__":
    main()
