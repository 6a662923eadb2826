"""Bytes by counting: what an operation of ours, or a formulation of others, reads and writes, on tensors without data.

Of ours the launches are recorded (bench/proof/launches.py), and torch's operations around them; of the others torch's operations
alone, run one by one as eager torch does. Every tensor counts once for each launch that reads or writes it, twice where it
does both; views move nothing, and rows without a target count though nothing reads them. So this is what a formulation asks of the memory if every launch finds the cache cold, and
says nothing of how well a kernel does it. Arithmetic, no measurement.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.formulations import BARE
from bench.operations import Operation, leaves, of_model, outputs
from bench.roof import CARDS
from bench.shapes import Shape
from minilora.kernels import linear_cross_entropy
from minilora.kernels.lang import HAVE_TRITON, INTERPRETED
from minilora.kernels.quantized import QuantizedWeight

ARCHITECTURE = 90
# kernels that write where they read; and those that read single rows of a matrix (the argument, and the one that counts them)
IN_PLACE = {
    "linear_cross_entropy._softmax_kernel": "logits_ptr",
    "linear_cross_entropy._dhead_kernel": "dhead_ptr",
    "cross_entropy._rescale_kernel": "x_ptr",
}
ROWS_OF = {"linear_cross_entropy._softmax_kernel": ("head_ptr", "x_ptr")}
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "alias"}


class Moved(TorchDispatchMode):
    """Adds up the bytes of what torch's operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__ not in FREE:
            read = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            written = {id(t): t for t in tree_leaves(out) if isinstance(t, Tensor)}
            self.bytes += sum(map(size, read.values())) + sum(map(size, written.values()))
        return out


def size(t: Tensor) -> int:
    """Bytes of the memory behind a tensor; what is expanded is there once."""
    count = 1
    for n, stride in zip(t.shape, t.stride(), strict=True):
        count *= n if stride else 1
    return count * t.element_size()


def of_launch(launch: Any) -> int:
    """Bytes of the tensors that a kernel is given."""
    given = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.options
    found: dict[tuple[Any, ...], int] = {}
    for name, value in given.items():
        for t in value if isinstance(value, tuple) else (value,):
            if isinstance(t, Tensor):
                times = 2 if IN_PLACE.get(launch.name) == name else 1
                found[place(t)] = times * size(t)
    if launch.name in ROWS_OF:
        table, rows = (given[name] for name in ROWS_OF[launch.name])
        found[place(table)] = size(rows)
    return sum(found.values())


def place(t: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies: one that a launch is given twice moves once."""
    return t.untyped_storage()._cdata, t.storage_offset(), t.shape


def without_data(a: Any) -> Any:
    if isinstance(a, QuantizedWeight):
        return deepcopy(a).to("meta")
    return a.detach().to("meta") if isinstance(a, Tensor) else a


def moved(side: Callable[..., Any], operation: Operation, ours: bool) -> tuple[int, int]:
    """Bytes of the forward and of the backward of a side, on the operation's arguments without data."""
    from bench.proof.launches import recorded

    args = [without_data(a) for a in leaves(operation)]
    for i in operation.trained:
        args[i].requires_grad_()
    inputs = [args[i] for i in operation.trained]

    def count(run: Callable[[], Any]) -> tuple[int, Any]:
        chunks = patch.object(linear_cross_entropy, "CHUNK_ROWS", linear_cross_entropy.CHUNK_ROWS_CUDA)
        with recorded(ARCHITECTURE) as launches, Moved() as around, chunks:
            out = run()
        return around.bytes + sum(map(of_launch, launches)), out

    if not ours:

        def count(run: Callable[[], Any]) -> tuple[int, Any]:
            with Moved() as around:
                out = run()
            return around.bytes, out

    forward, out = count(lambda: outputs(side(*args)))
    if not inputs:
        return forward, 0
    dys = [torch.empty_like(o) for o in out]
    backward, _ = count(lambda: torch.autograd.grad(out, inputs, dys, allow_unused=True))
    return forward, backward


def arithmetic(shapes: dict[str, Shape], tokens: int) -> str:
    """A table of bytes of ours, of others and the least, and the bound that the data sheets of cards set, labelled as arithmetic."""
    head = " | ".join(f"{card} bound, ms" for card in CARDS)
    lines = [
        f"Arithmetic, not measured: bytes of the launches at {tokens} tokens in bf16, and the bounds of data sheets.", "",
        f"| operation | side | forward GB | backward GB | of the least | TFLOP | {head} |", "|" + "---|" * (6 + len(CARDS)),
    ]  # fmt: skip
    if not HAVE_TRITON or INTERPRETED:
        return "The launches of GPUs are counted where triton is, and not its interpreter."
    meta = torch.device("meta")
    for model, shape in shapes.items():
        for entry in of_model(model, shape, tokens):
            if entry.op == "attention":
                continue  # torch's own, the same for all
            operation = entry.make(torch.bfloat16, meta)
            cost = operation.cost
            rows = {"the least": (cost.bytes, cost.backward_bytes), "minilora": moved(operation.op, operation, True)}
            for name, peer in operation.peers.items():
                if name not in (BARE, "liger", "torch"):
                    rows[name] = moved(peer, operation, False)
            for side, (there, back) in rows.items():
                bounds = " | ".join(
                    f"{1e3 * (c.bound(cost.flops, there) + c.bound(cost.backward_flops, back)):.3g}"
                    for c in CARDS.values()
                )
                lines.append(
                    f"| {model}: {entry.name} | {side} | {there / 1e9:.3f} | {back / 1e9:.3f} "
                    f"| {(there + back) / cost.total_bytes:.2f} | {cost.total_flops / 1e12:.2f} | {bounds} |"
                )
    return "\n".join(lines)
