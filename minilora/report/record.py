"""What a run left behind, read back for a report: its settings, its curve, its data, its answers to a test set."""

import hashlib
import json
import math
import os
import statistics
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, ModelError, UsageError, quote
from ..files.atomic import in_use, sha256
from ..files.model_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ..files.regular import SMALL, open_file, read_file
from ..files.strict_json import parse_json, read_json_lines
from ..settings import read_yaml
from .curve import Curve, Point, smoothed
from .metrics import Measured, measured_rows
from .study import Looks

TRAINED_ROWS = "trained_rows.u64"  # two hashes of each training row, 16 bytes
ROWS, RESULTS = "generated_predictions.jsonl", "predict_results.json"
LIMITS = {"masked": "max_source_length", "trained": "max_target_length"}  # of the two kinds of tokens of a row
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # names of the runs of a comparison

MOST_LENGTHS = 10_000_000  # rows whose lengths are drawn

# what is read of each optimizer step, in 8 bytes a number: whole numbers, and others; the last four are of preferences
WHOLE = ("step", "tokens", "target_tokens")
OTHERS = (
    "loss", "lr", "grad_norm", "tokens_per_second", "memory_gb", "time", "chosen", "rejected", "margin", "accuracy",
)  # fmt: skip


def _columns() -> dict[str, Any]:
    """Empty columns of WHOLE and OTHERS; a number that a step does not have is NaN."""
    return {key: array("q") for key in WHOLE} | {key: array("d") for key in OTHERS}


