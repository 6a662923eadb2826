"""`minilora report`: one run on one page, with what its curve says, as far as a curve can say it.

Made from the files of the run folder alone, so it can be made again at any time; only --samples loads the model.
"""

import json
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np

from ..config import defaults
from ..errors import MiniloraError, UsageError
from ..files.atomic import write_file
from ..files.model_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json
from ..files.strict_json import read_json_lines
from ..run.monitor import clock, shell
from .charts import Level, Series, heat_map, histogram, line_chart
from .compare import over_the_limit, reasons, with_interval
from .html import Best
from .page import Document
from .plot import smoothed
from .record import Record, read_record
from .verdict import reading, verdict

SAMPLES = "samples.jsonl"
MANY = 200  # steps, from which on a line of single steps is a block
REFRESH = 20  # seconds after which the page of a run that goes on loads itself anew


def report(folder: str | Path, samples: int = 0) -> Path:
    """Write RUN/report.html and return its path; `samples` rows are first answered by the base and by the run's adapter."""
    folder = Path(folder)
    run = read_record(folder)
    if not run.config:
        raise UsageError(f"{folder} is not a run folder", "Give the --output of minilora train.")
    if samples:
        make_samples(run, samples)
    write_file(folder / "report.html", run_page(run).html())
    return folder / "report.html"


def run_page(run: Record) -> Document:
    """The document on a run: what it came to, the numbers that are looked for first, then the curves and all else."""
    page = Document(f"Run {run.name}", refresh=REFRESH if run.going_on else 0)
    page.verdict(verdict(run))
    if run.going_on:
        page.text(
            f"Written at {time.strftime('%H:%M:%S')}. This page loads itself anew every {REFRESH} seconds; training writes it "
            f"at its checkpoints, {shell('report', run.folder)} at any time.",
            "dim",
        )
    if run.metrics:
        page.numbers(headline(run))
    made = run.data.get("machine") or {}
    if made:
        page.text(
            f"minilora {made['minilora']}, torch {made['torch']}, python {made['python']}, on {made['device']}; "
            f"computed in {made['computing']}",
            "dim",
        )
    if run.metrics:
        _curves(page, run)
    _data(page, run)
    _adapter(page, run)
    _scores(page, run)
    _samples(page, run)
    _settings(page, run)
    return page


def headline(run: Record) -> list[tuple[str, str, str]]:
    """(name, value, what belongs to it) of the numbers that are looked for first."""
    read, trained = (sum(m[key] for m in run.metrics) for key in ("tokens", "target_tokens"))
    so_far = " so far" if not run.finished else ""
    if run.best:
        where = f"at step {run.best[0]:,} of {run.steps:,}" if run.best[0] else "before training"
        first = (f"best validation loss{so_far}", f"{run.best[1]:.4f}", where)
    else:
        first = (f"training loss{so_far}", f"{run.smooth[-1][1]:.4f}", "smoothed; no validation rows")
    items = [
        first,
        ("tokens trained", f"{trained:,}", f"of {read:,} read, in {run.step:,} steps"),
        ("time", clock(run.metrics[-1]["time"]), f"{run.speed:,.0f} tokens a second"),
        ("peak memory", f"{run.memory:.2f} GB", ""),
    ]
    weights = run.folder / "adapter" / ADAPTER_WEIGHTS
    if weights.is_file():
        from ..files.safetensors import SafetensorsFile  # it loads torch

        numbers = sum(math.prod(entry.shape) for entry in SafetensorsFile(weights).entries.values())
        items.append(("adapter", f"{weights.stat().st_size / 1e6:,.1f} MB", f"{numbers:,} parameters"))
    return items


