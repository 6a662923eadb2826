"""The training loop: what it learns, writes and refuses."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from tiny import make_model, make_rows

import minilora
import minilora.train as module
from minilora.__main__ import main
from minilora.console import Console
from minilora.data import load_examples
from minilora.errors import Diverged, OutputInUse
from minilora.evaluate import evaluate
from minilora.files.safetensors import SafetensorsFile
from minilora.lora import adapters
from minilora.report.caveats import caveats
from minilora.report.record import read_record
from minilora.settings import resolve
from minilora.train import train

QUIET = Console(quiet=True)
KEYS = {
    "step", "epoch", "loss", "lr", "grad_norm", "tokens", "target_tokens", "tokens_per_second", "mfu", "memory_gb", "time",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    work = tmp_path_factory.mktemp("train")
    model, rows = make_model(work / "model"), make_rows(work / "rows.json")
    config = resolve(
        {
            "model": model,
            "data": rows,
            "output": work / "run",
            "lora_r": 16,
            "lr": 2e-2,
            "max_steps": 60,
            "device": "cpu",
        }
    )
    train(config, console=QUIET)
    return work / "run", config


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_its_rows(run):
    folder, config = run
    lines = metrics(folder)
    assert lines[-1]["loss"] < 0.2 * lines[0]["loss"]
    examples, _ = load_examples(config.data, minilora.load_tokenizer(config.model))
    base = minilora.load_model(config.model, device="cpu")
    before = evaluate(base, examples, 1000).loss
    minilora.load_adapter(base, folder / "adapter")
    assert evaluate(base.eval(), examples, 1000).loss < 0.2 * before


@pytest.mark.parametrize("family", ["qwen2", "glm", "glm4"])
def test_every_family_learns(tmp_path, family):
    model, rows = make_model(tmp_path / "model", model_type=family), make_rows(tmp_path / "rows.json")
    settings = {"model": model, "data": rows, "output": tmp_path / "run", "lr": 1e-2, "max_steps": 20, "device": "cpu"}
    train(resolve(settings), console=QUIET)
    lines = metrics(tmp_path / "run")
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]


def test_every_adapter_moved(run):
    folder, config = run
    start, end = (minilora.load_model(config.model, device="cpu") for _ in range(2))
    minilora.add_lora(start, r=16, seed=config.seed)
    minilora.load_adapter(end, folder / "adapter")
    for (_, a), (path, b) in zip(adapters(start), adapters(end), strict=True):
        for before, after in ((a.lora_A, b.lora_A), (a.lora_B, b.lora_B)):
            assert (before != after).double().mean() > 0.99, path


def test_metrics_count_what_was_trained(run):
    folder, config = run
    examples, report = load_examples(config.data, minilora.load_tokenizer(config.model))
    lines = metrics(folder)
    assert [m["step"] for m in lines] == list(range(1, 61)) and all(m.keys() == KEYS for m in lines)
    epoch = -(-len(examples) // config.batch_size)
    assert sum(m["tokens"] for m in lines[:epoch]) == report.tokens
    assert sum(m["target_tokens"] for m in lines[:epoch]) == report.trained
    assert lines[epoch - 1]["epoch"] == 1.0


def test_the_run_folder(run):
    folder, _ = run
    names = {p.name for p in folder.iterdir() if not p.name.startswith(".")}
    assert names - {"loss.png", "report.html"} == {
        "adapter",
        "checkpoints",
        "config.yaml",
        "data.json",
        "metrics.jsonl",
        "trained_rows.u64",
    }
    assert {p.name for p in (folder / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_finished_run_is_not_overwritten_by_chance(run):
    folder, config = run
    before = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(OutputInUse):
        train(config, console=QUIET)
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_the_same_run_twice_is_the_same_file(run, tmp_path):
    folder, config = run
    train(resolve(config.__dict__, {"output": tmp_path / "again"}), console=QUIET)
    files = [r / "adapter" / "adapter_model.safetensors" for r in (folder, tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_full_training_keeps_the_checkpoints_dtype(tmp_path):
    model, rows = make_model(tmp_path / "model", torch.bfloat16), make_rows(tmp_path / "rows.json")
    settings = {
        "model": model,
        "data": rows,
        "output": tmp_path / "run",
        "method": "full",
        "lr": 3e-3,
        "max_steps": 30,
        "device": "cpu",
    }
    train(resolve(settings), console=QUIET)
    lines = metrics(tmp_path / "run")
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert minilora.load_model(tmp_path / "run" / "model", device="cpu").head.dtype == torch.bfloat16
    exact = minilora.load_model(tmp_path / "run" / "checkpoints" / "last", device="cpu")
    file = SafetensorsFile(tmp_path / "run" / "checkpoints" / "last" / "model.safetensors")
    assert all(torch.equal(p, file.tensor(name)) for name, p in exact.named_parameters())


def test_a_model_that_its_dtype_cannot_hold_is_not_written(tmp_path):
    model, rows = make_model(tmp_path / "model", torch.float16), make_rows(tmp_path / "rows.json")
    settings = {"model": model, "data": rows, "output": tmp_path / "run", "method": "full", "lr": 1e6, "max_steps": 2}
    with pytest.raises(Diverged, match="beyond what float16"):
        train(resolve(settings, {"device": "cpu", "compute": "float32"}), console=QUIET)
    assert not (tmp_path / "run" / "model").exists() and (tmp_path / "run" / "checkpoints" / "last").exists()


def test_what_rounding_a_model_to_its_dtype_costs_is_told(tmp_path):
    model, rows = make_model(tmp_path / "model", torch.bfloat16), make_rows(tmp_path / "rows.json")
    settings = {"model": model, "data": rows, "output": tmp_path / "run", "method": "full", "lr": 1e-4, "max_steps": 3}
    text = said(resolve(settings, {"val": "4", "device": "cpu", "compute": "float32"}))
    found = re.search(r"rounded to bfloat16, as in config.json; .*: validation loss ([0-9.]+) now", text)
    rows = tmp_path / "run" / "data" / "val.jsonl"
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        words = ["--model", tmp_path / "run" / "model", "--data", rows, "--device", "cpu", "--compute", "float32"]
        assert main(["eval", *map(str, words)]) == 0
    assert found and f"loss        {found[1]} nats" in out.getvalue()
    assert f"its validation loss is {found[1]}" in (tmp_path / "run" / "report.html").read_text()
    assert any(f"validation loss is {found[1]}" in line for line in caveats([read_record(tmp_path / "run")]))


TURNING = {  # the validation loss turns at some step between two checkpoints
    "val": "4", "eval_every": 1, "save_every": 100, "seed": 5, "lr": 0.3, "schedule": "constant", "max_steps": 12, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module", params=["lora", "full"])
def turned(request, tmp_path_factory):
    """A finished run whose best step is none of the first and none of the last, its config and that step."""
    work = tmp_path_factory.mktemp("turned")
    model, rows = make_model(work / "model"), make_rows(work / "rows.json")
    more = {"method": "full", "lr": 0.06, "max_steps": 3} if request.param == "full" else {}
    config = resolve(TURNING, {"model": model, "data": rows, "output": work / "run"}, more)
    assert f"is step {config.max_steps}" not in said(config)
    losses = {m["step"]: m["val_loss"] for m in metrics(work / "run")}
    best = min(losses, key=lambda step: losses[step])
    assert 0 < best < config.max_steps
    return work / "run", config, best


def said(config, resume=False) -> str:
    """What a training prints."""
    text = io.StringIO()
    train(config, resume, console=Console(file=text, width=200))
    return text.getvalue()


def weights(folder: Path) -> bytes:
    return next(folder.glob("*model.safetensors")).read_bytes()


def test_the_best_step_is_what_a_run_leaves_behind(turned, tmp_path):
    run, config, best = turned
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    config, last = resolve(config.__dict__, {"output": tmp_path / "run"}), config.max_steps
    result = tmp_path / "run" / ("model" if config.method == "full" else "adapter")
    checkpoints = tmp_path / "run" / "checkpoints"
    kept = (checkpoints / "best").resolve()
    state = json.loads((kept / "state.json").read_text())
    assert kept.name == f"step-{best}" and state["best_step"] == best
    assert weights(result) == weights(kept) != weights(checkpoints / "last")

    text = said(resolve(config.__dict__, {"keep": "last"}), resume=True)  # nothing is left to do but this
    assert (
        f"is step {last} of {last}, the last, by --keep last; the lowest validation loss ({state['best_loss']:.4f})"
        in text
    )
    assert weights(result) == weights(checkpoints / "last")

    text = said(config, resume=True)
    assert f"is step {best} of {last}, the lowest validation loss ({state['best_loss']:.4f})\n" in text
    assert weights(result) == weights(kept)

    next(kept.glob("*model.safetensors")).write_bytes(b"broken")
    text = said(config, resume=True)
    assert f"is step {last} of {last}, the last: step {best} had the lowest" in text and "is damaged" in text
    assert weights(result) == weights(checkpoints / "last")


def test_a_run_that_fails_leaves_the_adapter_of_the_one_before(turned, tmp_path, monkeypatch):
    run, config, _ = turned
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{config.max_steps}")
    result = tmp_path / "run" / ("model" if config.method == "full" else "adapter")
    before = weights(result)

    def diverge(*_):
        raise Diverged("loss nan")

    monkeypatch.setattr(module, "train_step", diverge)
    with pytest.raises(Diverged):
        said(resolve(config.__dict__, {"output": tmp_path / "run"}), resume=True)
    assert weights(result) == before


def test_where_training_made_it_worse_the_last_step_is_kept(tmp_path):
    model, rows = make_model(tmp_path / "model"), make_rows(tmp_path / "rows.json")
    config = resolve(TURNING, {"model": model, "data": rows, "output": tmp_path / "run", "max_steps": 2})
    config = resolve(config.__dict__, {"method": "full", "lr": 10})
    text = said(config)
    assert "is step 2 of 2, the last: the lowest validation loss" in text and "was before training" in text
    assert weights(tmp_path / "run" / "model") == weights(tmp_path / "run" / "checkpoints" / "last")


def test_without_validation_rows_the_last_step_is_kept(tmp_path):
    model, rows = make_model(tmp_path / "model"), make_rows(tmp_path / "rows.json")
    text = said(resolve({"model": model, "data": rows, "output": tmp_path / "run", "max_steps": 2, "device": "cpu"}))
    assert "is step 2 of 2, the last\n" in text
