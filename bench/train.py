"""A LoRA step on a real model, ours and the other tools', in turn in one run.

    python -m bench.train --model DIR --data FILE --side hf=PYTHON --side unsloth=PYTHON [--rounds 5] [--steps 4] [--batch 4] [--rank 8]

Each side is a process of its own that stays alive, in the interpreter that is named (`hf`: transformers + peft, `qlora`: the same on
bitsandbytes' NF4, `unsloth`; `nf4` and `int8` are minilora on a quantised base).
Round by round each takes the same steps, on ids and targets from one file, from the same adapter. The others pad a batch to its
longest row, as their own trainers do. Tokens are real ones, without padding, for all. Wall and CPU seconds: a busy neighbour
disturbs the latter less. Memory is the most that a process ever held. `limit` is the time of the frozen products of these steps
alone, in the dtype that minilora computes in: no engine with these products can be faster.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench.sides import Side, interpreters, spread
from minilora.machine.cpu import device_name

SEED = 42
OURS = ("minilora", "nf4", "int8")
HERE = Path(__file__).parent


def steps_of(args: argparse.Namespace) -> list[list[dict[str, list[int]]]]:
    """The rows of every step, batches in the order of the seed."""
    from minilora.data import load_examples, step_examples
    from minilora.text.tokenizer import load_tokenizer

    examples, _ = load_examples(args.data, load_tokenizer(args.model))
    count = (args.rounds + 1) * args.steps
    return [
        [
            {"ids": e.ids.tolist(), "targets": e.targets.tolist()}
            for e in step_examples(examples, args.batch, SEED, step)
        ]
        for step in range(count)
    ]


def side(name: str, python: str, args: argparse.Namespace, work: Path) -> Side:
    """A train_side.py process."""
    command = [python, str(HERE / "train_side.py"), name, "--model", args.model, "--adapter", str(work / "adapter")]
    return Side(name, [*command, "--steps", str(work / "steps.json"), "--device", args.device])


class Limit:
    """The frozen products of a step, forward and back, and nothing else: a loop over weights of the model's shapes."""

    name = "limit"

    def __init__(self, args: argparse.Namespace, steps: list[list[dict[str, list[int]]]]):
        import torch

        from minilora.checkpoint.load import empty_model, find_device, read_config
        from minilora.experts import expert_linears
        from minilora.lora import linears
        from minilora.machine.compute import choose
        from minilora.models.config import Config
        from minilora.models.moe import ExpertLinear, MoEConfig

        c: Config = read_config(Path(args.model))
        device = find_device(args.device)
        self.dtype, self.steps = choose(c, c.dtype, device).dtype, steps
        model = empty_model(c)
        share = c.chosen / c.experts if isinstance(c, MoEConfig) else 1.0
        found: Counter[tuple[int, int, float]] = Counter(
            (linear.in_features, linear.out_features, 1.0)
            for linear in linears(model).values()
            if not isinstance(linear, ExpertLinear)
        )
        for linear in expert_linears(model).values():  # every expert has its share of the tokens
            found[linear.in_features, linear.out_features, share] += linear.experts
        self.shapes, self.counts = list(found), list(found.values())
        self.weights = [torch.randn(n, k).to(device, self.dtype) for k, n, _ in self.shapes]
        self.head = torch.randn(c.vocab, c.width).to(device, self.dtype)

    def ask(self, number: int) -> dict[str, Any]:
        import torch

        of_step = self.steps[number]
        tokens, trained = sum(len(r["ids"]) for r in of_step), sum(t >= 0 for r in of_step for t in r["targets"])
        with torch.no_grad():
            inputs = [torch.randn(round(tokens * share), k, dtype=self.dtype) for k, _, share in self.shapes]
            grads = [torch.randn(round(tokens * share), n, dtype=self.dtype) for _, n, share in self.shapes]
            hidden = torch.randn(trained, self.head.shape[1], dtype=self.dtype)
            start, cpu = time.perf_counter(), time.process_time()
            for x, dy, w, count in zip(inputs, grads, self.weights, self.counts, strict=True):
                for _ in range(count):
                    _, _ = x @ w.T, dy @ w
            for part in hidden.split(256):
                _ = (part @ self.head.T) @ self.head
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        return {"seconds": seconds, "cpu_seconds": cpu, "tokens": tokens, "memory": 0, "loss": 0.0}

    def close(self) -> None:
        pass


