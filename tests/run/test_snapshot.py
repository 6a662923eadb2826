"""A snapshot holds what a step left, and no other model takes it; of the folders some are kept."""

import json
import os
from pathlib import Path

import pytest
import torch
from oracle import randomise, tiny, tiny_folder
from tiny import make_model

from minilora import add_lora, load_model
from minilora.errors import CheckpointMismatch
from minilora.files.atomic import added, atomic_folder, verify_manifest
from minilora.lora import trained_parameters
from minilora.methods.pissa import PiSSALinear, pissa_init
from minilora.run.setup import optimizer_of
from minilora.run.snapshot import (
    FILES,
    fill_trained_folder,
    load_snapshot,
    newest_snapshot,
    read_state,
    rotate,
    save_snapshot,
    snapshots,
)
from minilora.settings import resolve


def made(r: int = 2, targets: str = "attention", steps: int = 0, full: bool = False, **more):
    """A model and its optimizer after some steps of gradients that are the parameters themselves."""
    model = tiny()
    if full:
        model.requires_grad_(True)
    else:
        add_lora(model, targets, r=r, **more)
    optimizer = optimizer_of(model, resolve({"lr": 0.1}))
    for _ in range(steps):
        randomise(model)
        for p in trained_parameters(model).values():
            p.grad = p.detach().clone()
        optimizer.step()
    return model, optimizer


def state_of(model, optimizer):
    moments = {f"{n} {k}": v for n, p in trained_parameters(model).items() for k, v in optimizer.state[p].items()}
    return {n: p.detach() for n, p in trained_parameters(model).items()} | moments


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("full", [False, True])
def test_what_is_saved_comes_back_to_the_bit(tmp_path, steps, full):
    base = tiny_folder(tmp_path / "base")
    model, optimizer = made(steps=steps, full=full)
    save_snapshot(tmp_path / "step-2", model, optimizer, {"step": 2}, base, full)
    assert verify_manifest(tmp_path / "step-2") is None and read_state(tmp_path / "step-2") == {"step": 2}
    assert not (tmp_path / "step-2" / "trained.safetensors").exists()
    other, others = made(steps=0, full=full)
    load_snapshot(tmp_path / "step-2", other, others, full)
    saved, found = state_of(model, optimizer), state_of(other, others)
    assert saved.keys() == found.keys() and all(torch.equal(saved[name], found[name]) for name in saved)
    assert len(saved) == (4 if steps else 1) * len(trained_parameters(model))
    found[next(iter(found))].add_(1)  # its own memory, not the file's
    load_snapshot(tmp_path / "step-2", other, others, full)
    assert all(torch.equal(saved[name], value) for name, value in state_of(other, others).items())


def test_a_method_whose_adapter_file_holds_something_else_comes_back_too(tmp_path):
    """PiSSA's file holds the difference to its start."""
    model, optimizer = made(kind=PiSSALinear)
    pissa_init(model)
    save_snapshot(tmp_path / "step-0", model, optimizer, {}, tmp_path, False)
    other, others = made(kind=PiSSALinear)
    randomise(other)
    load_snapshot(tmp_path / "step-0", other, others, False)
    wanted, found = (trained_parameters(m) | dict(m.named_buffers()) for m in (model, other))
    assert any("start_A" in name for name in wanted) and all(torch.equal(p, found[name]) for name, p in wanted.items())


@pytest.mark.parametrize(
    ("other", "told"),
    [({"targets": "mlp"}, "has other tensors"), ({"r": 3}, r"is \[2, \d+\], this run has \[3, \d+\]")],
)
def test_another_model_is_refused(tmp_path, other, told):
    save_snapshot(tmp_path / "step-1", *made(steps=1), {}, tmp_path, False)
    with pytest.raises(CheckpointMismatch, match=told):
        load_snapshot(tmp_path / "step-1", *made(**other), False)


def test_moments_of_another_model_are_refused(tmp_path):
    save_snapshot(tmp_path / "step-1", *made(steps=1), {}, tmp_path, False)
    save_snapshot(tmp_path / "step-2", *made(targets="mlp", steps=1), {}, tmp_path, False)
    os.replace(tmp_path / "step-2" / "optimizer.safetensors", tmp_path / "step-1" / "optimizer.safetensors")
    with pytest.raises(CheckpointMismatch, match="has other tensors"):
        load_snapshot(tmp_path / "step-1", *made(), False)


