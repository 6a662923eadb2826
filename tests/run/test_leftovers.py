"""What a kill or a failing disk leaves behind: a folder that the next command accepts, and nothing hidden in it for good."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tiny import make_model, make_rows

from minilora.__main__ import main
from minilora.errors import OutputInUse
from minilora.files import atomic
from minilora.files.atomic import atomic_folder, new_folder, require_empty, write_file
from minilora.run import folder as run_folder
from minilora.run import signals
from minilora.run.folder import OWN, check_output, clear
from minilora.run.signals import StopSignal

ROOT = Path(__file__).parents[2]


class Killed(BaseException):
    """The process is gone: nothing handles it."""


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A model, rows and a run of two steps."""
    here = tmp_path_factory.mktemp("here")
    make_model(here / "model")
    make_rows(here / "rows.json")
    assert main([*words(here), "--output", str(here / "run")]) == 0
    assert len((here / "run" / "data" / "val.jsonl").read_text().splitlines()) == 2
    return here


def words(here: Path) -> list[str]:
    settings = [
        "--lora-r",
        "2",
        "--max-steps",
        "2",
        "--save-every",
        "1",
        "--batch-size",
        "4",
        "--device",
        "cpu",
        "--val",
        "2",
    ]
    return ["train", "--model", str(here / "model"), "--data", str(here / "rows.json"), *settings]


@pytest.fixture
def run(tmp_path, here) -> Path:
    return shutil.copytree(here / "run", tmp_path / "run", symlinks=True)


def dies(monkeypatch, module, name: str, number: int, error: BaseException, after: bool = False) -> None:
    """Let the call of that number of a function raise, before or after it does its work."""
    call, calls = getattr(module, name), iter(range(10_000))

    def stand_in(*args, **kwargs):
        if next(calls) != number:
            return call(*args, **kwargs)
        if after:
            call(*args, **kwargs)
        raise error

    monkeypatch.setattr(module, name, stand_in)


@pytest.mark.parametrize("name", ["discard", "remove", "write_file"])
def test_clearing_can_be_killed_anywhere(run, tmp_path, monkeypatch, name):
    """Before and after a deletion the folder is a run's, which --overwrite takes; at the end only its marks are left."""
    for number in range(0, 1 if name == "write_file" else len(OWN), 3):
        for after in (False, True):
            part = shutil.copytree(run, tmp_path / "part", symlinks=True)
            (part / ".tmp-data").mkdir()
            with monkeypatch.context() as patch, pytest.raises(Killed):
                dies(patch, run_folder, name, number, Killed(), after)
                clear(part)
            check_output(part, resume=False, overwrite=True)
            clear(part)
            assert {p.name for p in part.iterdir()} == {".lock", "config.yaml", "metrics.jsonl"}
            shutil.rmtree(part)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of files that a kill leaves open
@pytest.mark.parametrize("old", [False, True])
def test_starting_can_be_killed_anywhere(run, tmp_path, here, monkeypatch, old):
    """At each of the first writes of a run; the same command with --overwrite starts it."""
    for number in (0, 1, 3):
        folder = tmp_path / f"{number}"
        if old:
            shutil.copytree(run, folder, symlinks=True)
        else:
            folder.mkdir()
            (folder / ".lock").touch()
        with monkeypatch.context() as patch, pytest.raises(Killed):
            dies(patch, run_folder, "write_file", number, Killed())
            main([*words(here), "--output", str(folder), *(["--overwrite"] if old else [])])
        check_output(folder, resume=False, overwrite=True)
    assert main([*words(here), "--output", str(folder), "--overwrite"]) == 0
    assert sorted(p.name for p in folder.glob(".*")) == [".lock"]


def test_foreign_folders_are_still_no_runs(tmp_path):
    for names in (["config.yaml"], ["config.yaml", "data"], ["metrics.jsonl"], ["metrics.jsonl", "data"]):
        folder = tmp_path / "-".join(names)
        folder.mkdir()
        for name in names:
            (folder / name).write_text("mine")
        with pytest.raises(Exception, match="holds no run"):
            check_output(folder, resume=False, overwrite=True)
        with pytest.raises(Exception, match="is not empty"):
            check_output(folder, resume=False, overwrite=False)


