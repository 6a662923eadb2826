"""Which folder a run may take, and what of an old run goes."""

from pathlib import Path
from typing import Any

import pytest

from minilora.errors import OutputInUse
from minilora.files.atomic import locked
from minilora.run.folder import check_output, check_unlocked

FOLDERS = {  # what lies there -> what a new run, one with --overwrite and one with --resume are told
    "": ("", "", ""),
    ".lock .hidden": ("", "", ""),
    "metrics.jsonl=": ("", "", ""),  # all that a killed run wrote
    "metrics.jsonl": ("is not empty", "holds no run", ""),
    "mine.txt=": ("is not empty", "holds no run", ""),
    "config.yaml": ("is not empty", "holds no run", ""),
    "config.yaml metrics.jsonl": ("is not empty", "holds no run", ""),
    "config.yaml metrics.jsonl=": ("is not empty", "", ""),
    "config.yaml checkpoints/": ("is not empty", "holds no run", ""),
    "metrics.jsonl/": ("is not empty", "holds no run", ""),
}


def fill(folder: Path, names: str) -> Path:
    """A folder of files with a letter in them, of empty ones (=) and folders (/)."""
    folder.mkdir()
    for name in names.split():
        if name.endswith("/"):
            (folder / name).mkdir()
        else:
            (folder / name.rstrip("=")).write_text("" if name.endswith("=") else "x")
    return folder


def told(call, *args: Any) -> str:
    try:
        call(*args)
    except OutputInUse as error:
        return error.what
    return ""


@pytest.mark.parametrize("names", FOLDERS)
def test_what_a_folder_holds_decides_who_may_take_it(tmp_path, names):
    folder = fill(tmp_path / "run", names)
    found = [told(check_output, folder, resume, overwrite) for resume, overwrite in ((0, 0), (0, 1), (1, 0))]
    for said, part in zip(found, FOLDERS[names], strict=True):
        assert part in said and bool(part) == bool(said)
    unlocked = [told(check_unlocked, folder, overwrite) for overwrite in (False, True)]
    assert unlocked == (found[:2] if names != ".lock .hidden" else ["", ""])


@pytest.mark.parametrize("beginning", [b"\0" * 40, b'{"st'])
def test_a_run_that_the_power_was_cut_from_can_be_overwritten(tmp_path, beginning):
    (fill(tmp_path / "run", "config.yaml") / "metrics.jsonl").write_bytes(beginning)
    assert told(check_output, tmp_path / "run", False, True) == ""


def test_a_snapshot_that_a_kill_left_half_written_stands_in_nobodys_way(tmp_path):
    folder = fill(tmp_path / "run", "config.yaml metrics.jsonl=")
    (folder / "checkpoints" / ".tmp-step-1").mkdir(parents=True)
    (folder / "checkpoints" / ".tmp-step-1" / "adapter_config.json").touch()
    assert told(check_output, folder, False, True) == ""
    (folder / "checkpoints" / ".tmp-step-1").rename(
        folder / "checkpoints" / "step-1"
    )  # as no run names what is not whole
    assert "was written by no run" in told(check_output, folder, False, True)


def test_a_run_whose_rows_are_being_predicted_is_not_overwritten(tmp_path):
    folder = fill(tmp_path / "run", "config.yaml metrics.jsonl=")
    with locked(folder / "predict"):
        assert "predict is being written" in told(check_output, folder, False, True)
        assert told(check_output, folder, True, False) == ""  # nothing of it goes
    assert told(check_output, folder, False, True) == ""


def test_a_folder_that_is_locked_or_not_there_is_looked_at_later(tmp_path):
    check_unlocked(tmp_path / "absent", False)
    check_unlocked(fill(tmp_path / "run", ".lock mine.txt"), False)
