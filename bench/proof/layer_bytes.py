"""Bytes and tensor-core work of LoRA on every linear of one decoder layer, from the launches that our operations make.

    python -m bench.proof.layer_bytes [--model qwen2.5-7b] [--tokens 8192] [--rank 16] [--dropout 0]

The launches are recorded on tensors without data (bench/proof/launches.py). Every tensor that a launch is given moves once, which is how
peers are counted too; the tests hold this against the bytes that the kernels are seen to move on Triton's interpreter. Beside it
stands what other formulations move (bench/proof/traffic.py); extra is what comes on top of the frozen GEMMs. Arithmetic, no measurement.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.proof.launches import Launch, recorded
from bench.proof.traffic import Cost, lora_group
from bench.shapes import MODELS, Shape
from minilora.kernels.dropout import DropoutKey
from minilora.kernels.lora_linear import lora_linear_group
from minilora.kernels.lora_mlp import lora_mlp
from minilora.kernels.projection import Adapter, Projection


def arguments(launch: Launch) -> dict[str, Any]:
    return dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.options


def moved(launch: Launch) -> int:
    """Bytes of all tensors of a launch, each once, though it may be given twice."""
    given = [value for name, value in arguments(launch).items() if name != "seed_ptrs" or value[0].dtype == torch.int64]
    values = [v for value in given for v in (value if isinstance(value, tuple) else (value,))]
    tensors = {(v.untyped_storage()._cdata, v.storage_offset(), v.shape): v for v in values if isinstance(v, Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def narrow_work(launch: Launch) -> int:
    """Operations of the tensor cores on the adapters' products, with what the tiles pad."""
    a = arguments(launch)
    return (
        2
        * a.get("rows", 0)
        * a.get("PADDED_R", 0)
        * {
            "lora_shrink._shrink_kernel": lambda: a["COUNT"] * a["K"],
            "lora_shrink._expand_backward_kernel": lambda: 2 * sum(a["ns"]),
            "lora_shrink._shrink_backward_kernel": lambda: a["COUNT"] * a["K"],
            "lora_shrink._sum_kernel": lambda: 0,
            "lora_gemm._forward_kernel": lambda: sum(a["ns"]),
            "lora_gemm._input_gradient_kernel": lambda: a["ADAPTED"] * a["K"],
            "lora_gemm._single_pass_kernel": lambda: a["N"] + a["K"] * a["col_tiles"],
            "swiglu_shrink._fwd_kernel": lambda: a["K"],
            "swiglu_shrink._bwd_kernel": lambda: a["K"],
        }[launch.name]()
    )


def launches(
    tokens: int, k: int, ns: list[int], rank: int, p: float = 0.0, arch: int = 80
) -> tuple[list[Launch], list[Launch]]:
    """Of forward and backward of one group of linears on 16-bit tensors, all its inputs and adapters wanting gradients."""
    x = torch.empty(tokens, k, device="meta", dtype=torch.bfloat16, requires_grad=True)
    return of(lambda: lora_linear_group(x, adapted(k, ns, rank, p)), arch)


def adapted(k: int, ns: list[int], rank: int, p: float) -> list[Projection]:
    """Linears of 16 bits from k to each of ns, with trained adapters, on the meta device."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta", requires_grad=True)

    return [
        Projection(
            torch.empty(n, k, device="meta", dtype=torch.bfloat16),
            None,
            Adapter(empty(rank, k), empty(n, rank), 2.0, p, DropoutKey(0, 0, 0, j)),
        )
        for j, n in enumerate(ns)
    ]


def of(call: Callable[[], Sequence[Tensor]], arch: int) -> tuple[list[Launch], list[Launch]]:
    """The launches of a call and of its backward."""
    with recorded(arch) as made:
        ys = call()
        there = len(made)
        torch.autograd.backward(ys, [torch.empty_like(y) for y in ys])
    return made[:there], made[there:]


def group(tokens: int, k: int, ns: list[int], rank: int, p: float = 0.0, arch: int = 80) -> Cost:
    return cost(2 * tokens * k * sum(ns), *launches(tokens, k, ns, rank, p, arch))


def cost(wide: int, there: list[Launch], back: list[Launch]) -> Cost:
    """Of launches whose wide products are so many operations."""
    narrow = [sum(map(narrow_work, some)) for some in (there, back)]
    return Cost(wide + narrow[0], sum(map(moved, there)), wide + narrow[1], sum(map(moved, back)))


def mlp(tokens: int, width: int, ffn: int, rank: int, p: float = 0.0, arch: int = 80) -> Cost:
    """Of gate, up, SwiGLU and down as one operation."""
    x = torch.empty(tokens, width, device="meta", dtype=torch.bfloat16, requires_grad=True)
    gate_up, (down,) = adapted(width, [ffn, ffn], rank, p), adapted(ffn, [width], rank, p)
    return cost(2 * tokens * width * 3 * ffn, *of(lambda: [lora_mlp(x, gate_up, down)], arch))


def partial_sums(tokens: int, k: int, ns: list[int], rank: int, arch: int = 80) -> int:
    """Bytes of the partial sums of dS and dB, written once and read once."""
    _, back = launches(tokens, k, ns, rank, arch=arch)
    sums = [arguments(launch) for launch in back if launch.name == "lora_shrink._sum_kernel"]
    parts = [sums_of[name] for sums_of in sums for name in ("parts_ptr", "more_ptr")]
    return sum(2 * part.numel() * part.element_size() for part in parts if part is not None)


def linears(shape: Shape) -> dict[str, tuple[int, list[int]]]:
    """(in-features, out-features of the linears that read the same input) of a layer."""
    return {
        "q, k, v": (shape.width, [shape.query, shape.kv, shape.kv]),
        "o": (shape.query, [shape.width]),
        "gate, up": (shape.width, [shape.ffn, shape.ffn]),
        "down": (shape.ffn, [shape.width]),
    }


def layer(shape: Shape, tokens: int, rank: int, p: float = 0.0, arch: int = 80) -> dict[str, dict[str, Cost]]:
    """By group, and "layer" for their sum, the cost of every formulation."""
    found = {
        name: {**lora_group(tokens, k, ns, rank), "minilora": group(tokens, k, ns, rank, p, arch)}
        for name, (k, ns) in linears(shape).items()
    }
    none = Cost(0, 0, 0, 0)
    return found | {"layer": {side: sum((g[side] for g in found.values()), none) for side in found["o"]}}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.proof.layer_bytes", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", choices=list(MODELS), default="qwen2.5-7b")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    args = parser.parse_args(argv)
    print("| sm | linears | forward, GB | extra | backward, GB | extra tensor work | bytes / minimum | lorafusion's |")
    print("|---|---|---|---|---|---|---|---|")
    for arch in (80, 90):
        for name, sides in layer(MODELS[args.model], args.tokens, args.rank, args.dropout, arch).items():
            ours, frozen, least = sides["minilora"], sides["frozen"], sides["minimum"].total_bytes
            print(
                f"| {arch} | {name} | {ours.bytes / 1e9:.2f} | {(ours.bytes - frozen.bytes) / 1e9:.3f} "
                f"| {ours.backward_bytes / 1e9:.2f} | {ours.total_flops / frozen.total_flops - 1:.2%} "
                f"| {ours.total_bytes / least:.2f} | {sides['lorafusion'].total_bytes / least:.2f} |"
            )


if __name__ == "__main__":
    main()