def test_the_next_run_takes_away_what_was_left_of_links_and_checkpoints(run):
    """As after a kill in the middle of the last save: no step follows that would save again."""
    checkpoints = run / "checkpoints"
    (checkpoints / ".tmp-last").symlink_to("step-2")
    (checkpoints / ".tmp-best").symlink_to("step-1")
    shutil.copytree(checkpoints / "step-1", checkpoints / ".tmp-step-1")
    (checkpoints / "last").unlink()
    (checkpoints / "last").symlink_to("step-1")
    assert main(["train", "--output", str(run), "--resume"]) == 0
    assert not list(run.rglob(".tmp-*")) and os.readlink(checkpoints / "last") == "step-2"


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(("name", "last"), [("rename", 0), ("rename", 1), ("sync", 1), ("sync", 2)])
def test_a_folder_that_says_failed_is_not_there(tmp_path, monkeypatch, name, last, old):
    """Also where the last rename or flush did its work and failed nevertheless: the next try finds what was there before."""
    out = tmp_path / "out"
    if old:
        out.mkdir()
        (out / "before").write_text("x")
    number = last if name == "sync" else min(last, int(old))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="broken"):
        dies(patch, os if name == "rename" else atomic, name, number, OSError(5, "broken"), after=True)
        with atomic_folder(out) as stage:
            (stage / "new").write_text("y")
    assert [p.name for p in tmp_path.rglob("*")] == (["out", "before"] if old else [])


def test_a_folder_has_one_writer(tmp_path):
    """A second one is refused, and takes nothing of the first one away."""
    out = tmp_path / "out"
    with new_folder(out) as stage:
        (stage / "one").write_text("1")
        with pytest.raises(OutputInUse, match="written by another process"), new_folder(out):
            pass
        (stage / "two").write_text("2")
    assert {p.name for p in tmp_path.rglob("*")} == {"out", "one", "two"}


def test_a_folder_that_appeared_meanwhile_is_not_replaced(tmp_path):
    require_empty(tmp_path / "out")
    with atomic_folder(tmp_path / "out") as stage:
        (stage / "first").write_text("1")
    with pytest.raises(OutputInUse, match="not empty"), new_folder(tmp_path / "out"):
        pass
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "first"]


def test_a_small_file_that_two_write_at_once_is_always_whole(tmp_path):
    """Both succeed."""
    path, failed = tmp_path / "report.html", []

    def write(letter: str) -> None:
        try:
            for _ in range(100):
                write_file(path, letter * 10_000)
        except OSError as error:
            failed.append(error)

    writers = [threading.Thread(target=write, args=(letter,)) for letter in "ab"]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert not path.exists() or path.read_text() in ("a" * 10_000, "b" * 10_000)
    assert not failed and [p.name for p in tmp_path.iterdir()] == ["report.html"]


# ---- signals


def test_a_signal_that_comes_twice_at_once_is_one(monkeypatch):
    ended = []
    monkeypatch.setattr(signals, "end_at_once", ended.append)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and stop.name == "SIGTERM" and not ended
        stop._at -= signals.SAME
        os.kill(os.getpid(), signal.SIGINT)
        assert ended == [signal.SIGINT]


STOPS = """
import os, signal, sys, time
from minilora.errors import Stopped
import minilora.__main__ as main
from minilora.run.signals import StopSignal

class Finaliser:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)

def run(words):
    how = sys.argv[1]
    if how == "in a finaliser":
        Finaliser()
        time.sleep(5)
        return 0
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        if how == "twice":
            time.sleep(0.6)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)  # once more, while the last lines are written
    raise Stopped("stopped and saved")

main.run = run
code = main.main()
os.kill(os.getpid(), signal.SIGTERM)
sys.exit(code)
"""


@pytest.mark.parametrize(("how", "code"), [("once", 75), ("twice", 130), ("in a finaliser", 130)])
def test_no_signal_shows_a_traceback(how, code):
    done = subprocess.run(
        [sys.executable, "-c", STOPS, how], capture_output=True, text=True, check=False, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert done.returncode == code and "Traceback" not in done.stderr and "ignored" not in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_strangers_checkpoint_writes_no_control_codes(run, capsys):
    """What its state says of the machine is told when it is resumed; so are the names of its settings."""
    state = run / "checkpoints" / "step-2" / "state.json"
    j = json.loads(state.read_text())
    state.write_text(json.dumps(j | {"machine": {key: "\x1b[31m" + "x" * 100_000 for key in j["machine"]}}))
    manifest = state.with_name("MANIFEST.json")
    manifest.unlink()
    atomic._write_manifest(state.parent)
    capsys.readouterr()
    assert main(["train", "--output", str(run), "--resume"]) == 0
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "\\u001b[31m" in out and max(map(len, out.split("\n"))) < 100_000
