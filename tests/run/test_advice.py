"""Advice is given where a setting is far from what was published, and nowhere else."""

import json

import pytest
from tiny import make_model, make_rows

from minilora.__main__ import main
from minilora.config import TrainConfig
from minilora.run.advice import advice


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, ""),
        ({"lr": 1e-5}, "ten times"),
        ({"lr": 1e-5, "method": "full"}, ""),
        ({"lr": 2e-4, "method": "full"}, "a tenth"),
        ({"lr": 2e-4, "objective": "dpo"}, "5e-6"),
        ({"lr": 1e-5, "objective": "dpo"}, ""),
        ({"lora_targets": "attention"}, "attention alone"),
        ({"batch_size": 8, "accumulation": 9}, "72 rows"),
        ({"batch_size": 8, "accumulation": 8}, ""),
    ],
)
def test_each_rule(settings: dict, told: str):
    lines = advice(TrainConfig(**settings), trained=1_000_000, targets=1_000_000)
    assert len(lines) == bool(told) and told in "".join(lines)


def test_the_rank_that_would_hold_the_tokens():
    (line,) = advice(TrainConfig(lora_r=16), trained=1000, targets=5000)
    assert "rank 40 would" in line and 2 * 1000 * 40 / 16 >= 5000
    assert advice(TrainConfig(lora_r=16), trained=1000, targets=2000) == []


def test_train_and_plan_print_it(tmp_path, capsys):
    words = [
        "--model",
        str(make_model(tmp_path / "m")),
        "--data",
        str(make_rows(tmp_path / "rows.json")),
        "--lr",
        "1e-5",
    ]
    assert main(["train", *words, "--max-steps", "1", "--output", str(tmp_path / "run")]) == 0
    assert "advice  lr 1e-05" in capsys.readouterr().out
    assert main(["plan", *words]) == 0
    assert "advice  lr 1e-05" in capsys.readouterr().out
    assert main(["plan", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["advice"]
