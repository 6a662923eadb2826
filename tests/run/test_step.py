"""A step is launched whole and its numbers are read later: what is written, and what a loss that is not finite may touch."""

import itertools
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from oracle import tiny
from tiny import make_model, make_rows

from minilora import add_lora
from minilora.console import Console
from minilora.data import Batch, Example, make_batch
from minilora.errors import Diverged, Stopped
from minilora.objective import LOGGED
from minilora.ranks.ranks import Ranks
from minilora.run import step as step_module
from minilora.run.fit import stream_tokens
from minilora.run.folder import Progress
from minilora.run.setup import optimizer_of
from minilora.run.step import StepLog, StepResult
from minilora.settings import resolve
from minilora.train import train, train_step, update

CONFIG = resolve({"lr": 0.1, "clip": 1.0})


class Later(StepResult):
    """Its device is always busy."""

    @property
    def ready(self) -> bool:
        return False


def batch() -> Batch:
    return make_batch([Example(np.arange(3, 20), np.arange(4, 21), "row 7")])


def trained(**options: Any) -> tuple[Any, Any]:
    model = tiny("qwen2")
    add_lora(model, r=2, **options)
    return model, optimizer_of(model.train(), CONFIG)


def values(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def run_of(tmp_path: Path, name: str, **settings: Any) -> Path:
    model, rows = tmp_path / "model", tmp_path / "rows.json"
    if not model.exists():
        make_model(model)
        make_rows(rows)
    base = {"model": model, "data": rows, "output": tmp_path / name, "max_steps": 7, "device": "cpu", "save_every": 3}
    train(resolve(base | settings), console=Console(quiet=True))
    return tmp_path / name


def lines(run: Path) -> list[dict[str, Any]]:
    timed = ("tokens_per_second", "mfu", "memory_gb", "time")
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in timed} for line in found]


