"""Answers and losses of a tiny model by as many ranks as there are, by the command line: called here, or as a script by torchrun."""

import contextlib
import io
import sys
from pathlib import Path

import torch

from minilora.__main__ import main


def answer(folder: Path, out: Path) -> None:
    out.mkdir(exist_ok=True)
    common = ["--model", str(folder / "model"), "--data", str(folder / "rows.json"), "--compute", "float32"]
    # the last one finds that it is done already
    for name, how in (("likeliest", []), ("drawn", ["--sample", "--seed", "3"]), ("likeliest", [])):
        words = ["--max-tokens", "8", "--batch", "3", "--output", str(out / name), *how]
        assert main(["predict", *common, *words]) == 0
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["eval", *common, "--max-length", "80", "--json"]) == 0
    with (out / "eval.json").open("a") as file:
        file.write(printed.getvalue())


if __name__ == "__main__":
    torch.set_num_threads(1)
    answer(*map(Path, sys.argv[1:]))
