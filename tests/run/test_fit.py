"""A row that no stream has room for is named before training begins, with the length that fits."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_model

from minilora.__main__ import main
from minilora.checkpoint.load import empty_model, read_config
from minilora.data import make_batch
from minilora.errors import OutOfMemory
from minilora.machine import cpu
from minilora.machine.dry_run import StepMemory, step_memory
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


FIXED = {"weights": 0, "adapters": 0, "gradients": 0, "optimizer": 0, "host": 0}


@pytest.mark.parametrize(
    ("given", "longest", "rows", "tokens", "twice"),
    [
        ({}, 10, 1000, 8500, False),  # what 85 % of the memory takes
        ({}, 10, 100, 1000, True),  # the rows of a step
        ({}, 9000, 1, 9000, False),  # the longest row, whether it fits or not
        ({"micro_tokens": 300}, 10, 1000, 300, True),
        ({"micro_tokens": 300}, 400, 1000, 400, True),
    ],
)
def test_a_stream_on_a_gpu_is_as_long_as_its_memory_takes(monkeypatch, given, longest, rows, tokens, twice):
    """A byte a token, beside the logits of a chunk."""
    monkeypatch.setattr(fit, "_trial_stream", lambda trial: trial)
    monkeypatch.setattr(fit, "step_memory", lambda *_: StepMemory(**FIXED, activations=fit.TRIAL, temporaries=0))
    trial: Any = SimpleNamespace(config=SimpleNamespace(vocab=7), compute_dtype=torch.bfloat16)
    logits = 7 * fit.CHUNK_ROWS_CUDA * 2
    there = (8500 + logits) / fit.SHARE + 1e-6
    found = fit.streams_on_card(resolve(given), trial, there, longest, rows)
    assert found == (tokens, twice, int(there - logits))
    most = fit.streams_on_card(resolve({}), trial, 1e9, longest, 10**9)
    assert most.tokens == fit.LARGEST


def test_ranks_that_share_a_base_keep_their_part_of_it(monkeypatch):
    memory, asked = StepMemory(**FIXED | {"weights": 100}, activations=3, temporaries=0), []
    monkeypatch.setattr(fit, "shard_bytes", lambda *given: asked.append(given) or SimpleNamespace(kept=25, buffers=7))
    model: Any = object()
    assert fit.rank_memory(memory, model, 1, ahead=True) is memory and not asked
    assert fit.rank_memory(memory, model, 2, ahead=True).total == 35 and asked == [(model, 2, True)]


class Rows(dict):
    """Examples by their columns."""

    def column(self, name: str) -> np.ndarray:
        return np.array(self[name])

    def __getitem__(self, key: Any) -> Any:
        return SimpleNamespace(where=f"row {key}") if isinstance(key, int) else super().__getitem__(key)


def test_the_longest_row_and_the_longest_document():
    """A pair is two documents."""
    rows: Any = Rows(length=[6, 9, 8], second=[0, 5, 1])
    assert fit.longest_row(rows) == "row 1" and fit.longest_document(rows) == ("row 2", 7)


def test_a_row_as_long_as_the_room_fits():
    rows: Any = Rows(length=[6, 70])
    rows.longest, here = 70, torch.device("cpu")
    fit.check_longest(resolve({}), rows, 70, here)
    fit.check_longest(resolve({"micro_tokens": 70}), rows, 7, here)
    with pytest.raises(OutOfMemory, match="row 1 has 70 tokens"):
        fit.check_longest(resolve({"micro_tokens": 69}), rows, 69, here)


@pytest.mark.parametrize(("tokens", "told"), [(7.9, 7), (999, 999), (1000, 1000), (1009, 1000), (123_456, 123_000)])
def test_an_estimate_has_three_digits(tokens, told):
    assert fit.round_down(tokens) == told


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
