"""Runs of several ranks on the tiny model: start one, do something to it, look at what it left."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tiny import make_model, make_rows

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
# 12 steps with a checkpoint every fourth
SETTINGS = [
    "--micro-tokens",
    "64",
    "--batch-size",
    "6",
    "--max-steps",
    "12",
    "--save-every",
    "4",
    "--lora-dropout",
    "0.2",
    "--compute",
    "float32",
    "--rank-timeout",
    "60",
    "--val",
    "2",
    "--eval-every",
    "6",
]


def torchrun(ranks: int, *words: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *words]


def material(folder: Path) -> Path:
    """The folder with a tiny model and its rows."""
    if not (folder / "model").exists():
        make_model(folder / "model")
        make_rows(folder / "rows.json")
    return folder


def given(command: str, folder: Path) -> list[str]:
    """The words of a command of minilora on a folder's model and rows."""
    material(folder)
    return ["-m", "minilora", command, "--model", str(folder / "model"), "--data", str(folder / "rows.json")]


def training(folder: Path, *words: str, ranks: int = 2) -> list[str]:
    """The command of a run, which ends with --output and the words."""
    return [sys.executable, *given("train", folder), *SETTINGS, "--gpus", str(ranks), "--output", *words]


def run(command: list[str], environment: Mapping[str, str] = {}) -> subprocess.CompletedProcess:
    return subprocess.run(command, env={**ENVIRONMENT, **environment}, capture_output=True, text=True, check=False)


def steps(run: Path) -> int:
    """How many steps metrics.jsonl has."""
    path = run / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [value for line in metrics(run) for key, value in line.items() if key in ("loss", "val_loss")]


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def ranks_of(run: Path) -> dict[int, int]:
    """The process of each rank that works on a folder."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment, words = ((process / name).read_bytes().split(b"\0") for name in ("environ", "cmdline"))
        except OSError:
            continue
        rank = next((int(word[5:]) for word in environment if word.startswith(b"RANK=")), None)
        if rank is not None and str(run).encode() in words:
            found[rank] = int(process.name)
    return found


def interrupted(
    command: list[str], there: Callable[[], bool], interrupt: Callable[[subprocess.Popen], object]
) -> tuple[int, str, float]:
    """(exit code, what it printed, seconds that it took to end) of a command that something happens to once a condition holds."""
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not there():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    interrupt(process)
    then = time.monotonic()
    said, _ = process.communicate()
    return process.returncode, said, time.monotonic() - then


def killing(rank: int, run: Path) -> Callable[[object], None]:
    return lambda _: os.kill(ranks_of(run)[rank], signal.SIGKILL)
