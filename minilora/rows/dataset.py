"""The rows of a training run: read, divided into training, validation and test, mixed, repeated; and the division on disk."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import TrainConfig
from ..errors import UsageError
from ..files.atomic import atomic_folder
from ..files.model_folder import ModelFolder, positions_note
from ..text.tokenizer import Tokenizer, load_tokenizer
from .files import find_data, validation_file
from .load import load_examples
from .report import Report, ending_note
from .sources import mixed, parse_ratio, parse_sources, repeated
from .split import counts_of, split
from .token_store import Examples, TokenCache


@dataclass(frozen=True)
class Data:
    """The examples of a run and the reports on them; `taken` holds the sides that were split off, by name."""

    tokenizer: Tokenizer
    train: Examples
    val: Examples
    report: Report
    notes: dict[str, str]  # name of a line in the header -> its text
    taken: dict[str, Examples]
    seed: int


def load_data(config: TrainConfig, folder: ModelFolder | None = None) -> Data:
    """Read, render and count the rows of a run; the validation rows are a file's, or taken out of the training rows."""
    folder = folder or ModelFolder(config.model)
    tokenizer = load_tokenizer(folder)
    cache = TokenCache(Path(config.cache), folder.path) if config.cache else None

    def load(path: str | Path) -> tuple[Examples, Report]:
        return load_examples(path, tokenizer, config, config.seed, cache, config.objective == "dpo")

    path, val_path = config.data, Path(config.val) if config.val and Path(config.val).exists() else None
    notes: dict[str, str] = {}
    if len(parse_sources(path)) == 1:
        path, beside = find_data(path)
        val_path = val_path or (beside if not config.val else None)
    train, report = load(path)
    reports = [report]
    wanted = {name: getattr(config, name) for name in ("val", "test") if getattr(config, name)}
    if val_path is not None:
        wanted.pop("val", None)
    train, taken = _divide(train, wanted, config.seed)
    val = taken.get("val", train[:0])
    if val_path is not None:
        val, val_report = load(validation_file(val_path))
        reports.append(val_report)
        notes["val"] = str(val_report)
    elif "val" in taken:
        notes["val"] = f"{val.firsts.sum():,} of these rows"
    if "test" in taken:
        notes["test"] = f"{taken['test'].firsts.sum():,} of these rows, kept out"
    if not config.train_end:
        notes["end"] = ending_note(train.column("trained"))
    train = repeated(train, config.seed)
    if config.mix_general:
        general, general_report = load(config.mix_general)
        reports.append(general_report)
        own, train = len(train), mixed(train, general, parse_ratio(config.mix_ratio), config.seed)
        notes["general"] = f"{len(train) - own:,} rows mixed in, {config.mix_ratio}, from {general_report}"
    both = np.intersect1d(train.column("question"), val.column("question"))
    if len(both):
        rows = int(np.isin(val.column("question"), both).sum())
        notes["note"] = f"{rows:,} validation rows ask what a training row asks: their loss says little"
    beyond = positions_note(folder, max(train.longest, val.longest))
    if beyond:
        notes["long"] = beyond
    idle = [key for key in config.define if not any(read.defined[key] for read in reports)]
    if idle:
        raise UsageError(
            f"--define {idle[0]}: no row of {config.data} has {{{{{idle[0]}}}}}", "Correct the name or leave it out."
        )
    return Data(tokenizer, train, val, report, notes, taken, config.seed)


def _divide(examples: Examples, wanted: dict[str, str], seed: int) -> tuple[Examples, dict[str, Examples]]:
    """The examples that remain, and those of each side, which is wanted as a number or a share of the rows."""
    if not wanted:
        return examples, {}
    questions = examples.column("question")
    rows = questions[examples.firsts]
    parts = split(rows, counts_of(wanted, len(rows)), seed)
    rest, *sides = (examples.take(np.flatnonzero(np.isin(questions, rows[part]))) for part in parts)
    return rest, dict(zip(wanted, sides, strict=True))


def trained_rows(examples: Examples) -> np.ndarray:
    """uint64 [n, 2]: the hashes of the question and of the whole of each row, every row once and sorted."""
    return np.unique(np.stack([examples.column("question"), examples.column("content")], 1), axis=0)


def write_split(folder: Path, data: Data) -> None:
    """Write each side that was split off as NAME.jsonl, its rows as their file has them, and split.json with their hashes."""
    if not data.taken:
        return
    with atomic_folder(folder) as stage:
        table = {"seed": data.seed, "rows": {"train": int(data.train.firsts.sum())}, "hashes": {}}
        for name, pieces in data.taken.items():
            examples = pieces.take(np.flatnonzero(pieces.firsts))
            values = [examples.value(i) for i in range(len(examples))]
            lines = [json.dumps(value, ensure_ascii=False) + "\n" for _, value in values]
            (stage / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
            table["rows"][name] = len(lines)
            hashes = examples.column("content").tolist()
            table["hashes"][name] = [{"row": w, "hash": f"{h:016x}"} for (w, _), h in zip(values, hashes, strict=True)]
        (stage / "split.json").write_text(json.dumps(table, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