@dataclass
class Record:
    """A run folder, or a folder of predict alone (such as the base model's); what is missing is empty."""

    name: str
    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, Any] = field(default_factory=_columns)  # of optimizer steps, by name
    looks: Looks = field(default_factory=Looks)  # of train --study
    val: Sequence[Point] = field(default_factory=list)  # (step, validation loss)
    data: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)  # answers to the test set
    trained_rows: np.ndarray | None = None  # uint64 [n, 2], sorted: hashes of a training row's question and its whole
    in_use: bool = False  # a process owns the folder

    @property
    def letter(self) -> str:
        """What a comparison calls the run: "A" of "A: name"."""
        return self.name.partition(":")[0]

    @property
    def decoded(self) -> dict[str, Any]:
        """The settings that the answers were made with."""
        return self.results.get("settings") or {}

    @property
    def scores(self) -> dict[str, dict[str, Any]]:
        """The metrics that predict computed, by name: value, low, high, definition."""
        return self.results.get("metrics") or {}

    @property
    def stale_answers(self) -> bool:
        """Whether the answers are of other weights than the run has now, as where it was trained on after they were given."""
        if self.config.get("method") == "full":
            model, sampled = self.folder / "model", self.decoded.get("model_hash")  # none, before models were sampled
            return sampled is not None and model.is_dir() and sampled != sample_of(model)
        adapter, then = self.folder / "adapter", self.decoded.get("weights_hash")
        if then is not None and self.decoded.get("adapter") is None:
            return adapter.is_dir() and self.decoded.get("model") == self.config.get("model")  # of the base alone
        if not isinstance(then, str) or len(then) != 48:  # from before configs were hashed
            return False
        return not then.endswith(hash_of(adapter / ADAPTER_WEIGHTS, adapter / ADAPTER_CONFIG))

    @property
    def scored(self) -> list[dict[str, Any]]:
        """The answers that have a reference."""
        return [row for row in self.rows if row["label"]]

    @cached_property
    def measured(self) -> dict[str, Measured]:
        """Every metric of the answers that have a reference."""
        return measured_rows(self.scored)

    def answers_the_rows_of(self, other: "Record") -> bool:
        mine, theirs = ([(row.get("question"), row["label"]) for row in run.rows] for run in (self, other))
        return mine == theirs

    @cached_property
    def loss(self) -> Curve:
        return self.column("loss")

    @cached_property
    def smooth(self) -> Curve:
        return smoothed(self.loss)

    def column(self, key: str) -> Curve:
        """A quantity by step."""
        return Curve(self.columns["step"], self.columns[key])

    def total(self, key: str) -> int:
        """The sum of a quantity over the steps."""
        return sum(self.columns[key])

    def along(self, curve: Sequence[Point], axis: str) -> Sequence[Point]:
        """A curve over steps as one over "tokens" (all tokens read so far) or "time" (seconds)."""
        if axis == "step":
            return curve
        values = self.columns[axis]
        values = accumulate(values) if axis == "tokens" else values
        at = dict(zip(self.columns["step"], values, strict=True)) | {0: 0}
        return [(at[step], y) for step, y in curve if step in at]

    @property
    def base(self) -> str:
        """What tells the model that the run started from apart from another in a folder of the same name."""
        return json.dumps([self.data.get("base"), self.data.get("architecture")])

    @property
    def objective(self) -> tuple[Any, Any]:
        """What its losses are of: the objective, and of preferences beta, which scales them."""
        return (of := self.config.get("objective") or "sft"), self.config.get("beta") if of == "dpo" else None

    @property
    def trained_share(self) -> str:
        """How many of the tokens of an epoch are trained."""
        return f"{100 * self.data['trained'] / max(self.data['tokens'], 1):.0f} %"

    def reasons(self, what: str) -> str:
        """How many rows were "dropped", or "cut", and why."""
        return ", ".join(f"{n:,} {reason}" for reason, n in (self.data.get(what) or {}).items()) or "none"

    def lengths(self, kind: str) -> np.ndarray:
        """The numbers of "masked" or of "trained" tokens of the rows, int64 [rows], or of an even share of very many."""
        counts = {int(n): rows for n, rows in (self.data.get(f"{kind}_lengths") or {}).items()}
        rows = np.array([*counts.values()], np.int64)
        share = -(-int(rows.sum()) // MOST_LENGTHS) or 1  # a picture of more rows looks the same
        return np.repeat(np.array([*counts], np.int64), -(-rows // share))

    @property
    def best(self) -> tuple[float, float] | None:
        """(step, loss) of the lowest validation loss."""
        finite = [p for p in self.val if math.isfinite(p[1])]
        return min(finite, key=lambda p: p[1]) if finite else None

    @property
    def step(self) -> int:
        """The last step that was taken."""
        return self.columns["step"][-1] if self.columns["step"] else 0

    @property
    def time(self) -> float:
        """The seconds that its steps took."""
        return self.columns["time"][-1]

    @property
    def steps(self) -> int:
        """The steps that the run will take in all."""
        return self.data.get("steps", self.step)

    @property
    def finished(self) -> bool:
        return 0 < self.step == self.steps

    @property
    def going_on(self) -> bool:
        """Whether a process is training it now: one owns the folder, and steps are left."""
        return self.in_use and not self.finished

    @property
    def speed(self) -> float:
        """Tokens a second, the median of the steps."""
        return statistics.median(self.columns["tokens_per_second"]) if self.step else math.nan

    @property
    def memory(self) -> float:
        """Peak in GB."""
        return max(self.columns["memory_gb"], default=math.nan)


def hash_of(*files: Path) -> str:
    """16 hex digits of each file that is there."""
    return "".join(sha256(path)[:16] for path in files if path.is_file())


def sample_of(model: Path) -> str:
    """16 hex digits of 4 kB of each MB of a model's weights: training changes them everywhere, and they may be many GB."""
    digest = hashlib.sha256()
    for path in sorted(model.glob("*.safetensors")):
        with open_file(path, ModelError) as file:
            for place in range(0, os.fstat(file.fileno()).st_size, 1 << 20):
                file.seek(place)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def as_text(value: Any) -> str:
    """A setting as a reader writes it."""
    if value is None or value == "" or value == {}:
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}={text}" for key, text in value.items())
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def read_record(folder: str | Path) -> Record:
    """The Record of a folder of train or of predict; UsageError if it is neither, DataError for a damaged file."""
    folder = Path(folder)
    answers = folder / "predict" if (folder / "predict" / RESULTS).is_file() else folder
    is_run, has_answers = (folder / "config.yaml").is_file(), (answers / RESULTS).is_file()
    if not is_run and not has_answers:
        what = "is not there" if not folder.exists() else "holds neither a run nor a prediction"
        raise UsageError(f"{folder} {what}", "Give the --output of minilora train or of minilora predict.")
    record = Record(folder.resolve().name, folder)
    if is_run:
        record.in_use = in_use(folder)
        record.config = read_yaml(folder / "config.yaml")
        with as_written(folder / "metrics.jsonl"):
            _read_steps(record)
        if (folder / "data.json").is_file():
            record.data = read_json_file(folder / "data.json")
        if (folder / TRAINED_ROWS).is_file():
            record.trained_rows = _hashes(folder / TRAINED_ROWS)
    if has_answers:
        record.results = read_json_file(answers / RESULTS)
        record.rows = _answers(answers / ROWS)
    return record


def _read_steps(record: Record) -> None:
    """Read metrics.jsonl, a line at a time."""
    record.val = []
    for line in read_json_lines(record.folder / "metrics.jsonl"):
        if isinstance(line, dict) and "step" in line:
            if "loss" in line:
                for key, column in record.columns.items():
                    column.append(line.get(key, math.nan))
            if "val_loss" in line:
                record.val.append((line["step"], line["val_loss"]))
            if "study" in line:
                record.looks.add(line["step"], line["study"])


@contextmanager
def as_written(place: object) -> Iterator[None]:
    """DataError where the files of a run hold values of another shape than a run writes, which shows when they are used."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        what = f"{place}: a file of this run holds what no run writes ({type(error).__name__}: {quote(str(error))})"
        raise DataError(what, "Take the folder as minilora wrote it.") from error


def _hashes(path: Path) -> np.ndarray:
    """A view of the file, however large it is."""
    with open_file(path, DataError) as file:
        size = os.fstat(file.fileno()).st_size
        if size % 16:
            raise DataError(f"{path} is damaged", "Delete it, or train again.")
        return np.memmap(file, "<u8", "r", shape=(size // 16, 2)) if size else np.empty((0, 2), "<u8")


def _answers(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [parse_json(line) for line in read_file(path, DataError).splitlines()]
        if all(isinstance(row[key], str) for row in rows for key in ("predict", "label")):
            return rows
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise DataError(f"{path} is damaged or not there", "Run minilora predict again.")


def read_json_file(path: Path) -> dict[str, Any]:
    """The object in one of our JSON files; DataError if there is none."""
    try:
        value = parse_json(read_file(path, DataError, SMALL))
        if isinstance(value, dict):
            return value
    except ValueError:
        pass
    raise DataError(f"{path} is damaged", "Make it again.")