def start_adapter(args: argparse.Namespace, folder: Path) -> None:
    """The adapter that all sides begin with."""
    import minilora

    model = minilora.load_model(args.model, device="cpu")
    minilora.add_lora(model, "all-linear", r=args.rank, alpha=2 * args.rank, seed=SEED)
    minilora.save_adapter(model, folder)


def measure(args: argparse.Namespace, steps: list[list[dict[str, list[int]]]]) -> dict[str, Any]:
    """Rounds of steps, the sides in turn; the first round warms up and is not counted."""
    named = {"minilora": sys.executable} | interpreters(args.side)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        start_adapter(args, work / "adapter")
        (work / "steps.json").write_text(json.dumps(steps))
        sides: list[Side | Limit] = [side(name, python, args, work) for name, python in named.items()]
        if args.device == "cpu":
            sides.append(Limit(args, steps))
        costs: dict[str, list[list[dict]]] = {each.name: [] for each in sides}
        for r in range(args.rounds + 1):
            for each in sides if r % 2 else sides[::-1]:
                costs[each.name].append([each.ask(r * args.steps + i) for i in range(args.steps)])
        for each in sides:
            each.close()
    result: dict[str, Any] = {key: getattr(args, key) for key in ("rounds", "steps", "batch", "rank")}
    result["sides"] = {name: _summary(rounds) for name, rounds in costs.items()}
    return result


def _summary(rounds: list[list[dict]]) -> dict[str, Any]:
    def rates(key: str) -> list[float]:
        return [sum(c["tokens"] for c in r) / sum(c[key] for c in r) for r in rounds[1:]]

    return {
        "tokens_per_second": rates("seconds"),
        "tokens_per_cpu_second": rates("cpu_seconds"),
        "memory_gb": max(c["memory"] for r in rounds for c in r) / 1e9,
        "losses": [c["loss"] for r in rounds for c in r],
        "torch": rounds[0][0].get("torch", ""),
        "threads": rounds[0][0].get("threads", ""),
    }


def report(result: dict[str, Any]) -> str:
    """A markdown table of the sides, and of minilora against each."""
    sides = result["sides"]
    lines = [
        "| | tokens/s, median (range) | tokens/CPU s | peak memory, GB | loss, mean of all steps |",
        "|---|---|---|---|---|",
    ]
    for name, found in sides.items():
        cells = [spread(found[key], 1) for key in ("tokens_per_second", "tokens_per_cpu_second")]
        loss, memory = statistics.mean(found["losses"]), found["memory_gb"]
        lines.append(f"| {name} | {' | '.join(cells)} | {f'{memory:.2f} | {loss:.4f}' if memory else '|'} |")
    for one, other in _pairs(list(sides)):
        lines.append(f"| {one} / {other} | {_ratios(sides[one], sides[other])} |")
    return "\n".join(lines)


def _pairs(names: list[str]) -> list[tuple[str, str]]:
    """What is compared: minilora with the others, and on a quantised base with itself on the plain one and with QLoRA."""
    ours = [name for name in names if name in OURS]
    against = [(name, "minilora") for name in ours if name != "minilora"]
    against += [("minilora", name) for name in names if name not in ours]
    return against + [("nf4", "qlora")] * ({"nf4", "qlora"} <= set(names))


def _ratios(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Cells: speed by wall clock and by CPU, memory, and how far the losses of a step are apart."""
    cells = [
        spread([a / b for a, b in zip(one[key], other[key], strict=True)], 2)
        for key in ("tokens_per_second", "tokens_per_cpu_second")
    ]
    if not other["memory_gb"]:
        return f"{' | '.join(cells)} | |"
    apart = max(abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=True))
    return f"{' | '.join(cells)} | {one['memory_gb'] / other['memory_gb']:.2f} | at most {apart:.4f} apart"


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    return {
        "cpu": device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def save(result: dict[str, Any], file: str | None) -> None:
    if file:
        Path(file).write_text(json.dumps(result, indent=1) + "\n")


def parser_of(about: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument(
        "--side",
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help="nf4, int8, hf, qlora or unsloth, and its interpreter",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps of a round")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save", help="write the figures to this json file")
    return parser


def main() -> None:
    args = parser_of(__doc__ or "").parse_args()
    result = measure(args, steps_of(args)) | {"machine": machine(args.device)}
    print(report(result))
    save(result, args.save)


if __name__ == "__main__":
    main()
