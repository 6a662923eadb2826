"""A row that no stream has room for is named before training begins, with the length that fits."""

import json
from pathlib import Path

import pytest
import torch
from tiny import make_model

from minilora.__main__ import main
from minilora.checkpoint.load import empty_model, read_config
from minilora.data import make_batch
from minilora.machine import cpu
from minilora.machine.dry_run import step_memory
from minilora.run import fit
from minilora.run.setup import prepare
from minilora.settings import resolve
from minilora.tools.plan import _assumed_row

LENGTH = 5000  # letters of an answer; a token each


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Settings of a run whose third row is long."""
    rows = [{"instruction": "Say a.", "output": "a" * n} for n in (5, 20, LENGTH, 9)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    make_model(tmp_path / "m")
    given = {
        "model": tmp_path / "m",
        "data": tmp_path / "rows.json",
        "max_length": 10_000,
        "max_steps": 1,
        "compute": "float32",
    }
    return [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]


def bytes_of(folder: Path, tokens: int) -> int:
    """The memory of a step on one row of so many tokens, all trained."""
    model = prepare(empty_model(read_config(folder), torch.float32), resolve({"model": str(folder)}))
    return step_memory(model, make_batch([_assumed_row(resolve({"max_length": tokens}), False)])).total


def test_a_row_that_does_not_fit_is_named_with_the_length_that_does(words, tmp_path, monkeypatch, capsys):
    there = bytes_of(tmp_path / "m", 3000)
    monkeypatch.setattr(fit, "memory_gb", lambda device: there / 1e9)
    train = ["train", *words, f"--output={tmp_path / 'run'}"]
    assert main(train) == 7
    error = capsys.readouterr().err
    assert "row 3 has 5,0" in error and "--checkpointing makes room" in error and not list(tmp_path.glob("run/*"))
    fits = int(error.split("--max-length ")[1].split()[0])
    assert 0.97 * 3000 < fits <= 3000 and bytes_of(tmp_path / "m", fits) <= there
    assert f"a stream of about {fits:,}" in error
    assert main([*train, f"--max-length={fits}"]) == 0  # the other rows


def test_who_asks_for_streams_as_long_gets_them(words, tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "memory_gb", lambda device: 1e-3)
    assert main(["train", *words, f"--output={tmp_path / 'run'}", "--micro-tokens=6000"]) == 0


def test_plan_names_the_row_too(words, capsys):
    assert main(["plan", *words, "--device-memory=0.01"]) == 0
    out = capsys.readouterr().out
    assert "row 3 has 5,0" in out and "the 0.01 GB of a card take a stream of about" in out and "--max-length" in out
    assert main(["plan", *words, "--device-memory=8"]) == 0
    assert "row 3" not in capsys.readouterr().out


def test_where_the_base_fills_the_memory_a_smaller_base_is_the_way():
    what, hint = fit.long_row(resolve({}), "row 1", 70, 0, "the 8 GB of a card", True)
    assert "about 0" in what and "--quant nf4" in hint and "--max-length" not in hint
    _, hint = fit.long_row(resolve({"checkpointing": "on"}), "row 1", 70, 60, "the 8 GB of a card", True)
    assert hint.startswith("--offload on") and "--max-length 60" in hint


def test_the_memory_is_that_of_the_control_group(tmp_path, monkeypatch):
    here = torch.device("cpu")
    machine = cpu.memory_gb(here, tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert cpu.memory_gb(here, tmp_path) == machine
    (tmp_path / "memory.max").write_text("3000000\n")
    assert cpu.memory_gb(here, tmp_path) == 3e-3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert cpu.memory_gb(here, tmp_path) == 1e-3
