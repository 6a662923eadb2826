"""Training steps by one GPU and by all of a machine: what each more of them gives, and what the sum over the ranks costs.

    python -m bench.ranks [--models qwen2.5-7b ...] [--ranks 1 8] [--tokens 8192] [--save FILE.json]

The whole training step of bench.step, with as many rows for each rank whatever their number, so that a perfect run of N ranks has N
times the tokens/s of one. torchrun starts the ranks of each case. Without GPUs they are processes on the CPU, over gloo: a rehearsal.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.figures import Figures
from bench.roof import machine
from bench.step import SHAPES, Form, random_model, training
from bench.timing import Times, wall_and_host
from bench.workers import Row, lost
from minilora.lora import trained_parameters
from minilora.ranks.ranks import join

HEAD = (
    "| case | ms a step (20 to 80 %) | tokens/s of all | times one rank's | MB of gradients | ms of their sum |\n|"
    + "---|" * 6
)


def measure(model: str, form: Form, rounds: int, out: Path) -> None:
    """What one of the ranks does; the first writes the figures."""
    ranks = join(60)
    with ranks.ending_as_one("Start it again."):
        step = training(SHAPES[model], form, ranks)
        for _ in range(2):  # kernels are compiled, the library has chosen
            step.run()
        wall, _ = wall_and_host(step.run, form.device, rounds)
        meta = random_model(SHAPES[model], torch.bfloat16, torch.device("meta"), form.rank)
        gradients = [torch.zeros(p.shape, device=form.device) for p in trained_parameters(meta).values()]
        summed, _ = wall_and_host(lambda: ranks.sum(gradients), form.device, rounds)
        found = {"tokens": step.tokens, "seconds": wall, "sum": summed, "bytes": sum(g.nbytes for g in gradients)}
        if ranks.first:
            out.write_text(json.dumps(found))


def case(model: str, ranks: int, words: list[str], device: str, seconds: float) -> Row:
    """The figures of a model on so many ranks, which torchrun starts."""
    hidden = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        process = subprocess.Popen(
            [*torchrun, "-m", "bench.ranks", "--models", model, *words, "--out", str(out)],
            env=os.environ | hidden, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)  # torchrun ends its ranks, which have sessions of their own
            process.communicate()
            return {"skipped": "no time was left"}
        if out.exists():
            return json.loads(out.read_text())
        reason = next((line for line in said.splitlines() if line.startswith("error:")), said.strip()[-200:])
        return {"failed": reason.replace("\n", " ")}


def line_of(row: Row, rows: dict[str, Row]) -> str:
    """A case in Markdown, against one rank of the same model where that is there."""
    if "seconds" not in row:
        return f"| {row['name']} | {lost(row)} |" + " |" * 4
    t, one = Times(*row["seconds"]), rows.get(name_of(row["model"], 1), {})
    rate = row["tokens"] / t.median
    times = f"{rate / (one['tokens'] / one['seconds'][0]):.2f}" if "seconds" in one else ""
    return (
        f"| {row['name']} | {t.median * 1e3:.1f} ({t.low * 1e3:.1f} to {t.high * 1e3:.1f}) | {rate:,.0f} | {times} "
        f"| {row['bytes'] / 1e6:.1f} | {row['sum'][0] * 1e3:.2f} |"
    )


def name_of(model: str, ranks: int) -> str:
    return f"{model}, {ranks} rank{'s' * (ranks > 1)}"


def main(argv: list[str] | None = None) -> None:
    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["qwen2.5-7b" if gpus else "toy"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, max(2, gpus)])
    parser.add_argument(
        "--tokens", type=int, default=8192 if gpus else 256, help="of a stream; a rank has two or three"
    )
    parser.add_argument("--document", type=int, default=1024 if gpus else 128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10 if gpus else 3)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if gpus else "cpu")
    parser.add_argument("--seconds", type=float, default=1e6, help="what is not done by then is skipped")
    parser.add_argument("--save", metavar="FILE", help="write the figures as JSON, and the table beside it as .md")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)  # of a rank
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if args.out:
        form = Form(args.tokens, args.document, args.rank, device)
        return measure(args.models[0], form, args.rounds, args.out)
    deadline = time.monotonic() + args.seconds
    asked = {key: getattr(args, key) for key in ("tokens", "document", "rank", "rounds", "device")}
    words = [f"--{key}={value}" for key, value in asked.items()]
    figures = Figures(machine(device) | asked, [HEAD], lambda row: line_of(row, figures.rows), args.save)
    for model in args.models:
        for ranks in args.ranks:
            left = deadline - time.monotonic()
            found = case(model, ranks, words, args.device, left) if left > 0 else {"skipped": "no time was left"}
            figures.add({"name": name_of(model, ranks), "model": model, "ranks": ranks, **found})


if __name__ == "__main__":
    main()
