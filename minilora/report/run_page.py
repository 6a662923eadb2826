"""`minilora report`: one run on one page, with what its curve shows, as far as a curve can show it.

It is made from the files of the run folder alone, so it can be made again at any time; only --samples loads the model.
"""

import json
import math
import re
import time
from collections import deque
from pathlib import Path

import numpy as np

from ..config import defaults
from ..errors import MiniloraError, UsageError
from ..files.atomic import write_file
from ..files.model_folder import ADAPTER_WEIGHTS
from ..files.strict_json import read_json_lines
from ..terminal import clock, shell
from .caveats import over_the_limit, rounded_note
from .charts import Level, Series, heat_map, line_chart, marked_histogram
from .curve import Curve, smoothed
from .metrics import Interval
from .page import Best, Document, check_page
from .record import LIMITS, Record, as_text, as_written, hash_of, read_record
from .verdict import reading, verdict

SAMPLES = "samples.jsonl"
MANY = 200  # steps, from which on a line of single steps is a block
REFRESH = 20  # seconds until the page of a run that goes on reloads itself


def report(folder: str | Path, samples: int = 0) -> Path:
    """Write RUN/report.html and return its path; first the base model and the run's adapter answer `samples` rows."""
    folder = Path(folder)
    run = read_record(folder)
    if not run.config:
        raise UsageError(f"{folder} is not a run folder", "Give the --output of minilora train.")
    check_page(folder / "report.html")
    if samples:
        make_samples(run, samples)
    with as_written(folder):
        page = run_page(run).html()
    write_file(folder / "report.html", page)
    return folder / "report.html"


def run_page(run: Record) -> Document:
    """The document on a run: its conclusion, the most important numbers, then the curves and all else."""
    page = Document(f"Run {run.name}", refresh=REFRESH if run.going_on else 0)
    page.verdict(verdict(run))
    if run.going_on:
        page.text(
            f"Written at {time.strftime('%H:%M:%S')}. This page reloads itself every {REFRESH} seconds; training writes it "
            f"at its checkpoints, {shell('report', run.folder)} at any time.",
            "dim",
        )
    if run.step:
        page.numbers(headline(run))
    made = run.data.get("machine")
    if made:
        versions = f"minilora {made['minilora']}, torch {made['torch']}, python {made['python']}"
        page.text(f"{versions}, on {made['device']}; computed in {made['computing']}", "dim")
    if run.step:
        _curves(page, run)
    if run.looks.count:
        run.looks.show(page)
    if run.data:
        _data(page, run)
    if (run.folder / "adapter" / ADAPTER_WEIGHTS).is_file():
        _adapter(page, run)
    if run.scores:
        _scores(page, run)
    _samples(page, run)
    _settings(page, run)
    return page


def headline(run: Record) -> list[tuple[str, str, str]]:
    """(name, value, detail) of the numbers that a reader looks for first."""
    so_far = " so far" if not run.finished else ""
    if run.best:
        where = f"at step {run.best[0]:,} of {run.steps:,}" if run.best[0] else "before training"
        first = (f"best validation loss{so_far}", f"{run.best[1]:.4f}", where)
    else:
        first = (f"training loss{so_far}", f"{run.smooth[-1][1]:.4f}", "smoothed; no validation rows")
    items = [
        first,
        (
            "tokens trained",
            f"{run.total('target_tokens'):,}",
            f"of {run.total('tokens'):,} read, in {run.step:,} steps",
        ),
        ("time", clock(run.time), f"{run.speed:,.0f} tokens a second"),
        ("peak memory", f"{run.memory:.2f} GB", ""),
    ]
    weights = run.folder / "adapter" / ADAPTER_WEIGHTS
    if weights.is_file():
        from ..files.safetensors import SafetensorsFile  # it loads torch

        numbers = sum(math.prod(entry.shape) for entry in SafetensorsFile(weights).entries.values())
        items.append(("adapter", f"{weights.stat().st_size / 1e6:,.1f} MB", f"{numbers:,} parameters"))
    return items


