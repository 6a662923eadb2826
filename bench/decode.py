"""Tokens one after the other from a real model, ours and the other tools', in turn in one run.

    python -m bench.decode --model DIR --side hf=PYTHON --side llama=PYTHON --gguf FILE [--rounds 5] [--tokens 40]

Sides: minilora as it chooses, minilora --int8, transformers.generate in bf16, llama.cpp (llama-cpp-python) on a GGUF file of the
same model. Greedy, one prompt of 30 tokens, whose time is not counted. `roof` is what the memory allows: the bytes of all
weights in 16 bits, read at the rate of a sum over a large tensor.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from bench.sides import Side, interpreters, spread

HERE = Path(__file__).parent


class Roof:
    """The weights' bytes at the speed at which this machine reads memory."""

    name = "roof"

    def __init__(self, model: str, tokens: int):
        import torch

        from minilora.files.tensors import Tensors

        shapes = Tensors(Path(model)).shapes.values()
        self.bytes = sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in shapes)
        self.tokens, self.large = tokens, torch.ones(2**27)

    def ask(self, number: int) -> dict[str, Any]:
        best = float("inf")
        for _ in range(4):
            start = time.perf_counter()
            self.large.sum()
            best = min(best, time.perf_counter() - start)
        seconds = self.tokens * self.bytes / (self.large.nbytes / best)
        return {"seconds": seconds, "cpu_seconds": seconds, "tokens": self.tokens, "memory": 0}

    def close(self) -> None:
        pass


def measure(args: argparse.Namespace) -> dict[str, Any]:
    ours, given = {"minilora": sys.executable, "minilora-int8": sys.executable}, interpreters(args.side)
    sides: list[Side | Roof] = []
    for name, python in (ours | given).items():
        path = args.gguf if name == "llama" else args.model
        command = [python, str(HERE / "decode_side.py"), name, "--model", path, "--tokens", str(args.tokens)]
        sides.append(Side(name, command))
    sides.append(Roof(args.model, args.tokens))
    costs: dict[str, list[dict]] = {side.name: [] for side in sides}
    for r in range(args.rounds):
        for side in sides if r % 2 else sides[::-1]:
            costs[side.name].append(side.ask(r))
    for side in sides:
        side.close()
    return {
        name: {
            "tokens_per_second": [c["tokens"] / c["seconds"] for c in rounds],
            "cpu_ms_per_token": [1e3 * c["cpu_seconds"] / c["tokens"] for c in rounds],
            "memory_gb": max(c["memory"] for c in rounds) / 1e9,
        }
        for name, rounds in costs.items()
    }


def report(sides: dict[str, Any]) -> str:
    lines = ["| | tokens/s, median (range) | CPU ms a token | peak memory, GB |", "|---|---|---|---|"]
    for name, side in sides.items():
        memory = f"{side['memory_gb']:.2f}" if side["memory_gb"] else ""
        lines.append(
            f"| {name} | {spread(side['tokens_per_second'], 1)} | {spread(side['cpu_ms_per_token'], 1)} | {memory} |"
        )
    for mine in ("minilora", "minilora-int8"):
        for name in [name for name in sides if not name.startswith("minilora")]:
            pairs = zip(sides[mine]["tokens_per_second"], sides[name]["tokens_per_second"], strict=True)
            lines.append(f"| {mine} / {name} | {spread([a / b for a, b in pairs], 2)} | | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--gguf", default="", help="the model for llama.cpp")
    parser.add_argument(
        "--side", action="append", default=[], metavar="NAME=PYTHON", help="hf or llama, and its interpreter"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--save", help="write the figures to this json file")
    args = parser.parse_args()
    result = measure(args)
    print(report(result))
    if args.save:
        import torch

        from bench.roof import machine

        about = {"machine": machine(torch.device("cpu")), "sides": result}
        Path(args.save).write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