def folders(checkpoints: Path) -> list[str]:
    return sorted(p.name for p in checkpoints.iterdir() if not p.is_symlink())


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step in (2, 4, 6, 8, 10, 12):
        (tmp_path / f"step-{step}").mkdir()
    (tmp_path / "step-7").touch()
    (tmp_path / "step-08").mkdir()
    assert sorted(p.name for p in snapshots(tmp_path)) == ["step-10", "step-12", "step-2", "step-4", "step-6", "step-8"]
    (tmp_path / ".tmp-step-1").mkdir()
    rotate(tmp_path, keep=2, step=10, best=4)  # that of step 12 is damaged
    assert folders(tmp_path) == ["step-08", "step-10", "step-12", "step-4", "step-7", "step-8"]
    assert os.readlink(tmp_path / "last") == "step-10" and os.readlink(tmp_path / "best") == "step-4"
    rotate(tmp_path, keep=1, step=12, best=3)  # whose snapshot was never written
    assert folders(tmp_path) == ["step-08", "step-12", "step-7"]
    assert os.readlink(tmp_path / "last") == "step-12" and os.readlink(tmp_path / "best") == "step-4"
    (tmp_path / "best").unlink()
    rotate(tmp_path, keep=1, step=12, best=None)
    assert not os.path.lexists(tmp_path / "best")


def test_a_snapshot_with_its_users_notes_stays(tmp_path):
    for step in (1, 2, 3):
        with atomic_folder(tmp_path / f"step-{step}", manifest=True) as stage:
            (stage / "state.json").touch()
    (tmp_path / "step-2" / "notes").write_text("precious")
    (tmp_path / "step-0").mkdir()
    (tmp_path / "step-0" / "notes").write_text("precious")  # no snapshot at all
    (tmp_path / ".tmp-merged").mkdir()  # which another command fills
    (tmp_path / "step-2" / "MANIFEST.json").write_text("{")  # a note is known as one all the same
    rotate(tmp_path, keep=1, step=3, best=None)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".tmp-merged", "last", "step-0", "step-2", "step-3"]


@pytest.mark.parametrize("full", [False, True])
def test_what_a_snapshot_holds_is_known_without_its_manifest(tmp_path, full):
    save_snapshot(tmp_path / "step-1", *made(steps=1, full=full), {}, tiny_folder(tmp_path / "base"), full)
    (tmp_path / "step-1" / "MANIFEST.json").write_text("{")
    assert added(tmp_path / "step-1", FILES) == []


def test_the_newest_whole_snapshot_is_found(tmp_path):
    state = {"step": 0, "seconds": 1, "best_loss": None, "best_step": 3, "identity": {}, "machine": {}}
    model, optimizer = made()
    for step in (9, 10, 11):
        save_snapshot(tmp_path / f"step-{step}", model, optimizer, state | {"step": step}, tmp_path, False)
    assert newest_snapshot(tmp_path) == (tmp_path / "step-11", [])
    (tmp_path / "step-11" / "state.json").write_text(json.dumps(state | {"step": 11}))
    found, skipped = newest_snapshot(tmp_path)
    assert found == tmp_path / "step-10" and [line[:15] for line in skipped] == ["skipped step-11"]
    assert newest_snapshot(tmp_path / "absent") == (None, [])


def test_a_full_snapshots_config_is_of_what_it_holds(tmp_path: Path):
    """Plain weights in fp32, of whatever form the base's are."""
    base = make_model(tmp_path / "model", torch.bfloat16)
    model = load_model(base, torch.float32, "cpu")
    config = json.loads((base / "config.json").read_text())
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (base / "config.json").write_text(json.dumps(config | quantised))
    (tmp_path / "step").mkdir()
    fill_trained_folder(tmp_path / "step", model, base, full=True)
    assert json.loads((tmp_path / "step" / "config.json").read_text()) == config | {"torch_dtype": "float32"}
