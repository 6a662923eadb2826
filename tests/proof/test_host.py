"""The CPU's part of a training step: the launches of bench/proof/host.json, and a run of the bench at toy size."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch

from bench.proof.host import COUNTED, counted
from minilora.kernels.lang import INTERPRETED

ROOT = Path(__file__).parents[2]
TABLE = json.loads((ROOT / "bench/proof/host.json").read_text())
NOISE = 1.3  # a ratio of CPU times on a machine that does other things


@pytest.mark.skipif(INTERPRETED, reason="the interpreter launches nothing")
@pytest.mark.parametrize("name", COUNTED)
def test_launches_are_those_of_the_table(name: str):
    assert counted([name]) == {key: row for key, row in TABLE["launches"].items() if key.startswith(name)}


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to build a driver that does nothing")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the real driver is loaded")
def test_cpu_time_beside_peft():
    command = [sys.executable, "-m", "bench.proof.host", "--models", "--layers", "2", "--rounds", "3"]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, check=False, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name in ("time", "time, checkpointing"):
        assert found[name]["layer ratio"] <= TABLE[name]["layer ratio"] * NOISE
        assert found[name]["layer minilora calls"] <= TABLE[name]["layer minilora calls"] * 1.02
