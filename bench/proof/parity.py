"""Every operation on this device against fp64: outputs, every gradient, the same bits twice, and dropout's bits.

    python -m bench.proof.parity [--dtypes bfloat16 float16 float32] [--only WORD ...] [--toy] [--jobs N] [--save FILE.json]

The rule is that of the tests (bench/proof/rule.py): an error may be twice that of plain torch in the same dtype, plus 1e-6 of the
scale. Sizes are ragged, and those of Qwen2.5-0.5B and 7B, ChatGLM-6B and GLM-4-9B; --toy leaves the ragged ones. Each
operation runs on its kernels; those with another path on the same device run on that too. Exit code 1 where one is wrong.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from bench import operations as ops
from bench.figures import Figures
from bench.operations import Entry, Operation, both_ways, leaves, outputs, present
from bench.proof.rule import allowed, distance
from bench.roof import machine
from bench.shapes import MODELS
from bench.workers import Row, in_workers, lost, work
from minilora.kernels import cross_entropy, dequantize, linear_cross_entropy, lora_gemm
from minilora.kernels.dispatch import kernels_enabled, use_gemm, use_triton
from minilora.kernels.dropout import DropoutKey, dropout_mask_ref
from minilora.kernels.fp8_blocks import FP8Weight
from minilora.kernels.int8_rows import Int8Weight
from minilora.kernels.lora_linear import lora_linear
from minilora.kernels.nf4 import NF4Weight

DTYPES = ("bfloat16", "float16", "float32")
KEY = DropoutKey(7, 3, 1, 11)


def one_pass() -> AbstractContextManager[Any]:
    """Single layers by the kernel that makes x A^T inside its main loop, whatever the rule says of those without dropout."""
    return patch.object(lora_gemm, "single_pass_wins", lambda place, sizes, rates: len(sizes) == 1 and not any(rates))


def two_passes() -> AbstractContextManager[Any]:
    return patch.object(lora_gemm, "single_pass_wins", lambda *_: False)


# ways to run what the kernels of an operation can do
PATHS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "": nullcontext,
    "one pass": one_pass,
    "two passes": two_passes,
    "library": partial(use_gemm, "library"),
    "two steps": lambda: patch.object(dequantize, "ROWS_IN_THE_LOOP", 0),
    "kernels off": partial(kernels_enabled, False),
}


class Check(NamedTuple):
    """An operation at a size, on a path."""

    entry: Entry
    path: str = ""

    @property
    def name(self) -> str:
        return self.entry.name + (f" ({self.path})" if self.path else "")


def in_parts(entry: Entry) -> Entry:
    """A loss over rows as four losses of a quarter each: the error of one number may be small by luck."""

    def make(dtype: torch.dtype, device: torch.device) -> Operation:
        made = entry.make(dtype, device)

        def parts(function: Callable[..., Any]) -> Callable[..., Any]:
            def each(*args: Any) -> Tensor:
                (*inputs, targets), rows = args, args[0].shape[0]
                bounds = [rows * i // 4 for i in range(5)]
                found = []
                for start, end in pairwise(bounds):
                    own = [inputs[0][start:end], *inputs[1:], targets[start:end]]
                    found += outputs(function(*own))
                return torch.stack(found)

            return each

        return made._replace(op=parts(made.op), ref=parts(made.ref), peers={})

    return Entry(entry.op, entry.where, make)


def scaled_loss(rows: int, vocab: int) -> Entry:
    """The gradient made in the forward for a scale known there; rounded once if nothing else multiplies the loss."""
    plain = ops.loss(rows, vocab)

    def make(dtype: torch.dtype, device: torch.device) -> Operation:
        made = plain.make(dtype, device)
        return made._replace(args=(*made.args, torch.tensor(0.37, device=device)), ones=True)

    return Entry("cross_entropy", plain.where + ", scale known", make)


def masked_linear_loss(rows: int, width: int, vocab: int, trained: tuple[int, ...]) -> Entry:
    """With rows of no target among the others, in chunks of a third of the rows."""
    plain = ops.linear_loss(rows, width, vocab, trained)

    def make(dtype: torch.dtype, device: torch.device) -> Operation:
        made = plain.make(dtype, device)
        x, head, targets = made.args
        targets[1::5] = cross_entropy.IGNORED
        chunked = partial(linear_cross_entropy.linear_cross_entropy, chunk_rows=max(1, rows // 3))
        return made._replace(op=chunked, args=(x, head, targets))

    return Entry(plain.op, plain.where + ", some masked", make)


def expanded(entry: Entry) -> Entry:
    """Its first argument as one row that stands for all."""

    def make(dtype: torch.dtype, device: torch.device) -> Operation:
        made = entry.make(dtype, device)
        return made._replace(args=(made.args[0][:1].expand_as(made.args[0]), *made.args[1:]))

    return Entry(entry.op, entry.where + ", expanded", make)


def ragged() -> Iterator[Check]:
    """Sizes that no tile divides; quick also on Triton's interpreter."""
    yield Check(ops.norm(37, 101, (0, 1)))
    yield Check(ops.norm(37, 101, (0, 1), once=True, offset=1.0))
    yield Check(ops.norm(601, 3, (0, 1)))
    yield Check(expanded(ops.norm(19, 101, (0, 1))))
    yield Check(ops.add_norm(37, 101, (0, 1, 2)))
    yield Check(ops.add_norm(37, 101, (0, 1), once=True))
    yield Check(ops.rotate(37, 3, 26))
    yield Check(ops.rotate(19, 3, 36, 18, True))
    yield Check(ops.turn_sections(19, 3, 40))
    yield Check(ops.gate(13, 101))
    yield Check(ops.gate_fused(13, 101))
    for path in ("one pass", "two passes", "library"):
        yield Check(ops.linear("odd", 35, 37, 53, 3), path)
        yield Check(ops.linear("even", 35, 48, 80, 17), path)
    # widths that are no multiple of 16 are the library's on a GPU, whose masks are others
    for path in ("two passes", "library"):
        yield Check(ops.linear("even", 35, 48, 80, 17, 0.2), path)
    yield Check(expanded(ops.linear("odd", 35, 37, 21, 5)))
    yield Check(ops.group("odd", 35, 37, (53, 7, 7)))
    yield Check(ops.group("even", 35, 48, (80, 16, 16), (1, 0, 17), 0.2))
    for form in (NF4Weight, Int8Weight, FP8Weight):
        yield Check(ops.quantized("even", form, 35, 192, (80, 16), 0.2))
        yield Check(ops.quantized("even", form, 35, 192, (80, 16), 0.2), "two steps")
        yield Check(ops.quantized("even", form, 3, 192, (80,)))
    yield Check(ops.dual(35, 37, 35, 3))
    yield Check(ops.dual(35, 48, 80, 3, 0.2))
    yield Check(ops.dual(35, 48, 80, 3, 0.2, fused=True))
    yield Check(ops.mlp(35, 37, 53, 3))
    yield Check(ops.mlp(35, 48, 80, 17, 0.2))
    yield Check(ops.mlp(35, 48, 80, 3, 0.2, joined=True))
    yield Check(ops.attend((5, 1, 13), 4, 2, 16))
    yield Check(ops.attend((5, 1, 13), 4, 2, 16, window=4))
    yield Check(ops.attend((5, 2, 13), 4, 4, 16, prefix=3))
    yield Check(in_parts(ops.loss(24, 131)))
    yield Check(scaled_loss(12, 131))
    yield Check(in_parts(ops.linear_loss(24, 37, 131)))
    yield Check(masked_linear_loss(24, 37, 131, (0, 1)))
    yield Check(masked_linear_loss(24, 48, 144, (0, 1)))
    yield Check(in_parts(ops.linear_loss(24, 48, 144)), "library")