def _curves(page: Document, run: Record) -> None:
    lines = reading(run)
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
    if rounded := rounded_note(run):
        page.text(f"{rounded[0].upper()}{rounded[1:]}.", "warning")
    page.text("Smoothed is a mean over about a twentieth of the steps. Point at a chart for its values.", "dim")
    if len(run.val) > 1:
        best, steps = run.best and run.best[0], {step for step, _ in run.val}
        smooth = {step: f"{loss:.4f}" for step, loss in run.smooth if step in steps}
        with page.fold(f"The {len(run.val):,} validation losses"):
            page.table(
                ["step", "validation loss", "training loss, smoothed"],
                [
                    [f"{s:,}", Best(f"{y:.4f} (best)") if s == best else f"{y:.4f}", smooth.get(s, "none")]
                    for s, y in run.val
                ],
            )
    if run.objective[0] == "dpo":
        sides = [Series(name, run.column(name), i) for i, name in enumerate(("chosen", "rejected"))]
        page.charts(
            line_chart(sides, "step", "reward (log p - log q, times beta)"),
            line_chart([Series("", run.column("accuracy"))], "step", "pairs whose chosen answer has the higher reward"),
        )
    page.heading("Optimizer and speed")
    clip = run.config.get("clip")
    levels = [Level(clip, f"clipped above {clip:g}")] if isinstance(clip, (int, float)) and clip > 0 else []
    page.charts(
        line_chart([Series("", run.column("lr"))], "step", "learning rate"),
        line_chart(_readable(run.column("grad_norm")), "step", "gradient norm", log=True, levels=levels),
        line_chart(_readable(run.column("tokens_per_second")), "step", "tokens a second"),
    )
    if levels:
        over = sum(norm > clip for norm in run.columns["grad_norm"])
        page.text(f"{over:,} of {len(run.loss):,} steps were clipped.", "dim")


def _readable(curve: Curve) -> list[Series]:
    """A curve, with its smoothed line where there are too many steps to follow."""
    if len(curve) < MANY:
        return [Series("", curve)]
    return [Series("a step", curve, faint=True), Series("smoothed", smoothed(curve))]


def _data(page: Document, run: Record) -> None:
    page.heading("Rows and lengths")
    data = run.data
    page.text(
        f"{data['rows']:,} rows: {data['train_rows']:,} trained on, {data['val_rows']:,} validated on; "
        f"dropped: {run.reasons('dropped')}; cut: {run.reasons('cut')}. "
        f"{data['tokens']:,} tokens an epoch, {run.trained_share} of them trained."
    )
    limits = {kind: {name: run.config[name]} if run.config.get(name) else {} for kind, name in LIMITS.items()}
    page.charts(*(marked_histogram(run.lengths(k), marks, f"{k} tokens of a row") for k, marks in limits.items()))
    for line in over_the_limit([run]):
        page.text(line)


def _adapter(page: Document, run: Record) -> None:
    """How far each adapter moves its linear."""
    if run.config.get("method", "lora") != "lora":
        page.text(f"What --method {run.config['method']} trained is not B A: there are no norms to draw.", "dim")
        return
    from ..checkpoint.factors import read_factors  # it loads torch

    norms = {path: factors.norm for path, factors in read_factors(run.folder / "adapter").items()}
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


