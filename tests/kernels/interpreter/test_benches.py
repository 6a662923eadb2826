"""The benches, at toy size: what they measure on a GPU goes through the kernels here."""

import json
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import pytest
from proof.test_bench import bad

from bench.workers import Row


@pytest.mark.parametrize(
    "module, words",
    [
        ("proof.parity", "--toy|--dtypes|bfloat16|--only|add_rms_norm 37 x 101, b|swiglu 13|r=3 (two|bits (one|scale known"),
        ("kernels", "--models|toy|--tokens|16|--rounds|1|--only|lora_swiglu"),
        ("step", "--models|toy|--tokens|16|--document|8|--rounds|1|--sides|minilora|minilora, recomputing"),
    ],
    ids=["parity", "kernels", "step"],
)  # fmt: skip
def test_the_kernels_through_the_benches(
    module: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """The command of a worker is run in this process: one more takes seconds to start."""
    bench = import_module(f"bench.{module}")

    def here(command: Sequence[str], names: Sequence[str], jobs: int, seconds: float, told: Callable) -> dict[str, Row]:
        lines = tmp_path / "lines"
        assert command[1:3] == ["-m", f"bench.{module}"] and names
        bench.main([*command[3:], "--lines", str(lines), "--names", *names])
        rows = [json.loads(line) for line in lines.read_text().splitlines()]
        for row in rows:
            told(row)
        return {row["name"]: row for row in rows}

    monkeypatch.setattr(bench, "in_workers", here)
    try:
        bench.main(words.split("|"))
    except SystemExit as end:
        assert not end.code
    printed = capsys.readouterr().out
    assert "| " in printed and not bad(printed), printed
