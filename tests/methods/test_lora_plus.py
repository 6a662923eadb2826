"""LoRA+: two rates, and everything that is written by parameter still of the right one."""

import json

import pytest
import torch
from oracle import conversations, tiny
from tiny import make_model, make_rows

from minilora import add_lora
from minilora.console import Console
from minilora.data import make_batch
from minilora.errors import UsageError
from minilora.lora import trained_parameters
from minilora.run.schedule import set_learning_rate
from minilora.run.setup import optimizer_of
from minilora.settings import resolve
from minilora.train import train, train_step

SETTINGS = {"max_steps": 4, "batch_size": 5, "lora_r": 4, "lr": 1e-2, "save_every": 2, "device": "cpu"}


def test_b_moves_by_its_own_rate_and_norms_keep_their_names():
    config = resolve({"loraplus_lr_ratio": 8, "lora_r": 3, "clip": 0})
    model = tiny()
    add_lora(model, r=3)
    optimizer = optimizer_of(model.train(), config)
    set_learning_rate(optimizer, 1e-3)
    before = {n: p.detach().clone() for n, p in trained_parameters(model).items()}
    result = train_step(model, optimizer, [make_batch(conversations("qwen2"))], config, 0)
    norms = result.grad_norms()
    for name, p in trained_parameters(model).items():
        moved = (p.detach() - before[name]).abs().max().item()
        if name.endswith("lora_B"):  # Adam's first step is the rate
            assert moved == pytest.approx(8e-3, rel=1e-3) and norms[name] > 0
        else:  # B is zero
            assert moved == 0 and norms[name] == 0


def test_metrics_say_both_rates_and_a_resumed_run_has_the_same_bits(tmp_path):
    model, rows = make_model(tmp_path / "model"), make_rows(tmp_path / "rows.json")
    given = SETTINGS | {"model": model, "data": rows, "loraplus_lr_ratio": 16}
    whole = train(resolve(given, {"output": tmp_path / "a"}), console=Console(quiet=True))
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert all(m["lr_b"] == 16 * m["lr"] for m in lines) and len(lines) == 4
    import shutil

    shutil.copytree(tmp_path / "a", tmp_path / "b", symlinks=True)
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-4")
    again = train(resolve(given, {"output": tmp_path / "b"}), resume=True, console=Console(quiet=True))
    name = "adapter_model.safetensors"
    assert (whole / name).read_bytes() == (again / name).read_bytes()


def test_a_ratio_needs_a_b():
    model = tiny().requires_grad_(True)
    with pytest.raises(UsageError, match="adapters with a B"):
        optimizer_of(model, resolve({"loraplus_lr_ratio": 4}))
    assert torch.is_tensor(model.head)