@pytest.mark.parametrize(("longest", "steps"), [(0, [1, 2]), (1e6, [])])
def test_the_report_follows_a_run_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longest: float, steps: list
):
    """Behind a snapshot that is not the last, if the report is old enough."""
    clock, written = itertools.count(1e9), []
    monkeypatch.setattr("minilora.train.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr("minilora.train.REFRESH", longest)
    monkeypatch.setattr("minilora.train.report_quietly", lambda run: written.append(len(lines(run))))
    run_of(tmp_path, "run", max_steps=3, save_every=1)
    assert written == steps


@pytest.mark.parametrize(("clip", "factor"), [(0.0, 1.0), (2.5, 0.5), (9.0, 1.0)])
def test_gradients_are_clipped_by_the_norm_of_all(clip: float, factor: float):
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad, parameters[2].grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    optimizer = torch.optim.SGD(parameters, lr=1.0, fused=True)
    numbers = update(optimizer, torch.tensor([1.0, 7.0, 8.0]), torch.tensor(2.0, dtype=torch.float64), clip)
    assert numbers.tolist() == [1, 5, 2, 7, 8, 3, 4] and numbers.dtype == torch.float32
    wanted = torch.tensor([-3.0, 0, 0, 0, 0, -4.0]) * factor
    torch.testing.assert_close(torch.cat([p.detach() for p in parameters]), wanted, rtol=1e-6, atol=0)


class Two(Ranks):
    """The first of two ranks, the other of which has no stream, or all of them."""

    def __init__(self, streams: list[int]):
        super().__init__(count=2)
        self.streams = streams

    def own(self, lengths: list[int]) -> list[int]:
        return self.streams

    def note(self, lengths: list[int]) -> str:
        return "two"


def test_a_signal_ends_a_step_between_streams_or_with_other_ranks_after_it():
    model, optimizer = trained()
    before, stop, reached = values(model), cast(Any, SimpleNamespace(requested=False)), []

    def ends(tokens: int) -> None:
        reached.append(tokens)
        stop.requested = True

    with pytest.raises(Stopped):
        train_step(model, optimizer, [batch(), batch()], CONFIG, 0, stop, ends)
    assert reached == [17] and all(map(torch.equal, values(model), before))
    assert all(p.grad is None for p in model.parameters())
    result = train_step(model, optimizer, [batch(), batch()], CONFIG, 0, stop, ends, ranks=Two([0, 1]))
    result.read()
    assert result.stops and reached == [17, 17, 34] and not all(map(torch.equal, values(model), before))
    result = train_step(model, optimizer, [batch()], CONFIG, 1, None, ends, ranks=Two([0]))
    assert result.read()[0] > 0 and not result.stops


def test_ranks_stop_behind_the_same_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The signal comes in the third; that all know of it is read while the fourth is on its way."""

    def interrupted(*args: Any) -> StepResult:
        if args[4] == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(*args)

    asked = []
    monkeypatch.setattr("minilora.train.train_step", interrupted)
    monkeypatch.setattr("minilora.train.join", lambda timeout: Two([0]))
    monkeypatch.setattr(
        "minilora.run.schedule.stream_tokens", lambda *given: asked.append(given[4:]) or stream_tokens(*given)
    )
    with pytest.raises(Stopped):
        run_of(tmp_path, "run", save_every=100, micro_tokens=10_000, batch_size=5)
    assert asked == [(3, 1)]  # of five rows a rank has up to three; no base is shared
    assert (tmp_path / "run" / "checkpoints" / "last").readlink() == Path("step-4")
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_rank_without_a_stream_adds_nothing():
    model, optimizer = trained()
    result = train_step(model, optimizer, [batch()], resolve({"objective": "dpo"}), 0, ranks=Two([]))
    assert result.read() == (0, 0) and result.logged == dict.fromkeys(LOGGED, 0)
    assert set(result.grad_norms().values()) == {0} and len(result.grad_norms()) == len(list(optimizer.state))


def test_a_step_takes_the_time_since_the_one_before_was_read(monkeypatch: pytest.MonkeyPatch):
    now, written, opened = [1000.0], [], []
    monkeypatch.setattr(step_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    for name, flops in (("peak_flops", 1e12), ("step_flops", 1e12), ("flops_per_token", 0.0)):
        monkeypatch.setattr(step_module, name, lambda *_, flops=flops: flops)
    run: Any = SimpleNamespace(
        model=tiny("qwen2"), config=CONFIG, progress=Progress(step=4, seconds=100.0), ranks=SimpleNamespace(count=2, first=True),
        plan=SimpleNamespace(full=False, steps_per_epoch=2),
    )  # fmt: skip
    monitor: Any = SimpleNamespace(
        step=written.append, loggers=SimpleNamespace(open=lambda *given: opened.append(given))
    )
    log = StepLog(run, monitor)
    assert opened == [(CONFIG, 4)]

    def launch(step: int, began: float, ends: float, ready: bool, stops: bool = False) -> None:
        now[0] = ends
        result: Any = SimpleNamespace(
            batches=[batch()] * 2, step=step, ready=ready, stops=stops, logged={"margin": 7.0}, read=lambda: (1.0, 2.0)
        )
        log.add(result, 0.5, began, extra=step)

    launch(4, 1002, 1010, ready=True)
    launch(5, 1005, 1011, ready=False, stops=True)  # behind the other, so that it begins at 1010
    assert [line["step"] for line in written] == [5] and run.progress.step == 6 and not log.stopping
    now[0] = 1014
    log.write(val_loss=3.0)
    log.write()
    launch(6, 1014, 1014.25, ready=True)
    assert log.stopping
    with log:
        pass
    keys = ("step", "epoch", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "mfu", "time", "margin", "extra")
    assert [[line[key] for key in keys] for line in written] == [
        [5, 2.5, 1.0, 2.0, 0.5, 34, 4.2, 0.0625, 110.0, 7.0, 4],
        [6, 3.0, 1.0, 2.0, 0.5, 34, 8.5, 0.125, 114.0, 7.0, 5],
        [7, 3.5, 1.0, 2.0, 0.5, 34, 136.0, 1.0, 114.25, 7.0, 6],  # no step does more than the roof
    ]
    assert [line.get("val_loss") for line in written] == [None, 3.0, None]


def test_a_run_read_one_step_behind_writes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = {"val": "4", "eval_every": 2}
    now = run_of(tmp_path, "now", **settings)
    monkeypatch.setattr("minilora.train.StepResult", Later)
    later = run_of(tmp_path, "later", **settings)
    assert lines(now) == lines(later) and [line["step"] for line in lines(now)] == list(range(8))
    weights = [run / "adapter" / "adapter_model.safetensors" for run in (now, later)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(monkeypatch: pytest.MonkeyPatch):
    """Nor are those launched before it was read; then training goes on."""
    model, optimizer = trained()
    train_step(model, optimizer, [batch()], CONFIG, 0).read()
    before, moments = values(model), [s["exp_avg"].clone() for s in optimizer.state.values()]
    (name, first) = next((n, p) for n, p in model.named_parameters() if n.endswith("layers.1.mlp.up_proj.lora_B"))
    handle = first.register_hook(lambda g: g.index_fill(0, torch.tensor(1), float("inf")))
    broken = train_step(model, optimizer, [batch()], CONFIG, 1)
    handle.remove()
    next_one = train_step(model, optimizer, [batch()], CONFIG, 2)  # finite, but it stands on nothing
    assert all(map(torch.equal, values(model), before))
    assert all(torch.equal(s["exp_avg"], m) for s, m in zip(optimizer.state.values(), moments, strict=True))
    assert {float(s["step"]) for s in optimizer.state.values()} == {1.0}
    with pytest.raises(Diverged, match=f"step 2: loss .*first bad gradient: {name}; rows: row 7"):
        broken.read()
    assert next_one.read()[0] > 0
    train_step(model, optimizer, [batch()], CONFIG, 1).read()
    assert not all(map(torch.equal, values(model), before))


def test_a_loss_that_is_not_finite_is_told_where_all_gradients_are():
    model, optimizer = trained()
    train_step(model, optimizer, [batch()], CONFIG, 0).read()
    numbers = torch.tensor([float("inf"), 1.0, 0.0, *[1.0] * len(optimizer.state)])
    with pytest.raises(Diverged, match=r"loss inf, gradient norm 1\.0 \(first bad gradient: none"):
        StepResult(model, optimizer, [batch()], 0, numbers, ()).read()


def test_a_run_that_diverges_behind_a_launch_keeps_its_last_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs = []
    for name, kind in (("now", StepResult), ("later", Later)):
        monkeypatch.setattr("minilora.train.StepResult", kind)
        with pytest.raises(Diverged, match=r"step \d+: loss nan"):
            run_of(tmp_path, name, lr=1e30, save_every=1)
        runs.append(tmp_path / name)
    now, later = ({p.name for p in (run / "checkpoints").iterdir()} for run in runs)
    assert now == later and lines(runs[0]) == lines(runs[1]) and len(lines(runs[0])) > 0
    for snapshot in sorted(now):
        files = [run / "checkpoints" / snapshot / "adapter_model.safetensors" for run in runs]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("settings", [{"lr": 1e300}, {"weight_decay": 1e300}])
def test_weights_that_the_last_update_broke_are_not_saved(tmp_path: Path, settings: dict[str, float]):
    """Its loss and its gradients are finite, and no later step tells."""
    with pytest.raises(Diverged, match="step 1: .*lora_A is not finite after the update"):
        run_of(tmp_path, "run", max_steps=1, **settings)
    assert not (tmp_path / "run" / "adapter").exists() and not (tmp_path / "run" / "checkpoints").exists()


def test_what_fails_behind_an_unread_step_is_saved_with_that_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("minilora.train.StepResult", Later)

    def fails(*args: Any) -> StepResult:
        if args[4] == 5:
            raise RuntimeError("the device is gone")
        return train_step(*args)

    monkeypatch.setattr("minilora.train.train_step", fails)
    with pytest.raises(RuntimeError, match="gone"):
        run_of(tmp_path, "run")
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4, 5]
    saved = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == ["last", "step-3", "step-5"]
    assert (tmp_path / "run" / "checkpoints" / "last").readlink() == Path("step-5")