def make_samples(run: Record, count: int) -> None:
    """Write RUN/samples.jsonl: answers of the base model and of the run's adapter to rows of its validation file or data."""
    from ..adapted import without_adapters
    from ..checkpoint.open_model import open_model
    from ..generate import Request, decode
    from ..rows.questions import read_questions
    from ..rows.sources import validation_rows
    from ..sampling import read_generation
    from ..settings import resolve
    from ..text.tokenizer import load_tokenizer

    config = run.config
    if not (run.folder / "adapter" / ADAPTER_WEIGHTS).is_file():
        raise UsageError(
            f"{run.folder} has no adapter", "Samples before and after are of a finished run with adapters."
        )
    if run.objective[0] == "dpo":
        raise UsageError(f"{run.folder} was trained on preferences", "Ask a file of questions: minilora predict.")
    tokenizer, settings = load_tokenizer(config["model"]), resolve(config)
    questions = read_questions(validation_rows(settings, run.folder), tokenizer, settings)
    chosen = [questions[i] for i in sorted(np.random.default_rng(0).permutation(len(questions))[:count].tolist())]
    device = None if config.get("device", "auto") == "auto" else config["device"]
    model = open_model(config["model"], tokenizer, run.folder / "adapter", device=device, quant=settings.quant)
    stop = read_generation(Path(config["model"]))[1] | tokenizer.stop_ids

    def answers() -> list[str]:
        requests = [Request(q.ids, stop, 256) for q in chosen]
        for _ in decode(model, deque(requests), slots=16):
            pass
        return [tokenizer.answer(r.ids) + (" …" if r.finish_reason == "length" else "") for r in requests]

    after = answers()
    with without_adapters(model):
        before = answers()
    now = _adapter_of(run)
    lines = [
        {"question": q.text, "label": q.label, "before": old, "after": new, "where": q.where, "adapter": now}
        for q, old, new in zip(chosen, before, after, strict=True)
    ]
    write_file(run.folder / SAMPLES, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _adapter_of(run: Record) -> str:
    return hash_of(run.folder / "adapter" / ADAPTER_WEIGHTS)


def _samples(page: Document, run: Record) -> None:
    path = run.folder / SAMPLES
    page.heading("Answers before and after")
    if not path.is_file():
        page.text(
            f"None yet: {shell('report', run.folder, '--samples', 4)} asks the base model and the adapter.", "dim"
        )
        return
    rows, now = list(read_json_lines(path)), _adapter_of(run)
    if any(row.get("adapter") != now for row in rows):
        page.text("The answers after may be of another adapter than the run has now: ask again.", "warning")
    for row in rows:
        page.heading(row["where"], small=True)
        page.verbatim(row["question"])
        page.sides([("reference", row["label"]), ("before", row["before"]), ("after", row["after"])])


def _scores(page: Document, run: Record) -> None:
    """The scores of the answers to a test set that are in the run's folder."""
    page.heading("Scores on the test set")
    page.text(
        f"{len(run.rows):,} rows of {run.decoded.get('data')}; in brackets 95 % intervals of a bootstrap over rows."
    )
    if run.stale_answers:
        page.text("The answers are of other weights than the run has now: predict again.", "warning")
    rows = [[name, Interval(m["value"], m["low"], m["high"])] for name, m in run.scores.items() if "low" in m]
    page.table(["metric", "score"], rows)
    with page.fold("What the metrics count"):
        page.words((name, m["definition"]) for name, m in run.scores.items())


def _settings(page: Document, run: Record) -> None:
    """The settings that are not the default, beside the default; the others are folded."""
    known = {name: as_text(value) for name, value in defaults().items()}
    values = {name: as_text(value) for name, value in run.config.items()}
    changed = [[name, value, known.get(name, "none")] for name, value in values.items() if value != known.get(name)]
    rest = [[name, value] for name, value in values.items() if value == known.get(name)]
    page.heading("Settings")
    page.table(["setting that is not the default", "value", "default"], changed)
    if rest:
        with page.fold(f"The {len(rest):,} settings that are the default"):
            page.table(["setting", "value"], rest)


def report_quietly(folder: Path) -> str:
    """The path that report() has written, or why it could not: the end of a run must not fail for a picture."""
    try:
        return str(report(folder))
    except (MiniloraError, OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:
        return f"no report.html: {' '.join(str(error).split())[:200]}"
