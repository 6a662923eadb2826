"""The commands that write, on a tiny model: what each starts from, its words, and what its user types after it was cut short."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.reliability import forked
from minilora.files.safetensors import SafetensorsFile
from minilora.run.snapshot import newest_snapshot
from tests.tiny import make_model, make_rows

STEPS = 4
RUN = ["--lora-r", "2", "--lora-dropout", "0.1", "--batch-size", "4", "--save-every", "1", "--val", "2", "--eval-every", "2",
       "--device", "cpu", "--threads", "1"]  # fmt: skip


@dataclass
class Command:
    """What is written comes below `place`, which holds nothing else; `before` is the output folder that the command finds.

    Of a training, `runs` are finished ones with every snapshot that may be found.
    """

    name: str
    words: list[str]
    place: Path
    before: Path | None = None
    runs: list[Path] = field(default_factory=list)

    @property
    def output(self) -> Path:
        return self.place / "out"

    def set_up(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        if self.before:
            shutil.copytree(self.before, self.output, symlinks=True)

    def __call__(self) -> int:
        return forked.command(self.words)

    def again(self) -> list[str] | None:
        """What its user types next; None if the result is there."""
        if not self.runs:
            return self.words if not self.output.exists() or self.name == "predict" else None
        if {"--overwrite", "--resume"} & set(self.words):
            return self.words
        if newest_snapshot(self.output / "checkpoints")[0]:
            return ["train", "--output", str(self.output), "--resume"]
        return [*self.words, "--overwrite"]


def commands(work: Path) -> list[Command]:
    """All of them, in a new workplace. What they start from is made by commands of this process, which warms it up for its forks."""
    model = make_model(work / "model", num_hidden_layers=1, hidden_size=16, intermediate_size=24, head_dim=4)
    rows, place = make_rows(work / "rows.json"), work / "place"
    pickle, wide = work / "pickle", SafetensorsFile(model / "model.safetensors")
    shutil.copytree(model, pickle, ignore=lambda *_: ["model.safetensors"])
    torch.save({name: wide.tensor(name) for name in wide.entries}, pickle / "pytorch_model.bin")

    def train(output: Path, *more: str) -> list[str]:
        given = ["--model", str(model), "--data", str(rows), "--output", str(output)]
        return ["train", *given, *RUN, "--max-steps", str(STEPS), *more]

    def finished(name: str, *more: str) -> Path:
        """A run whose folder was `out` of the place when it was made."""
        shutil.rmtree(place, ignore_errors=True)
        forked.prepare(train(place / "out", *more))
        return place.joinpath("out").rename(work / name)

    one = finished("one", "--keep-checkpoints", "99")
    other = finished("other", "--keep-checkpoints", "99", "--seed", "1")
    half = shutil.copytree(one, work / "half", symlinks=True)
    for step in range(STEPS // 2 + 1, STEPS + 1):
        shutil.rmtree(half / "checkpoints" / f"step-{step}")
    lines = (half / "metrics.jsonl").read_text().splitlines(keepends=True)
    (half / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= STEPS // 2))
    tuned = ["--model", str(model), "--adapter", str(one / "adapter"), "--output", str(place / "out")]
    keep = ["--keep-checkpoints", "1"]
    return [
        Command("train: first save, later saves, retention", train(place / "out", *keep), place, None, [one]),
        Command("train --overwrite", train(place / "out", *keep, "--overwrite"), place, other, [one, other]),
        Command("train --resume", ["train", "--output", str(place / "out"), "--resume"], place, half, [one]),
        Command("merge", ["merge", *tuned], place),
        Command("export", ["export", *tuned, "--for", "vllm"], place),
        Command("export --for gguf", ["export", *tuned, "--for", "gguf"], place),
        Command("convert", ["convert", str(pickle), str(place / "out")], place),
        Command("predict", ["predict", *tuned, "--data", str(rows), "--max-tokens", "2", "--device", "cpu"], place),
        Command("data split", ["data", "split", "--data", str(rows), "--val", "2", "--test", "2", "--output", str(place / "out")], place),
    ]  # fmt: skip
