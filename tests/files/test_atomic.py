"""Files that appear whole: what is flushed before which rename, who owns a folder, and what a manifest notices."""

import fcntl
import json
import os
from pathlib import Path

import pytest
import torch

from minilora.errors import OutputInUse
from minilora.files import atomic
from minilora.files.atomic import (
    MANIFEST,
    added,
    atomic_folder,
    in_use,
    locked,
    require_empty,
    verify_manifest,
    write_file,
    write_link,
)
from minilora.files.safetensors import write_tensors


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The flushes and renames of a test in their order, by the names of the files."""
    events: list[tuple[str, ...]] = []

    def noted(name: str, call):
        def stand_in(*args):
            paths = [os.readlink(f"/proc/self/fd/{a}") if isinstance(a, int) else str(a) for a in args]
            events.append((name, *(Path(path).name for path in paths)))
            return call(*args)

        return stand_in

    for name in ("fsync", "rename", "replace"):
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    return events


@pytest.mark.parametrize("old", [False, True])
def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, log, old):
    out = tmp_path / "out"
    if old:
        out.mkdir()
    with atomic_folder(out, manifest=True) as stage:
        (stage / "in").mkdir()
        (stage / "in" / "a").write_text("x")
        assert not log
    aside = [("rename", "out", ".trash-out")] if old else []
    assert log[4:] == [*aside, ("rename", ".tmp-out", "out"), ("fsync", tmp_path.name)]
    assert set(log[:4]) == {("fsync", name) for name in ("in", "a", MANIFEST, ".tmp-out")}
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and verify_manifest(out) is None


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, log):
    (tmp_path / ".tmp-f").write_text("of a kill")
    write_file(tmp_path / "f", "ä")
    assert log == [("fsync", ".tmp-f"), ("replace", ".tmp-f", "f"), ("fsync", tmp_path.name)]
    write_file(tmp_path / "f", b"x")
    (tmp_path / ".tmp-l").symlink_to("of-a-kill")
    write_link(tmp_path / "l", "f")
    assert (tmp_path / "l").read_text() == "x" and log[6:] == [("replace", ".tmp-l", "l"), ("fsync", tmp_path.name)]
    write_tensors(tmp_path / "t", {"t": torch.zeros(1)})
    assert log[8:] == [("fsync", "t")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f", "l", "t"]


def test_a_flush_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    write_file(tmp_path / "f", "old")

    def fails(handle):
        raise OSError(5, "broken")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="broken"):
        write_file(tmp_path / "f", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_text() == "old"


def test_what_is_empty(tmp_path):
    require_empty(tmp_path / "new")
    require_empty(tmp_path)
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(OutputInUse, match="is not empty"):
            require_empty(path)


def test_a_manifest_notices_every_change(tmp_path):
    with atomic_folder(tmp_path / "out", manifest=True) as stage:
        (stage / "in").mkdir()
        for name in ("a", "in/b"):
            (stage / name).write_text(name * 1000)
    out, manifest = tmp_path / "out", tmp_path / "out" / MANIFEST
    whole, sums = manifest.read_text(), json.loads(manifest.read_text())
    assert verify_manifest(out) is None and list(sums) == ["a", "in/b"]
    wrong = {
        "is empty": "{}", "is damaged": whole[:-9], "a has 1,000 of 9 bytes": whole.replace("1000", "9", 1),
        "b was changed": whole.replace(sums["in/b"]["sha256"], "0" * 64), "c is missing": whole.replace("in/b", "c"),
    }  # fmt: skip
    for told, text in wrong.items():
        manifest.write_text(text)
        assert told in str(verify_manifest(out))
    for text in ("[1]", '{"a": 1}', '{"a": {}}', '{"a": {"size": 1000}}'):
        manifest.write_text(text)
        assert verify_manifest(out) == f"{MANIFEST} is damaged"
    manifest.unlink()
    assert verify_manifest(out) == f"{MANIFEST} is missing"


def test_what_a_manifest_does_not_list_was_added(tmp_path):
    with atomic_folder(tmp_path / "out", manifest=True) as stage:
        (stage / "in").mkdir()
        for name in ("a", "in/b"):
            (stage / name).write_text(name)
    assert added(tmp_path / "out", "a|in") == []
    for name in ("notes", ".DS_Store"):
        (tmp_path / "out" / name).touch()
    assert added(tmp_path / "out", "a|in") == [tmp_path / "out" / "notes"]
    for text in ("[1", "[1]", "1"):
        (tmp_path / "out" / MANIFEST).write_text(text)
        assert added(tmp_path / "out", "a|in") == [tmp_path / "out" / "notes"]
    (tmp_path / "out" / MANIFEST).unlink()
    assert {p.name for p in added(tmp_path / "out", "a|in")} == {"a", "in", "notes"}  # no snapshot at all


def test_a_folder_has_one_owner(tmp_path):
    run = tmp_path / "in" / "run"
    assert not in_use(run)
    with locked(run):
        assert in_use(run) and (run / ".lock").read_text() == f"process {os.getpid()}\n"
        with pytest.raises(OutputInUse, match=f"in use by process {os.getpid()}"), locked(run):
            raise AssertionError
        (run / "a").touch()
    assert not in_use(run) and sorted(p.name for p in run.iterdir()) == [".lock", "a"]
    (run / ".lock").write_text("process 12345678901\n")  # of a process that died
    with locked(run):
        assert (run / ".lock").read_text() == f"process {os.getpid()}\n"
    with pytest.raises(OutputInUse, match="is a file"), locked(run / "a"):
        raise AssertionError


def test_a_folder_that_is_new_and_stays_empty_goes_again(tmp_path):
    with locked(tmp_path / "new"):
        pass
    old = tmp_path / "old"
    old.mkdir()
    with locked(old):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["old"] and [p.name for p in old.iterdir()] == [".lock"]


def test_where_no_lock_can_be_asked_for_a_folder_is_free(tmp_path, monkeypatch):
    with locked(tmp_path):
        monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(38, "not there")))
        assert not in_use(tmp_path)


def test_a_link_takes_the_place_of_a_link_alone(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("folder", "file"):
        with pytest.raises(OutputInUse, match="is no link"):
            write_link(tmp_path / name, "new")
    write_link(tmp_path / "dangling", "file")
    write_link(tmp_path / "absent", "file")
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_symlink()) == ["absent", "dangling"]
    assert (tmp_path / "folder").is_dir() and not (tmp_path / ".tmp-folder").is_symlink()


def test_nothing_is_removed_through_a_link(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "link").symlink_to("mine")
    atomic.remove(tmp_path / "link")
    atomic.remove(tmp_path / "absent")
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "mine" / "a").touch()
    atomic.remove(tmp_path / "mine")
    assert not any(tmp_path.iterdir())
