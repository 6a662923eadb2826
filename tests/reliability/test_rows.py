"""A small part of each row of bench/reliability, and each row's gate with a planted fault: it must be able to fail."""

import json
import os
import posix
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from itertools import count
from pathlib import Path
from unittest import mock

import pytest

from bench.reliability import (
    clock,
    errno_points,
    exact_resumes,
    forked,
    kill_points,
    power_cut,
    random_kills,
    scoreboard,
    signals,
    soak,
    system_calls,
    two_at_once,
)
from bench.reliability.commands import commands
from bench.reliability.disk import restore
from bench.reliability.invariants import Invariants
from minilora import __main__ as command_line
from minilora import train
from minilora.files import atomic
from minilora.files.atomic import make_folder
from minilora.run import ending, snapshot
from minilora.run import folder as run_folder

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
        assert not wrong(row.trials(invariants, 199 if "train" in name else 61)), name


def test_nothing_is_lost_with_the_power(every, training):
    assert not wrong(power_cut.trials(training, 300))
    assert not wrong(power_cut.trials(every["predict"], 50))


@pytest.mark.parametrize("row", [random_kills, signals, two_at_once, clock])
def test_nothing_is_lost_at_random(every, training, row):
    for invariants in (training, every["merge"]):
        assert not wrong(row.trials(invariants, 4, seed=0))


def test_a_resumed_run_of_two_ranks_has_the_same_bits(tmp_path, every):
    """From its first and second step of three, and killed after each; one rank's are those of tests/run/test_resume.py."""
    assert not wrong(exact_resumes.trials(tmp_path, exact_resumes.KINDS[-1], range(1, 3), total=3))


def test_nothing_grows(tmp_path, every):
    assert not wrong(soak.trials(tmp_path, 100))


needs_strace = pytest.mark.skipif(not system_calls.works(), reason="strace is not installed, or may not trace")


@needs_strace
def test_no_change_of_the_disk_is_missed(every, training):
    assert not wrong(system_calls.trials(training, 120))


# ---- planted faults: each is noticed


@contextmanager
def in_place(target: Path, manifest: bool = False) -> Iterator[Path]:
    """atomic_folder without its stage."""
    make_folder(target)
    yield target
    atomic._write_manifest(target)


def test_a_kill_point_notices_a_save_in_place(training, monkeypatch):
    monkeypatch.setattr(snapshot, "atomic_folder", in_place)
    assert any(kill_points.trials(training, 23))


def test_an_error_point_notices_a_wrong_exit_code(training, monkeypatch):
    monkeypatch.setattr(command_line, "fail", lambda code, what, hint="": 70)
    assert any(errno_points.trials(training, 61))


def test_a_random_kill_notices_weights_that_were_not_loaded(training, monkeypatch):
    monkeypatch.setattr(run_folder, "load_snapshot", lambda *_: None)
    assert any(random_kills.trials(training, 100, seed=0))


def test_a_pair_notices_a_stage_that_is_not_locked(every, monkeypatch):
    """As it was: one could take the other's output away, and say that all is well."""
    monkeypatch.setattr(atomic.fcntl, "flock", lambda *_: None)
    assert any(two_at_once.trials(every["merge"], 40, seed=0))


def test_a_long_run_notices_a_file_that_stays_open(tmp_path, every, monkeypatch):
    save = train.save
    monkeypatch.setattr(train, "save", lambda run: (save(run), os.open(run.folder, os.O_RDONLY)))
    assert wrong(soak.trials(tmp_path, 100))


def test_a_signal_notices_a_wrong_exit_code(training, monkeypatch):
    monkeypatch.setattr(command_line, "fail", lambda code, what, hint="": 70)
    assert any("exit code 70" in line for found in signals.trials(training, 30, seed=0) for line in found)


def test_a_jumping_clock_notices_snapshots_that_are_ordered_by_their_times(every, monkeypatch):
    rotate, resume = run_folder.rotate, every["train --resume"]

    def by_times(checkpoints: Path, *given) -> None:
        ordered = sorted(snapshot.snapshots(checkpoints), key=os.path.getmtime)
        with mock.patch.object(snapshot, "step_of", lambda folder: ordered.index(folder) - len(ordered)):
            rotate(checkpoints, *given)

    monkeypatch.setattr(run_folder, "rotate", by_times)
    assert not wrong(random_kills.trials(resume, 1, seed=0))  # the clock alone shows it
    assert any(clock.trials(resume, 20, seed=0))


def test_an_exact_resume_notices_dropout_that_begins_anew(tmp_path, every, monkeypatch):
    steps, keys = count(), train.set_dropout_keys
    monkeypatch.setattr(
        train, "set_dropout_keys", lambda model, seed, step, micro: keys(model, seed, next(steps), micro)
    )
    assert wrong(exact_resumes.trials(tmp_path, exact_resumes.KINDS[0], range(1, 2), total=3))


@needs_strace
def test_the_comparison_notices_a_change_past_the_numbered_functions(training, monkeypatch):
    monkeypatch.setattr(ending, "plot_loss", lambda run: posix.rename(run / "data.json", run / "other"))
    assert any(system_calls.bypasses(training.command))


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
        if not promise:
            continue
        restore(state, training.command.place)
        if any(training.kept(promise)):
            return
    raise AssertionError("not noticed")


def test_the_page_shows_the_table():
    page = scoreboard.PAGE.read_text().partition(scoreboard.START)[2].partition(scoreboard.END)[0]
    assert page.strip().splitlines() == scoreboard.table(json.loads(scoreboard.TABLE.read_text()))