def real() -> Iterator[Check]:
    """Sizes of models, with a number of tokens that no tile divides."""
    m = 1031
    small, wide, glm6, glm9 = (MODELS[name] for name in ("qwen2.5-0.5b", "qwen2.5-7b", "chatglm-6b", "glm-4-9b"))
    for s in (small, wide):
        yield Check(ops.norm(m, s.width))
        yield Check(ops.norm(m, s.width, (0, 1)))
        yield Check(ops.add_norm(m, s.width))
        yield Check(ops.rotate(m, s.heads, s.head_size))
        yield Check(ops.gate(m, s.ffn))
        yield Check(ops.group("q, k, v", m, s.width, (s.query, s.kv, s.kv)))
        yield Check(ops.group("gate, up", m, s.width, (s.ffn, s.ffn)))
        yield Check(ops.linear("o", m, s.query, s.width))
        yield Check(ops.linear("down", m, s.ffn, s.width))
        yield Check(ops.dual(m, s.width, s.ffn))
        yield Check(ops.mlp(m, s.width, s.ffn))
        yield Check(ops.attend((400, 1, 630), s.heads, s.kv_heads, s.head_size))
        yield Check(in_parts(ops.loss(m, s.vocab)))
        yield Check(in_parts(ops.linear_loss(m, s.width, s.vocab)))
    s = small
    yield Check(ops.norm(m * s.heads, 128, (0, 1)))
    yield Check(ops.norm(m, 8192, (0, 1)))
    for r in (8, 32, 64, 70, 128):
        yield Check(ops.linear("o", m, s.query, s.width, r))
    for path in ("one pass", "two passes", "library", "kernels off"):
        yield Check(ops.linear("k", m, s.width, s.kv), path)
    yield Check(ops.linear("down", m, s.ffn, s.width, p=0.1))
    yield Check(ops.group("q, k, v", m, s.width, (s.query, s.kv, s.kv), p=0.1))
    yield Check(ops.group("q, k, v", m, s.width, (s.query, s.kv, s.kv), (16, 0, 8)))
    yield Check(ops.dual(m, s.width, s.ffn, p=0.1))
    for form in (NF4Weight, Int8Weight, FP8Weight):
        for rows in (1, 259, m):
            yield Check(ops.quantized("q, k, v", form, rows, wide.width, (wide.query, wide.kv, wide.kv)))
    yield Check(ops.mlp(m, s.width, s.ffn, 70, 0.1))
    for path in ("library", "kernels off"):
        yield Check(ops.mlp(m, s.width, s.ffn), path)
    yield Check(scaled_loss(m, s.vocab))
    yield Check(masked_linear_loss(m, s.width, s.vocab, (0, 1)))
    yield Check(in_parts(ops.linear_loss(m, s.width, s.vocab)), "library")
    yield Check(ops.norm(m, glm9.width, once=True))
    yield Check(ops.add_norm(m, glm9.width, once=True))
    yield Check(ops.rotate(m, glm9.heads, glm9.head_size, 64, True))
    yield Check(ops.gate_fused(m, glm9.ffn))
    yield Check(ops.linear("gate and up", m, glm9.width, 2 * glm9.ffn))
    yield Check(ops.dual(m, glm9.width, glm9.ffn, fused=True))
    yield Check(ops.mlp(m, glm9.width, glm9.ffn, joined=True))
    yield Check(ops.turn_sections(m, glm6.heads, glm6.head_size))
    yield Check(ops.linear("q, k, v", m, glm6.width, 3 * glm6.query))
    yield Check(ops.attend((400, 2, 629), glm6.heads, glm6.kv_heads, glm6.head_size, prefix=300))
    yield Check(ops.attend((400, 1, 630), 8, 2, 64, window=128))