def _curves(page: Document, run: Record) -> None:
    lines = [line for line in reading(run) if line != verdict(run)]
    if lines:
        page.heading("What the curve says")
        for line in lines:
            page.text(line)
        page.text("Read from the losses alone; answers to a test set (minilora predict) tell more.", "dim")
    page.heading("Loss")
    series = [Series("training loss", run.loss, 0, faint=True), Series("training loss, smoothed", run.smooth, 0)]
    if run.val:
        series.append(Series("validation loss", run.val, 1, dots=True))
    page.charts(line_chart(series, "step", "loss (nats a token)", best=run.best))
    page.text("Smoothed is a mean over about a twentieth of the steps. Point at a chart for its values.", "dim")
    if len(run.val) > 1:
        smooth = dict(run.smooth)
        with page.fold(f"The {len(run.val):,} validation losses"):
            rows = [
                [
                    f"{s:,}",
                    Best(f"{y:.4f} (best)") if run.best and s == run.best[0] else f"{y:.4f}",
                    f"{smooth[s]:.4f}" if s in smooth else "none",
                ]
                for s, y in run.val
            ]
            page.table(["step", "validation loss", "training loss, smoothed"], rows)
    page.heading("Optimizer and speed")
    clip = run.config.get("clip")
    levels = [Level(clip, f"clipped above {clip:g}")] if isinstance(clip, (int, float)) and clip > 0 else []
    page.charts(
        line_chart([Series("", _column(run, "lr"))], "step", "learning rate"),
        line_chart(_smoothed(run, "grad_norm"), "step", "gradient norm", log=True, levels=levels),
        line_chart(_smoothed(run, "tokens_per_second"), "step", "tokens a second"),
    )
    if levels:
        over = sum(m["grad_norm"] > clip for m in run.metrics)
        page.text(f"{over:,} of {len(run.metrics):,} steps were clipped.", "dim")


def _column(run: Record, key: str) -> list[tuple[float, float]]:
    return [(m["step"], m[key]) for m in run.metrics if isinstance(m.get(key), (int, float))]


def _smoothed(run: Record, key: str) -> list[Series]:
    """A quantity of the steps, with its smoothed line where there are too many steps to follow."""
    points = _column(run, key)
    if len(points) < MANY:
        return [Series("", points)]
    smooth = zip((step for step, _ in points), smoothed([y for _, y in points]), strict=True)
    return [Series("a step", points, faint=True), Series("smoothed", list(smooth))]


def _data(page: Document, run: Record) -> None:
    if not run.data:
        return
    data = run.data
    page.heading("Rows and lengths")
    share = 100 * data["trained"] / max(data["tokens"], 1)
    page.text(
        f"{data['rows']:,} rows: {data['train_rows']:,} trained on, {data['val_rows']:,} validated on; dropped: {reasons(run, 'dropped')}; "
        f"cut: {reasons(run, 'cut')}. "
        f"{data['tokens']:,} tokens an epoch, {share:.0f} % of them trained."
    )
    figures = []
    for key, label, limit in (
        ("masked_lengths", "masked tokens of a row", "max_source_length"),
        ("trained_lengths", "trained tokens of a row", "max_target_length"),
    ):
        counts = {int(n): rows for n, rows in data[key].items()}
        at = run.config.get(limit)
        figures.append(histogram([counts], [label], label, [Level(at, f"{limit} {at}")] if at else []))
    page.charts(*figures)
    for line in over_the_limit([run]):
        page.text(line)


def _adapter(page: Document, run: Record) -> None:
    """How far each adapter moves its linear."""
    folder = run.folder / "adapter"
    if not (folder / ADAPTER_WEIGHTS).is_file():
        return
    norms = adapter_norms(folder)
    page.heading("Adapter")
    cells, rest = {}, []
    for path, norm in norms.items():
        layer = re.search(r"\.(\d+)\.(.+)$", path)
        if layer:
            cells[layer[2].split(".")[-1], layer[1]] = norm
        else:
            rest.append(f"{path} {norm:.3g}")
    page.text(
        "Frobenius norm of scale x B A, the change that each adapter makes to its weight, by layer."
        + (f" Beside them: {', '.join(rest)}." if rest else "")
    )
    if cells:
        page.charts(heat_map(cells, "layer", "module"))
    still = [path for path, norm in norms.items() if norm == 0]
    if still:
        page.text(f"{len(still):,} of {len(norms):,} adapters change nothing (first: {still[0]})", "warning")


def adapter_norms(folder: Path) -> dict[str, float]:
    """||scale B A||_F of every adapter of a PEFT folder, by path; from the r x r products, B A is never formed."""
    from ..files.safetensors import SafetensorsFile

    config = read_json(folder / ADAPTER_CONFIG)
    file = SafetensorsFile(folder / ADAPTER_WEIGHTS)
    norms = {}
    for name in file.entries:
        if not name.endswith(".lora_A.weight"):
            continue
        path = name.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
        a, b = (file.tensor(n).double() for n in (name, name.replace(".lora_A.", ".lora_B.")))
        r = a.shape[0]
        alpha = (config.get("alpha_pattern") or {}).get(path, config["lora_alpha"])
        scale = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
        norms[path] = scale * math.sqrt(max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0))
    return norms


