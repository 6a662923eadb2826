"""A LoRA step on a real model, ours and transformers + peft, in turn in one run.

    python -m bench.train --model DIR --data FILE --peer [--rounds 5] [--steps 4] [--batch 4] [--rank 8]

Each side is a process of its own that stays alive; round by round the one and then the other takes the same steps on the same
rows, from the same adapter. The peer pads a batch to its longest row, as its own trainer does. Tokens are real ones,
without padding, for both. Memory is the most that a process ever held. Printed: medians over the rounds, their range, and ratios.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SEED, CLIP, LR = 42, 1.0, 2e-4


def rows_of(args: argparse.Namespace) -> Callable[[int], list]:
    """The examples of step 0, 1, ...: one batch of rows in the order of seed 42."""
    from minilora.data import load_examples, step_examples
    from minilora.text.tokenizer import load_tokenizer

    examples, _ = load_examples(args.data, load_tokenizer(args.model))
    return lambda step: step_examples(examples, args.batch, SEED, step)


def ours(args: argparse.Namespace) -> Callable[[int], float]:
    """A function that takes one step and returns its loss."""
    import torch

    import minilora
    from minilora.config import resolve
    from minilora.data import make_batch
    from minilora.heap import keep_heap
    from minilora.train import train_step

    keep_heap()
    model = minilora.load_model(args.model, torch.bfloat16, args.device)
    minilora.load_adapter(model, args.adapter)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0, fused=True
    )
    config, rows = resolve({"clip": CLIP, "seed": SEED}), rows_of(args)

    def step(number: int) -> float:
        return train_step(model, optimizer, [make_batch(rows(number))], config, number)[0]

    return step


def peer(args: argparse.Namespace) -> Callable[[int], float]:
    """The same with transformers and peft."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).to(args.device)
    model = PeftModel.from_pretrained(base, args.adapter, is_trainable=True).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)
    rows = rows_of(args)

    def step(number: int) -> float:
        examples = rows(number)
        shape = (len(examples), max(len(e.ids) for e in examples))
        ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
        mask = torch.zeros(shape, dtype=torch.long)
        for i, e in enumerate(examples):
            n = len(e.ids)
            ids[i, :n], mask[i, :n] = torch.from_numpy(e.ids), 1
            labels[i, 1:n] = torch.from_numpy(e.targets[:-1])
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        loss = model(**{k: v.to(args.device) for k, v in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def serve(args: argparse.Namespace) -> None:
    """A side's process: for every line on standard input with a step's number, take it and print what it cost."""
    import torch

    step, rows = {"ours": ours, "peer": peer}[args.side](args), rows_of(args)
    for line in sys.stdin:
        number = int(line)
        start = time.perf_counter()
        loss = step(number)
        if args.device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        card = torch.cuda.max_memory_allocated() if args.device != "cpu" else 0
        memory = card or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        cost = {
            "loss": loss,
            "seconds": seconds,
            "tokens": sum(len(e.ids) for e in rows(number)),
            "memory": memory,
        }
        print("step", json.dumps(cost), flush=True)


class Side:
    """The other end of `serve`."""

    def __init__(self, name: str, args: argparse.Namespace, adapter: str):
        words = ["--side", name, "--adapter", adapter]
        for key in ("model", "data", "batch", "rank", "device"):
            words += [f"--{key}", str(getattr(args, key))]
        command = [sys.executable, "-m", "bench.train", *words]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self, number: int) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("step "):
                return json.loads(line[5:])
        raise RuntimeError(f"the side stopped with exit code {self.process.wait()}")

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def start_adapter(args: argparse.Namespace, folder: str) -> None:
    """The adapter that both sides begin with."""
    import minilora

    model = minilora.load_model(args.model, device="cpu")
    minilora.add_lora(model, "all-linear", r=args.rank, alpha=2 * args.rank, seed=SEED)
    minilora.save_adapter(model, folder)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Rounds of steps, the sides in turn; the first round warms up and is not counted."""
    names = ["ours", "peer"] if args.peer else ["ours"]
    with tempfile.TemporaryDirectory() as work:
        adapter = str(Path(work) / "adapter")
        start_adapter(args, adapter)
        sides = {name: Side(name, args, adapter) for name in names}
        costs: dict[str, list[list[dict]]] = {name: [] for name in names}
        for r in range(args.rounds + 1):
            for name in names if r % 2 else names[::-1]:
                costs[name].append([sides[name].step(r * args.steps + i) for i in range(args.steps)])
        for side in sides.values():
            side.close()
    result: dict[str, Any] = {
        "rounds": args.rounds,
        "steps": args.steps,
        "batch": args.batch,
        "rank": args.rank,
    }
    for name, rounds in costs.items():
        rates = [sum(c["tokens"] for c in r) / sum(c["seconds"] for c in r) for r in rounds[1:]]
        result[name] = {"tokens_per_second": rates, "memory_gb": max(c["memory"] for r in rounds for c in r) / 1e9,
                        "losses": [c["loss"] for r in rounds for c in r]}  # fmt: skip
    return result


def report(result: dict[str, Any]) -> str:
    """A markdown table of the sides and their ratios."""
    lines = [
        "| | tokens/s, median (range) | peak memory, GB | loss, mean of all steps |",
        "|---|---|---|---|",
    ]
    for name in ("ours", "peer"):
        if name in result:
            side = result[name]
            rates = side["tokens_per_second"]
            lines.append(f"| {name} | {statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f}) "
                         f"| {side['memory_gb']:.2f} | {statistics.mean(side['losses']):.4f} |")  # fmt: skip
    if "peer" in result:
        mine, theirs = result["ours"], result["peer"]
        ratios = [a / b for a, b in zip(mine["tokens_per_second"], theirs["tokens_per_second"], strict=True)]
        apart = max(abs(a - b) for a, b in zip(mine["losses"], theirs["losses"], strict=True))
        lines.append(f"| ratio | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
                     f"| {mine['memory_gb'] / theirs['memory_gb']:.2f} | largest difference of a step {apart:.4f} |")  # fmt: skip
    return "\n".join(lines)


def cpu_name() -> str:
    """What the system calls its processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument(
        "--peer", action="store_true", help="measure transformers + peft too (pip install 'minilora[peers]')"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps of a round")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save", help="write the figures to this json file")
    parser.add_argument("--side", choices=["ours", "peer"], help=argparse.SUPPRESS)
    parser.add_argument("--adapter", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        serve(args)
        return
    import torch

    result = measure(args)
    result["machine"] = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    print(report(result))
    if args.save:
        Path(args.save).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
