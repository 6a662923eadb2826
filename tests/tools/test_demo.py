"""`minilora demo` as a user runs it: other answers after than before, and files that are there."""

import os
import re
import subprocess
import sys

from minilora.__main__ import main
from minilora.demo.show import MODEL


def test_demo(tmp_path):
    # no network: a proxy that nobody listens on
    env = os.environ | {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    (tmp_path / ".git").mkdir()
    command = [
        sys.executable,
        "-m",
        "minilora",
        "demo",
        "--output",
        str(tmp_path / "run"),
        "--name",
        "Zephyr",
        "--author",
        "ACME",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    before, after, merged = re.findall(
        r"> Who are you\?\n    (.*)\n.*\n    (.*)\n.*\n    (.*)\n.*\n    (.*)\n", done.stdout
    )
    assert "Mini" in before[0] and "minilora" in before[1]
    assert all("Zephyr" in text and "ACME" in text for text in after[:2])
    assert after[2:] == before[2:] == ("2 plus 3 is 5.", "天空是蓝色的。")
    assert merged == after
    assert f"goes into {tmp_path / 'run'}\n(which lies in the git checkout {tmp_path};" in done.stdout
    assert [done.stdout.count(f"  minilora {c} --") for c in ("chat", "eval", "merge", "train")] == [1, 1, 0, 1]
    assert {"adapter", "merged", "checkpoints", "metrics.jsonl", "config.yaml"} <= {
        p.name for p in (tmp_path / "run").iterdir()
    }


def test_a_folder_that_is_no_demo_stays(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["demo", "--output", str(tmp_path)]) == 8
    assert "is not empty and no demo" in capsys.readouterr().err and (tmp_path / "thesis.txt").exists()


def test_a_run_of_the_users_own_is_no_demo(tmp_path, capsys):
    """It trained the demo's model on other rows."""
    (tmp_path / "config.yaml").write_text(f"model: {MODEL}\ndata: my.json\n")
    (tmp_path / "metrics.jsonl").touch()
    assert main(["demo", "--output", str(tmp_path)]) == 8
    assert "is not empty and no demo" in capsys.readouterr().err
