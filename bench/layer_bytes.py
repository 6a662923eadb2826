"""Bytes and tensor-core work of LoRA on every linear of one decoder layer, from the launches that our operations make.

    python -m bench.layer_bytes [--tokens 8192] [--rank 16]

The launches are recorded on tensors without data (bench/launches.py). Every tensor that a launch is given moves once, which is how
peers are counted too; the tests hold this against the bytes that the kernels are seen to move on Triton's interpreter. What a GEMM without
an adapter must move, and its operations, are subtracted for the extra ones. Arithmetic, no measurement.
"""

import argparse
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.launches import Launch, recorded
from minilora.kernels.dropout import DropoutKey
from minilora.kernels.lora_linear_group import lora_linear_group
from minilora.kernels.projection import Adapter, Projection

# Qwen2.5-7B: (in-features, out-features of the linears that read the same input)
LAYER = {
    "q, k, v": (3584, (3584, 512, 512)),
    "o": (3584, (3584,)),
    "gate, up": (3584, (18944, 18944)),
    "down": (18944, (3584,)),
}


class Traffic(NamedTuple):
    """Of the frozen GEMMs alone, and what the adapters add to it."""

    forward: int  # bytes
    extra_forward: int
    backward: int
    extra_backward: int
    gemms: int  # operations of forward and backward
    extra: int


def arguments(launch: Launch) -> dict[str, Any]:
    return dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.options


def moved(launch: Launch) -> int:
    """Bytes of all tensors of a launch, each once, though it may be given twice."""
    values = [v for value in arguments(launch).values() for v in (value if isinstance(value, tuple) else (value,))]
    tensors = {(v.untyped_storage()._cdata, v.storage_offset(), v.shape): v for v in values if isinstance(v, Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def narrow_work(launch: Launch) -> int:
    """Operations of the tensor cores on the adapters' products, with what the tiles pad."""
    a = arguments(launch)
    rows, slot = a.get("rows", 0), a.get("SLOT", 0)
    return (
        2
        * rows
        * slot
        * {
            "lora_narrow._low_kernel": lambda: a["COUNT"] * a["K"],
            "lora_narrow._gradients_kernel": lambda: 2 * sum(a["ns"]),
            "lora_narrow._a_gradient_kernel": lambda: a["COUNT"] * a["K"],
            "lora_narrow._sum_kernel": lambda: 0,
            "lora_gemm._forward_kernel": lambda: sum(a["ns"]),
            "lora_gemm._input_gradient_kernel": lambda: a["ADAPTED"] * a["K"],
            "lora_gemm._single_pass_kernel": lambda: a["N"] + a["K"] * a["col_tiles"],
        }[launch.name]()
    )


def group(tokens: int, k: int, ns: tuple[int, ...], rank: int, p: float, arch: int) -> Traffic:
    """Of one group of linears on 16-bit tensors, all its inputs and adapters wanting gradients."""
    x = torch.empty(tokens, k, device="meta", dtype=torch.bfloat16, requires_grad=True)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta", requires_grad=True)

    projections = [
        Projection(
            torch.empty(n, k, device="meta", dtype=x.dtype), None,
            Adapter(empty(rank, k), empty(n, rank), 2.0, p, DropoutKey(0, 0, 0, j)),
        )
        for j, n in enumerate(ns)
    ]  # fmt: skip
    with recorded(arch) as launches:
        ys = lora_linear_group(x, projections)
        there = list(launches)
        torch.autograd.backward(ys, [torch.empty_like(y) for y in ys])
    back, n = launches[len(there) :], sum(ns)
    once = 2 * (tokens * k + k * n + tokens * n)  # x or dX, W, y or dY: the same for both ways
    return Traffic(
        once, sum(map(moved, there)) - once, once, sum(map(moved, back)) - once,
        4 * tokens * k * n, sum(map(narrow_work, launches)),
    )  # fmt: skip


def layer(tokens: int = 8192, rank: int = 16, p: float = 0.0, arch: int = 80) -> dict[str, Traffic]:
    """By group, and "layer" for their sum."""
    found = {name: group(tokens, k, ns, rank, p, arch) for name, (k, ns) in LAYER.items()}
    return found | {"layer": Traffic(*map(sum, zip(*found.values(), strict=True)))}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.layer_bytes", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    args = parser.parse_args(argv)
    print("| sm | linears | forward, GB | extra | backward, GB | extra tensor work |\n|---|---|---|---|---|---|")
    for arch in (80, 90):
        for name, t in layer(args.tokens, args.rank, args.dropout, arch).items():
            back = (t.backward + t.extra_backward) / 1e9
            print(
                f"| {arch} | {name} | {(t.forward + t.extra_forward) / 1e9:.2f} | {t.extra_forward / 1e9:.3f} "
                f"| {back:.2f} | {t.extra / t.gemms:.2%} |"
            )


if __name__ == "__main__":
    main()
