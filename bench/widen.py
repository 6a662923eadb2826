"""What it costs to widen a quantised weight [N, K], beside the product that it is widened for.

    python -m bench.widen [--shape 4864 896] [--tokens 512] [--rounds 20] [--threads 1] [--device cpu]

All are timed in turn: medians in milliseconds, and the 20th and 80th percentile; the share is that of the product.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.timing import in_turn
from minilora.kernels.fp8_blocks import FP8Weight
from minilora.kernels.int8_rows import Int8Weight
from minilora.kernels.nf4 import NF4Weight
from minilora.machine.cpu import device_name

FORMATS = (NF4Weight, Int8Weight, FP8Weight)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs=2, type=int, default=(4864, 896), metavar=("N", "K"))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    (n, k), device, dtype = args.shape, torch.device(args.device), getattr(torch, args.dtype)
    weight = torch.randn(n, k, device=device)
    wide, x = weight.to(dtype), torch.randn(args.tokens, k, device=device, dtype=dtype)
    calls: dict[str, Callable[[], Any]] = {"product": partial(torch.nn.functional.linear, x, wide)}
    calls |= {form.name: partial(form.of(weight).weight_as, dtype) for form in FORMATS}
    found = in_turn(calls, device, args.rounds)
    where = f"{args.threads} threads" if device.type == "cpu" else "a GPU"
    print(f"{device_name(device)}, {where}; W [{n}, {k}] in {args.dtype}, {args.tokens} tokens")
    for name, t in found.items():
        share = t.median / found["product"].median
        print(f"{name:<8} {t.median * 1e3:8.3f} ms ({t.low * 1e3:.3f} to {t.high * 1e3:.3f}) {share:7.1%}")


if __name__ == "__main__":
    main()