def make_samples(run: Record, count: int) -> None:
    """Write RUN/samples.jsonl: the answers of the base model and of the run's adapter to rows of its validation file or data."""
    from ..checkpoint.open_model import open_model
    from ..config import resolve
    from ..generate import read_generation
    from ..generate_many import generate_many
    from ..lora import without_adapters
    from ..text.tokenizer import load_tokenizer
    from ..tools.predict import read_questions

    config = run.config
    if not (run.folder / "adapter" / ADAPTER_WEIGHTS).is_file():
        raise UsageError(
            f"{run.folder} has no adapter", "Samples before and after are of a finished run with adapters."
        )
    rows = config["val"] if Path(str(config.get("val") or "")).is_file() else config["data"]
    tokenizer = load_tokenizer(config["model"])
    questions = read_questions(rows, tokenizer, resolve(config))
    chosen = sorted(np.random.default_rng(0).permutation(len(questions))[:count].tolist())
    device = None if config.get("device", "auto") == "auto" else config["device"]
    model = open_model(config["model"], tokenizer, run.folder / "adapter", device=device)
    stop = read_generation(Path(config["model"]))[1] | tokenizer.stop_ids

    def answers() -> dict[int, str]:
        found = generate_many(model, [questions[i].ids for i in chosen], stop, 256)
        return {chosen[a.number]: tokenizer.answer(a.ids) + (" …" if a.cut else "") for a in found}

    after = answers()
    with without_adapters(model):
        before = answers()
    lines = [
        {
            "question": questions[i].text,
            "label": questions[i].label,
            "before": before[i],
            "after": after[i],
            "where": questions[i].where,
        }
        for i in chosen
    ]
    write_file(run.folder / SAMPLES, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _samples(page: Document, run: Record) -> None:
    path = run.folder / SAMPLES
    page.heading("Answers before and after")
    if not path.is_file():
        page.text(f"None yet: minilora report {run.folder} --samples 4 asks the base model and the adapter.", "dim")
        return
    for row in read_json_lines(path):
        page.heading(row["where"], small=True)
        page.verbatim(row["question"])
        page.sides([("reference", row["label"]), ("before", row["before"]), ("after", row["after"])])


def _scores(page: Document, run: Record) -> None:
    """The scores of the answers to a test set, if there are some in the run's folder."""
    metrics = run.results.get("metrics") or {}
    if not metrics:
        return
    page.heading("Scores on the test set")
    page.text(
        f"{len(run.rows):,} rows of {run.decoded.get('data')}; in brackets 95 % intervals of a bootstrap over rows."
    )
    rows = [[name, with_interval(m["value"], m["low"], m["high"])] for name, m in metrics.items() if "low" in m]
    page.table(["metric", "score"], rows)
    with page.fold("What the metrics count"):
        page.words((name, m["definition"]) for name, m in metrics.items())


def _settings(page: Document, run: Record) -> None:
    """What was set, with what it would have been else; what was not set is folded."""
    known = {name: as_text(value) for name, value in defaults().items()}
    values = {name: as_text(value) for name, value in run.config.items()}
    changed = [[name, value, known.get(name, "none")] for name, value in values.items() if value != known.get(name)]
    rest = [[name, value] for name, value in values.items() if value == known.get(name)]
    page.heading("Settings")
    page.table(["setting that is not the default", "value", "default"], changed)
    if rest:
        with page.fold(f"The {len(rest):,} settings that are the default"):
            page.table(["setting", "value"], rest)


def as_text(value: Any) -> str:
    """A setting as a reader writes it."""
    if value is None or value == "" or value == {}:
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}={text}" for key, text in value.items())
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def report_quietly(folder: Path) -> str:
    """report() at the end of a run, which has better things to do than to fail for a picture; returns the path or why not."""
    try:
        return str(report(folder))
    except (MiniloraError, OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:
        return f"no report.html: {' '.join(str(error).split())[:200]}"