def dropout_bits(rows: int, size: int, p: float, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether y and dX show the masks of the reference: W is 0, A and B are 1 on the diagonal, x and dY ones."""
    eye = torch.eye(size, device=device)
    x = torch.ones(rows, size, dtype=dtype, device=device, requires_grad=True)
    with two_passes():
        y = lora_linear(x, torch.zeros(size, size, dtype=dtype, device=device), None, eye, eye, 1.0, p, KEY)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    mask = dropout_mask_ref((rows, size), p, KEY, device)
    return torch.equal(y != 0, mask) and torch.equal(dx != 0, mask)


def compare(operation: Operation, path: str) -> Row:
    """The worst of all outputs and gradients by the rule, and whether a second call gives the same bits."""
    with PATHS[path]():
        dys = ops.upstream(operation)
        before = [a.clone() if isinstance(a, Tensor) else a for a in operation.args]
        ours = both_ways(operation.op, leaves(operation), dys)
        with repeatable(operation):
            first, second = (both_ways(operation.op, leaves(operation), dys) for _ in range(2))
    kept = all(torch.equal(a, b) for a, b in zip(before, operation.args, strict=True) if isinstance(a, Tensor))
    same = all(torch.equal(a, b) for a, b in zip(present(first), present(second), strict=True))
    plain = present(both_ways(operation.plain or operation.ref, leaves(operation), dys))
    truth = present(both_ways(operation.ref, leaves(operation, wide=True), dys))
    ours = present(ours)
    count = len(truth) - len(operation.trained)
    worst: Row = {"of the allowed": 0.0}
    # a gradient that is zero by cancellation, as through a softmax over one key, is rounding of the others
    scale = max((float(t.abs().max()) for t in truth[count:]), default=0.0)
    for i, (o, y, t) in enumerate(zip(ours, plain, truth, strict=True)):
        wrong, most = distance(o, t), allowed(y, t, scale if i >= count else 0.0)
        share = wrong / most if most else math.inf if wrong else 0.0
        if not share <= worst["of the allowed"]:
            what = f"output {i}" if i < count else f"gradient of argument {operation.trained[i - count]}"
            worst = {"of the allowed": share, "at": what, "error": wrong, "allowed": most}
        if o.dtype != y.dtype or o.shape != y.shape:
            worst = {"of the allowed": math.inf, "at": f"{i}: {o.dtype} {list(o.shape)}"}
    worst["of the allowed"] = round(worst["of the allowed"], 3) if worst["of the allowed"] < math.inf else 1e9
    ok = worst["of the allowed"] <= 1 and same and kept
    return {"ok": ok, **worst, "same bits twice": same, "inputs untouched": kept}


@contextmanager
def repeatable(operation: Operation) -> Iterator[None]:
    """torch's own attention adds up its gradients in any order unless it is told not to."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or operation.plain is not None)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def checks(toy: bool, dtypes: list[str], device: torch.device) -> dict[str, Callable[[bool], Row]]:
    """By name: what runs the check, alone (launches and nothing to compare with) or in full."""
    found: dict[str, Callable[[bool], Row]] = {}

    def of(check: Check, dtype: torch.dtype) -> Callable[[bool], Row]:
        def run(alone: bool) -> Row:
            torch.manual_seed(0)
            operation = check.entry.make(dtype, device)
            if not alone:
                return compare(operation, check.path)
            with PATHS[check.path]():  # nothing but our kernels runs: not even a reference for the shapes
                both_ways(operation.op, leaves(operation), ops.upstream(operation._replace(plain=operation.op)))
            return {"ok": True}

        return run

    def bits(*args: Any) -> Callable[[bool], Row]:
        return lambda alone: {"ok": dropout_bits(*args)}

    some = list(ragged()) + ([] if toy else list(real()))
    for name in dtypes:
        dtype = getattr(torch, name)
        found |= {f"{c.name}, {name}": of(c, dtype) for c in some}
        if use_triton(torch.empty(0, device=device)) and (device.type == "cpu" or dtype.itemsize == 2):
            sizes = (45, 48) if toy else (1031, 208)
            found[f"dropout bits, {name}"] = bits(*sizes, 0.2, dtype, device)
    return found


HEAD = "| check | result | worst error, of the allowed | where | same bits twice | s |\n|---|---|---|---|---|---|"


def told(row: Row) -> str:
    if "failed" in row or "skipped" in row:
        return f"| {row['name']} | {lost(row)} | | | | {row.get('spent', '')} |"
    result = "ok" if row["ok"] else "**wrong**"
    twice = {True: "yes", False: "**no**"}.get(row.get("same bits twice", ""), "")
    return f"| {row['name']} | {result} | {row.get('of the allowed', '')} | {row.get('at', '')} | {twice} | {row['spent']} |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="checks whose name has one of these words")
    parser.add_argument("--toy", action="store_true", help="the ragged sizes alone")
    parser.add_argument("--alone", action="store_true", help="launch, and compare with nothing (for a sanitizer)")
    parser.add_argument("--jobs", type=int, default=max(1, min(6, (os.cpu_count() or 2) // 2)) if on_gpu else 1)
    parser.add_argument("--seconds", type=float, default=1e9, help="what is not done by then is skipped")
    parser.add_argument("--save", metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--names", nargs="+", help=argparse.SUPPRESS)  # of a worker
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    # torch's deterministic algorithms ask cuBLAS for this
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = torch.device(args.device)
    known = checks(args.toy, args.dtypes, device)
    if args.lines:
        return work(args.names or list(known), lambda name: known[name](args.alone), args.lines)
    names = [n for n in known if not args.only or any(word in n for word in args.only)]
    command = [sys.executable, "-m", "bench.proof.parity", "--device", args.device, "--dtypes", *args.dtypes]
    command += ["--toy"] * args.toy + ["--alone"] * args.alone
    figures = Figures(machine(device), [HEAD], told, args.save)
    rows = in_workers(command, names, args.jobs, args.seconds, figures.add)
    good = sum(row.get("ok", False) for row in rows.values())
    skipped = sum("skipped" in row for row in rows.values())
    print(f"\n{good} of {len(rows)} hold, {skipped} skipped, {len(rows) - good - skipped} wrong or failed")
    raise SystemExit(0 if good + skipped == len(rows) else 1)


if __name__ == "__main__":
    main()
