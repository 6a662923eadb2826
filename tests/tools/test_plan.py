"""`minilora plan`: the dry run counts what a real step allocates, and the command tells it without weights or data."""

import json
from pathlib import Path

import pytest
import torch
from tiny import make_model, make_rows

import minilora
from minilora.__main__ import main
from minilora.checkpoint.load import empty_model, read_config
from minilora.data import load_examples, make_batch, pack
from minilora.run.setup import prepare
from minilora.settings import resolve
from minilora.tools.dry_run import _Live, step_memory

FLAGS = {"lora_r": 8, "dtype": "bfloat16"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "m", torch.bfloat16)


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("deep") / "m", torch.bfloat16, num_hidden_layers=7)


@pytest.mark.parametrize("depth", ["folder", "deep"])  # all layers are run, and three of seven
@pytest.mark.parametrize("settings", [{}, {"checkpointing": "on"}, {"method": "full"}, {"lora_dropout": 0.1}], ids=str)
def test_the_dry_run_counts_what_a_step_allocates(depth, request, tmp_path, settings):
    folder = request.getfixturevalue(depth)
    config = resolve({"model": str(folder)} | FLAGS | settings)
    examples, _ = load_examples(make_rows(tmp_path / "rows.json"), minilora.load_tokenizer(folder))
    batch = pack(examples, 300)[0]
    full = config.method == "full"
    dtype = torch.float32 if full else torch.bfloat16
    found = step_memory(prepare(empty_model(read_config(folder), dtype), config), batch)
    model = prepare(minilora.load_model(folder, dtype, "cpu", str(dtype).removeprefix("torch.")), config)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    base = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    live = _Live([*model.parameters(), batch.ids, batch.documents.positions, batch.target_index, batch.targets])
    with live:
        loss = model.loss(batch)
        kept = live.now
        loss.backward()
    assert (found.weights, found.adapters) == ((trained, 0) if full else (base, trained))
    assert (found.gradients, found.optimizer) == (trained, 2 * trained)
    assert found.activations == kept > 10_000
    assert found.temporaries == max(0, live.peak - kept - trained)


def test_a_storage_counts_while_it_lives():
    known = torch.zeros(100)
    live = _Live([known])
    with live:
        a = torch.zeros(1000)
        b = a[10:].view(-1)  # no bytes of its own
        known.add_(1)
        assert live.now == 4000
        del a
        assert live.now == 4000
        c = torch.ones(500, dtype=torch.float64)
        del b
        assert live.now == 4000 and live.peak == 8000
        del c
        assert live.now == 0


def test_recomputing_keeps_less(folder, tmp_path):
    examples, _ = load_examples(make_rows(tmp_path / "rows.json"), minilora.load_tokenizer(folder))
    kept = []
    for checkpointing in ("off", "on"):
        config = resolve({"model": str(folder), "checkpointing": checkpointing} | FLAGS)
        model = prepare(empty_model(read_config(folder), torch.bfloat16), config)
        kept.append(step_memory(model, make_batch(examples)).activations)
    assert kept[1] < kept[0] / 3


@pytest.fixture
def plan(capsys):
    def call(*arguments) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["plan", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out + err

    return call


def test_a_config_alone(plan, folder, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_bytes((folder / "config.json").read_bytes())
    arguments = ["--model", tmp_path / "m", "--lora_rank", 8, "--max-source-length", 40, "--max-target-length", 10]
    code, out = plan(*arguments, "--max-length", 120, "--json", "--compute", "bfloat16")
    found = json.loads(out)
    assert code == 0 and found["row_tokens"] == 50 and found["row_trained"] == 10
    assert found["step"]["stream_tokens"] == 100 and found["step"]["streams"] == 4  # two rows of 50 in 120
    assert found["parameters"] == sum(p.numel() for p in minilora.load_model(folder, device="cpu").parameters())
    memory = found["memory"]
    assert memory["total"] == sum(v for k, v in memory.items() if k != "total")
    # a stream of the size that is said to fit needs what the card has
    small = memory["total"] / 1e9 * 4
    most = json.loads(plan(*arguments, "--max-length", 120, "--json", "--device-memory", small)[1])["most_tokens"]
    rows = most // 50
    again = json.loads(
        plan(*arguments, "--max-length", 50 * rows, "--batch-size", rows, "--json", "--compute", "bfloat16")[1]
    )
    assert 0.85 < again["memory"]["total"] / 1e9 / small <= 1  # never more
    code, out = plan(*arguments, "--device-memory", 0.0001)
    assert code == 0 and "GB more than" in out


def test_with_data(plan, folder, tmp_path):
    rows = make_rows(tmp_path / "rows.json")
    code, out = plan("--model", folder, "--data", rows, "--batch-size", 4, "--epochs", 2)
    assert code == 0 and "14 rows" in out and "8 steps, 2 epochs" in out and "activations" in out
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_planned(plan, folder):
    assert plan()[0] == 2
    assert plan("--model", folder, "--lora_rnak", 8)[0] == 2
    assert plan("--model", folder, "--lora-targets", "nothing")[0] == 2
