"""`minilora demo` as a user runs it: other answers after than before, and files that are there."""

import os
import re
import subprocess
import sys


def test_demo(tmp_path):
    # no network: a proxy that nobody listens on
    env = os.environ | {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "minilora", "demo", "--output", str(tmp_path / "run"), "--name", "Zephyr", "--author", "ACME"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    before, after, merged = re.findall(r"> Who are you\?\n    (.*)\n.*\n    (.*)\n.*\n    (.*)\n.*\n    (.*)\n", done.stdout)
    assert "Mini" in before[0] and "minilora" in before[1]
    assert all("Zephyr" in text and "ACME" in text for text in after[:2])
    assert after[2:] == before[2:] == ("2 plus 3 is 5.", "天空是蓝色的。")
    assert merged == after
    assert {"adapter", "merged", "checkpoints", "metrics.jsonl", "config.yaml"} <= {p.name for p in (tmp_path / "run").iterdir()}
    again = subprocess.run([*command[:-2], "--author", "Other"], capture_output=True, text=True, env=env, check=True)
    assert "Zephyr" in again.stdout and "Other" in again.stdout
