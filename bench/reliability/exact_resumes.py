"""python -m bench.reliability.exact_resumes: a run of 40 steps gone on with from each of them, bit for bit, and one that is killed after each.

Two epochs with a short last step, LoRA with dropout, a cosine schedule, clipping; base in fp32 or bf16, one rank or two, several rows in
a stream or one. Compared are the bytes of every later loss, gradient norm and learning rate, of the adapter, and of the moments.
"""

import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from bench.reliability import forked, scoreboard
from bench.reliability.invariants import contents, difference
from minilora import train
from tests.tiny import make_model

STEPS = 40
SETTINGS = ["--lora-r", "2", "--lora-dropout", "0.1", "--lr", "0.01", "--warmup", "0.1", "--clip", "1", "--batch-size", "4", "--epochs", "2",
            "--device", "cpu", "--threads", "1", "--compute", "float32", "--keep-checkpoints", "99"]  # fmt: skip


class Kind(NamedTuple):
    """What differs between the runs."""

    base: torch.dtype
    ranks: int
    micro_tokens: int  # of a stream: of several rows, or 1, which is raised to the longest row

    def __str__(self) -> str:
        rows = "one row" if self.micro_tokens == 1 else "several rows"
        return f"{str(self.base).removeprefix('torch.')} base, {self.ranks} ranks, {rows} in a stream"


KINDS = [Kind(*each) for each in product((torch.float32, torch.bfloat16), (1, 2), (150, 1))]


def run(kind: Kind, call: Callable[[], int]) -> int:
    """The exit code of the first rank; each is a fork."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    children = [forked.start(partial(_rank, rank, kind.ranks, port, call)) for rank in range(kind.ranks)]
    ends = [child.wait() for child in children]
    assert ends[0].code in (0, forked.KILLED), ends[0].said
    return ends[0].code


def _rank(rank: int, count: int, port: int, call: Callable[[], int]) -> int:
    if count > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    return call()


def killed_after_save(words: list[str]) -> int:
    """The command, killed as soon as it has saved once and is not at its end."""
    save = train.save

    def last(run) -> None:
        save(run)
        if run.progress.step < run.plan.steps:
            os.kill(os.getpid(), signal.SIGKILL)

    train.save = last
    return forked.command(words)


def trials(work: Path, kind: Kind, steps: range, total: int = STEPS) -> Iterator[list[str]]:
    """What differs after each resume, and at last after the chain; the run has `total` steps."""
    model = work / str(kind.base)
    if not model.exists():
        make_model(model, kind.base, num_hidden_layers=1, hidden_size=16, intermediate_size=24, head_dim=4)
        rows = [{"instruction": f"Say {n}.", "output": str(n) * (1 + n % 5)} for n in range(1, 4 * STEPS // 2)]
        (work / "rows.json").write_text(json.dumps(rows))
    out, whole = work / "out", work / "whole"
    resume = ["train", "--output", str(out), "--resume"]
    begin = ["train", "--model", str(model), "--data", str(work / "rows.json"), "--output", str(out), *SETTINGS,
             "--micro-tokens", str(kind.micro_tokens), "--save-every", "1", "--max-steps"]  # fmt: skip
    forked.prepare([*begin, "1"])
    shutil.rmtree(out)
    new = [*begin, str(total)]
    assert run(kind, partial(forked.command, new)) == 0
    out.rename(whole)
    then = _ends(whole, total)
    for step in steps:
        shutil.copytree(whole / "checkpoints" / f"step-{step}", out / "checkpoints" / f"step-{step}")
        for name in ("config.yaml", "metrics.jsonl"):
            shutil.copyfile(whole / name, out / name)
        run(kind, partial(forked.command, [*resume, "--save-every", str(total)]))
        yield [f"{kind}, from step {step}: {name}" for name in difference(_ends(out, total), then)]
        shutil.rmtree(out)
    kills = 0
    while run(kind, partial(killed_after_save, resume if kills else new)) == forked.KILLED:
        kills += 1
    yield [f"{kind}, killed {kills} times: {name}" for name in difference(_ends(out, total), then)]
    assert kills == total - 1, kills
    shutil.rmtree(out)
    shutil.rmtree(whole)


def _ends(folder: Path, step: int) -> dict[str, str]:
    """The hashes of what a run ends with."""
    last = (f"checkpoints/step-{step}/", "adapter/", "metrics.jsonl")
    return {name: value for name, value in contents(folder).items() if name.startswith(last)}


def all_trials(work: Path, every: int) -> Iterator[list[str]]:
    for kind in KINDS:
        yield from trials(work, kind, range(1, STEPS + 1, every))


if __name__ == "__main__":
    sys.exit(scoreboard.run("exact resumes", "resumes", all_trials))
