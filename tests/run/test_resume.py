"""A run that goes on from a checkpoint computes the bits of the run that was never stopped."""

import hashlib
import json
import os
import shutil
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from tiny import make_model, make_rows

from minilora.checkpoint.load import load_model
from minilora.console import Console
from minilora.errors import CheckpointMismatch, DiskError, Stopped
from minilora.files.atomic import MANIFEST
from minilora.run.folder import check_disk
from minilora.run.snapshot import newest_snapshot, read_state, snapshots, step_of
from minilora.settings import resolve
from minilora.train import train

STEPS = 8
QUIET = Console(quiet=True)
SETTINGS = {
    "max_steps": STEPS, "batch_size": 5, "micro_tokens": 120, "max_length": 120, "lora_dropout": 0.1, "lora_r": 4, "lr": 1e-2,
    "save_every": 1, "keep_checkpoints": 99, "val": "3", "eval_every": 3, "device": "cpu",
}  # fmt: skip


def losses(run):
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(m["step"], m.get("loss"), m.get("grad_norm"), m.get("lr"), m.get("val_loss")) for m in metrics]


def moments(run, step):
    return (run / "checkpoints" / f"step-{step}" / "optimizer.safetensors").read_bytes()


@pytest.fixture(scope="module", params=["lora fp32", "lora bf16", "full"])
def finished(request, tmp_path_factory):
    """A finished run with a checkpoint of every step, and its config."""
    work = tmp_path_factory.mktemp("resume")
    dtype = torch.bfloat16 if "bf16" in request.param else torch.float32
    model, rows = make_model(work / "model", dtype), make_rows(work / "rows.json")
    method = request.param.split()[0]
    config = resolve(SETTINGS, {"model": model, "data": rows, "output": work / "run", "method": method})
    train(config, console=QUIET)
    return work / "run", config


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_resumed_is_uninterrupted(finished, tmp_path, stop):
    run, config = finished
    other = tmp_path / "run"
    shutil.copytree(run, other, symlinks=True)
    for folder in snapshots(other / "checkpoints"):
        if step_of(folder) > stop:
            shutil.rmtree(folder)
    shutil.rmtree(other / ("model" if config.method == "full" else "adapter"))
    result = train(resolve(config.__dict__, {"output": other}), resume=True, console=QUIET)
    assert losses(other) == losses(run)
    assert moments(other, STEPS) == moments(run, STEPS)
    weights = "model.safetensors" if config.method == "full" else "adapter_model.safetensors"
    assert (result / weights).read_bytes() == (run / result.name / weights).read_bytes()


def test_a_damaged_checkpoint_is_skipped(finished, tmp_path):
    run, config = finished
    other = tmp_path / "run"
    shutil.copytree(run, other, symlinks=True)
    newest = other / "checkpoints" / f"step-{STEPS}" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    train(resolve(config.__dict__, {"output": other}), resume=True, console=QUIET)
    assert losses(other) == losses(run)


@pytest.mark.parametrize(
    ("name", "state", "told"),
    [
        ("step-900", {}, "is of step"),  # a copy under another name
        ("step-900", {"step": 900, "identity": []}, "another identity"),
        ("step-900", {"step": "900"}, "another step"),
        ("step-900", None, "damaged"),
        ("step-0000900", {"step": 900}, None),
        ("step-²", {"step": 2}, None),
    ],
)
def test_a_checkpoint_that_a_run_did_not_write_is_not_resumed_from(finished, tmp_path, capsys, name, state, told):
    run, _ = finished
    newest = run / "checkpoints" / f"step-{STEPS}"
    other = tmp_path / "run"
    shutil.copytree(run, other, symlinks=True)
    forged = other / "checkpoints" / name
    shutil.copytree(newest, forged)
    text = json.dumps([] if state is None else read_state(newest) | state).encode()
    (forged / "state.json").write_bytes(text)
    manifest = json.loads((forged / MANIFEST).read_bytes())
    manifest["state.json"] = {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    (forged / MANIFEST).write_text(json.dumps(manifest))
    found, skipped = newest_snapshot(other / "checkpoints")
    assert found is not None and found.name == newest.name
    assert told is None or told in skipped[0]


def test_lines_of_metrics_that_no_run_wrote_are_left_out(finished, tmp_path):
    run, config = finished
    other = tmp_path / "run"
    shutil.copytree(run, other, symlinks=True)
    with (other / "metrics.jsonl").open("a") as file:
        file.write('[1]\n3\nnull\n"step"\n{"step": "x"}\n{"loss": 1}\n')
    train(resolve(config.__dict__, {"output": other}), resume=True, console=QUIET)
    assert (other / "metrics.jsonl").read_text() == (run / "metrics.jsonl").read_text()


def test_other_settings_are_refused(finished):
    _, config = finished
    with pytest.raises(CheckpointMismatch, match="lr: 0.01 then, 0.02 now"):
        train(resolve(config.__dict__, {"lr": 0.02}), resume=True, console=QUIET)


def test_a_run_from_before_a_setting_had_its_default(finished, tmp_path, monkeypatch):
    run, config = finished
    shutil.copytree(run, tmp_path / "run", symlinks=True)

    def older(folder):
        state = read_state(folder)
        assert state["identity"].pop("quant") == "keep"
        return state

    monkeypatch.setattr("minilora.run.folder.read_state", older)
    again = resolve(config.__dict__, {"output": tmp_path / "run"})
    train(again, resume=True, console=QUIET)
    assert losses(tmp_path / "run") == losses(run)
    if config.method == "lora":
        with pytest.raises(CheckpointMismatch, match="quant: keep then, int8 now"):
            train(resolve(again.__dict__, {"quant": "int8"}), resume=True, console=QUIET)


def test_a_signal_saves_and_the_run_goes_on(finished, tmp_path):
    run, config = finished
    other = resolve(config.__dict__, {"output": tmp_path / "run", "save_every": 1000})
    timer = threading.Thread(target=_interrupt_when, args=(tmp_path / "run" / "metrics.jsonl",))
    timer.start()
    with pytest.raises(Stopped, match="Ctrl-C"):
        train(other, console=QUIET)
    timer.join()
    train(other, resume=True, console=QUIET)
    assert losses(tmp_path / "run") == losses(run)


def _interrupt_when(metrics):
    """Ctrl-C as soon as a first step is done."""
    while not (metrics.exists() and metrics.read_text().count('"loss"')):
        pass
    os.kill(os.getpid(), signal.SIGINT)


def test_rotation_keeps_the_newest_and_the_best(finished, tmp_path):
    _, config = finished
    run = tmp_path / "run"
    train(
        resolve(config.__dict__, {"output": run, "keep_checkpoints": 2, "lr": 0.5, "schedule": "constant"}),
        console=QUIET,
    )
    steps = sorted(map(step_of, snapshots(run / "checkpoints")))
    assert steps[-2:] == [STEPS - 1, STEPS] and len(steps) <= 3
    assert (run / "checkpoints" / "last").resolve().name == f"step-{STEPS}"


def test_a_resumed_run_asks_for_the_disk_that_it_still_needs(finished, monkeypatch):
    """Nearly full: enough for one more snapshot, not for all that the run keeps, which are there already."""
    run, config = finished
    model = load_model(config.model, device="cpu").requires_grad_(True)
    one = 12 * sum(p.numel() for p in model.parameters()) + (1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=one))
    check_disk(run, model, keep=STEPS - 1)
    with pytest.raises(DiskError, match="checkpoints need"):
        check_disk(run, model, keep=STEPS + 1)
