"""What a run shows while it goes: signs of life in a long step, an estimate that settles, and a share of the roof up to one."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model, make_rows

from minilora.console import Console
from minilora.machine import flops
from minilora.run import monitor
from minilora.run.monitor import Monitor
from minilora.settings import resolve
from minilora.train import train


class Clock:
    """time, as far as the monitor asks it."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(monitor, "time", clock)
    return clock


def metrics(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 1.0,
        "tokens_per_second": 1.0,
        "memory_gb": 1.0,
        "mfu": 0.5,
        "lr": 1e-4,
        "grad_norm": 1.0,
    }


def printed(path: Path, clock: Clock, durations: list[float]) -> str:
    text = io.StringIO()
    console = Console(file=text, width=200)
    with Monitor(path / "metrics.jsonl", 100, 0, console) as shown:
        for step, seconds in enumerate(durations, 1):
            shown.begin(step, 8192)
            clock.now += seconds
            shown.step(metrics(step))
    return text.getvalue()


def test_the_first_step_does_not_make_the_estimate(tmp_path: Path, clock: Clock):
    text = printed(tmp_path, clock, [60.0, *[1.0] * 9, 11.0, *[2.0] * 4])
    assert text.splitlines()[0] == " step 1: 8,192 tokens"
    assert "ETA 1:39:00" in text  # of the first alone there is nothing better
    assert "ETA 2:50" in text.splitlines()[-1]  # 85 steps of (9 + 11 + 8) / 14 s


@pytest.mark.parametrize("terminal", [True, False])
def test_the_losses_of_a_run_stay(tmp_path: Path, clock: Clock, terminal: bool):
    """At most some twenty lines of a long run, the first and the last among them, on a terminal as in a file."""
    text = io.StringIO()
    console = Console(file=text, width=120, force_terminal=terminal)
    with Monitor(tmp_path / "metrics.jsonl", 1230, 30, console) as shown:
        for step in range(31, 1231):
            shown.begin(step, 100)
            clock.now += 0.1
            shown.step(metrics(step))
    shown_lines = re.sub(r"\x1b\[[\d;?]*[A-Za-z]|\r", "\n", text.getvalue())
    steps = list(
        map(int, re.findall(r"^ +(\d+)/1230  loss 1.0000", shown_lines, re.MULTILINE))
    )  # the live line has a bar there
    assert steps == [31, *range(90, 1231, 60)]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120])
@pytest.mark.parametrize("total", [60, 123_456])
def test_a_narrow_terminal_takes_away_what_matters_least(tmp_path: Path, clock: Clock, width: int, total: int):
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    with Monitor(tmp_path / "metrics.jsonl", total, 0, console) as shown:
        shown.begin(1, 100)
        clock.now += 0.1
        shown.step(metrics(1) | {"tokens_per_second": 12345.6, "memory_gb": 12.3})
        line = shown._now().plain
    order = ["/", "loss", "ETA", "lr", "grad", "avg", "tok/s", "─", "GB", "MFU"]
    there = [name in line for name in order]
    assert there == sorted(there, reverse=True) and all(there[:2])
    assert len(line) < width and len(line) > min(width, 105) - 14
    if width >= 80:
        assert all(there[:6])


def test_a_long_step_says_how_far_it_is(tmp_path: Path, clock: Clock):
    text = io.StringIO()
    with Monitor(tmp_path / "metrics.jsonl", 5, 0, Console(file=text)) as shown:
        shown.begin(1, 8192)
        for tokens in (2048, 4096, 8192):
            clock.now += 45
            shown.reached(tokens)
    assert text.getvalue().splitlines() == [
        " step 1: 8,192 tokens",
        " step 1: 2,048 of 8,192 tokens",
        " step 1: 4,096 of 8,192 tokens",
    ]


def test_a_terminal_shows_the_step_that_goes_on(tmp_path: Path, clock: Clock):
    with Monitor(tmp_path / "metrics.jsonl", 5, 0, Console(file=io.StringIO(), force_terminal=True)) as shown:
        shown.begin(1, 8192)
        assert shown._now().plain == " step 1: 0 of 8,192 tokens, 0:00"
        clock.now += 65
        shown.reached(4096)
        assert shown._now().plain == " step 1: 4,096 of 8,192 tokens, 1:05"
        shown.step(metrics(1))
        assert shown._now().plain.startswith(" 1/5  loss 1.0000")
        shown.begin(2, 100)
        clock.now += 3
        first, second = shown._now().plain.split("\n")
        assert first.startswith(" 1/5  loss") and second == " step 2: 0 of 100 tokens, 0:03"


def test_the_roof_of_a_cpu_is_the_best_of_the_dtypes_that_a_run_may_use(monkeypatch: pytest.MonkeyPatch):
    rates = {torch.bfloat16: 1e9, torch.float32: 1e11}  # slow bf16
    monkeypatch.setattr(flops, "measured_flops", lambda device, dtype: rates[dtype])
    cpu = torch.device("cpu")
    assert flops.peak_flops(cpu, torch.bfloat16) == flops.peak_flops(cpu, torch.float32) == 1e11
    rates[torch.bfloat16] = 3e11
    assert flops.peak_flops(cpu, torch.bfloat16) == 3e11


def test_no_step_does_more_than_the_roof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Even where the roof was measured while another process had the machine."""
    monkeypatch.setattr("minilora.run.step.peak_flops", lambda device, dtype: 1.0)
    folder, rows = make_model(tmp_path / "model"), make_rows(tmp_path / "rows.json")
    train(resolve({"model": folder, "data": rows, "output": tmp_path / "run", "max_steps": 3}))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [0 < line["mfu"] <= 1 for line in lines] == [True] * 3 and lines[0]["mfu"] == 1
