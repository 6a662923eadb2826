"""Training steps in every setting, by four ranks, by two and by one. Writes what each rank found.

python tests/ranks/steps.py MODEL OUT
"""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ranks.forked import forked
from ranks.traffic import bytes_sent

from minilora.checkpoint.load import load_model
from minilora.config import TrainConfig
from minilora.data import IGNORE, Example, pack
from minilora.evaluate import evaluate
from minilora.lora import trained_parameters
from minilora.ranks.ranks import ALONE, Ranks, join
from minilora.run.setup import optimizer_of, prepare
from minilora.run.snapshot import load_snapshot, save_snapshot
from minilora.train import train_step

CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"method": "full"},
    "checkpointing": {"checkpointing": True},
    "dropout": {"lora_dropout": 0.3},
    "one stream": {"micro_tokens": 10**6},  # ranks beyond the first have none
}
LENGTHS = (9, 3, 17, 5, 12, 1, 8, 20, 2, 11)


def examples() -> list[Example]:
    numbers = np.random.default_rng(0)
    found = []
    for n in LENGTHS:
        ids = numbers.integers(0, 256, n)
        targets = np.where(numbers.random(n) < 0.6, numbers.integers(0, 256, n), IGNORE)
        targets[0] = 7
        found.append(Example(ids, targets, ""))
    return found


def results(folder: Path, ranks: Ranks) -> dict[str, Any]:
    found = {}
    rows = examples()
    for name, settings in CASES.items():
        config = replace(TrainConfig(micro_tokens=24, lora_r=4), **settings)
        model = prepare(load_model(folder, torch.float64, torch.device("cpu")), config).double()
        optimizer = optimizer_of(model, config)
        assert config.micro_tokens
        before = bytes_sent()
        steps = [
            train_step(model, optimizer, pack(rows[s:], config.micro_tokens), config, s, ranks=ranks).read()
            for s in range(3)
        ]
        sent = bytes_sent() - before
        score = evaluate(model, rows, config.micro_tokens, ranks)
        flat = torch.cat([p.detach().flatten() for p in trained_parameters(model).values()])
        found[name] = {
            "steps": steps, "val": score.total, "tokens": score.tokens, "some": some_of(model),
            "sent": sent, "trained": sum(p.nbytes for p in trained_parameters(model).values()),
            "bits": hashlib.sha256(flat.numpy().tobytes()).hexdigest(),
        }  # fmt: skip
    return found


def begun(folder: Path, ranks: Ranks) -> tuple[torch.nn.Module, torch.optim.AdamW, Callable[[int], list[float]]]:
    """A run with dropout: its model, its optimizer, and a call that makes its step s and returns some parameters."""
    config = replace(TrainConfig(micro_tokens=24, lora_r=4), **CASES["dropout"])
    model = prepare(load_model(folder, torch.float64, torch.device("cpu")), config).double()
    optimizer = optimizer_of(model, config)

    def step(s: int) -> list[float]:
        train_step(model, optimizer, pack(examples()[s:], 24), config, s, ranks=ranks).read()
        return some_of(model)

    return model, optimizer, step


def go_on(folder: Path, snapshot: Path, ranks: Ranks) -> list[float]:
    """The next step of a run from what other ranks have left, and a snapshot of it."""
    model, optimizer, step = begun(folder, ranks)
    if snapshot.exists():
        load_snapshot(snapshot, model, optimizer, full=False)
    found = step(int(max(state["step"] for state in optimizer.state.values())) if optimizer.state else 0)
    ranks.least(0)  # nobody writes before all have read
    if ranks.first:
        save_snapshot(snapshot, model, optimizer, {}, folder, full=False)
    return found


def without_a_stop(folder: Path) -> list[float]:
    """The third step of that run; the adapters are rounded after each as a snapshot does, which is fp32 as they are elsewhere."""
    model, _, step = begun(folder, ALONE)
    for s in (0, 1):
        step(s)
        for p in trained_parameters(model).values():
            p.data.copy_(p.data.float())
    return step(2)


def some_of(model: torch.nn.Module) -> list[float]:
    flat = torch.cat([p.detach().flatten() for p in trained_parameters(model).values()])
    return flat[:: max(1, len(flat) // 500)].tolist()


def tell(folder: Path, out: Path) -> None:
    """What this rank finds, and then a step of the run that the ranks before it have left."""
    me = join(60)
    told = results(folder, me)
    told["gone on"] = go_on(folder, out / "snapshot", me)
    if me.count == 1:
        told["without a stop"] = without_a_stop(folder)
    (out / f"{me.count}-{me.rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    for count in (4, 2, 1):
        forked(count, lambda: tell(*map(Path, sys.argv[1:])))
