"""A small part of each row of bench/reliability, and each row's gate with a planted fault: it must be able to fail."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import pytest

from bench.reliability import errno_points, forked, kill_points, power_cut, random_kills
from bench.reliability.commands import commands
from bench.reliability.disk import restore
from bench.reliability.invariants import Invariants
from minilora import __main__ as command_line
from minilora.files import atomic
from minilora.files.atomic import make_folder
from minilora.run import folder as run_folder
from minilora.run import snapshot

pytestmark = [
    pytest.mark.xdist_group("reliability"),  # what they start from is made once
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of forks
]


@pytest.fixture(scope="module")
def every() -> Iterator[dict[str, Invariants]]:
    """The commands by name, with what must hold of each."""
    with forked.workplace() as work:
        yield {command.name: Invariants(command) for command in commands(work)}


@pytest.fixture
def training(every) -> Invariants:
    return next(iter(every.values()))


def wrong(trials) -> list[str]:
    return [line for found in trials for line in found]


@pytest.mark.parametrize("row", [kill_points, errno_points])
def test_nothing_is_lost_at_a_durable_operation(every, row):
    for name, invariants in every.items():
        assert not wrong(row.trials(invariants, 97 if "train" in name else 61)), name


def test_nothing_is_lost_at_random_times(every, training):
    for invariants in (training, every["merge"]):
        assert not wrong(random_kills.trials(invariants, 10, seed=0))


def test_nothing_is_lost_with_the_power(every, training):
    assert not wrong(power_cut.trials(training, 250))
    assert not wrong(power_cut.trials(every["predict"], 30))


# ---- planted faults: each is noticed


@contextmanager
def in_place(target: Path, manifest: bool = False) -> Iterator[Path]:
    """atomic_folder without its stage."""
    make_folder(target)
    yield target
    atomic._write_manifest(target)


def test_a_kill_point_notices_a_save_in_place(training, monkeypatch):
    monkeypatch.setattr(snapshot, "atomic_folder", in_place)
    assert any(kill_points.trials(training, 9))


def test_an_error_point_notices_a_wrong_exit_code(training, monkeypatch):
    monkeypatch.setattr(command_line, "fail", lambda code, what, hint="": 70)
    assert any(errno_points.trials(training, 61))


def test_a_random_kill_notices_weights_that_were_not_loaded(training, monkeypatch):
    monkeypatch.setattr(run_folder, "load_snapshot", lambda *_: None)
    assert any(random_kills.trials(training, 100, seed=0))


FLUSHED = ("optimizer.safetensors", "MANIFEST.json", ".tmp-step-1", "checkpoints", "metrics.jsonl", "out", "place")


@pytest.fixture(scope="module")
def before_power_cut(every):
    """The disk before the training, and what the training does to it."""
    return power_cut.recorded(next(iter(every.values())).command)


@pytest.mark.parametrize("name", FLUSHED)
def test_a_power_cut_notices_every_flush_that_is_dropped(training, before_power_cut, name):
    disk, log = deepcopy(before_power_cut)
    without = [o for o in log if o.kind != "fsync" or Path(o.path).name != name]
    assert len(without) < len(log)
    for _, promise, state in power_cut.states(disk, without):
        restore(state, training.command.place)
        if any(training.kept(promise)):
            return
    raise AssertionError("not noticed")
