"""The benchmark runs, at toy size: what it measures is not asserted, that it measures is."""

import json
import subprocess
import sys

from tiny import make_model, make_rows


def test_train_bench(tmp_path):
    model, rows = make_model(tmp_path / "model"), make_rows(tmp_path / "rows.json")
    words = [
        "--model",
        str(model),
        "--data",
        str(rows),
        "--rounds",
        "2",
        "--steps",
        "1",
        "--save",
        str(tmp_path / "out.json"),
    ]
    done = subprocess.run([sys.executable, "-m", "bench.train", *words], capture_output=True, text=True, check=True)
    result = json.loads((tmp_path / "out.json").read_text())["ours"]
    assert (
        len(result["tokens_per_second"]) == 2
        and len(result["losses"]) == 3
        and result["losses"][2] < result["losses"][0]
    )
    assert "| ours |" in done.stdout
