"""What ranks find wrong: said by one where all find it, by the one where it alone does, with its rank and host."""

import socket
import sys
import time
from pathlib import Path

import pytest
from rank_runs import given, material, run, torchrun

from minilora.__main__ import main
from minilora.ranks import early


def test_what_all_find_wrong_before_they_have_joined_is_said_once():
    done = run(torchrun(3, "-m", "minilora", "train", "--model", "none", "--data", "x", "--output", "x"))
    assert done.returncode == 1 and done.stderr.count("error: ") == 1 and "error: none is not a folder" in done.stderr


def test_what_all_find_wrong_after_they_have_joined_is_said_once_with_its_code(tmp_path: Path):
    material(tmp_path)
    (tmp_path / "rows.json").write_text('[{"instruction": "q", "output": "a", "extra": "e"}]')
    done = run([sys.executable, *given("train", tmp_path), "--gpus", "2", "--output", str(tmp_path / "run")])
    assert done.returncode == 3 and done.stderr.count("error: ") == 1 and "'extra'" in done.stderr, done.stderr
    assert "error: rank" not in done.stderr and done.stdout.count("train  ") == 1


def test_what_one_rank_alone_finds_wrong_it_says_with_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """torchrun would have ended it if rank 0 had found the same."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["eval", "--model", "none", "--data", "x"]) == 4
    assert capsys.readouterr().err.startswith(f"error: rank 5 on {socket.gethostname()}: none is not a folder")
    assert waited == [early.HEAD_START + 0.5]


def test_a_rank_that_does_not_come_is_named(tmp_path: Path):
    """Two machines, of which one starts its ranks and the other none."""
    code = "import os; os.environ['WORLD_SIZE'] = '3'; from minilora.__main__ import main; import sys; sys.exit(main())"
    command = torchrun(
        2, "--no-python", sys.executable, "-c", code, *given("eval", tmp_path)[2:], "--rank-timeout", "3"
    )
    done = run(command)
    assert done.stderr.count("error: ") == 1 and "error: rank 2 did not come within 3 s" in done.stderr, done.stderr
