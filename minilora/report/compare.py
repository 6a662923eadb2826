"""`minilora compare`: runs side by side on one page. First which is best, then what makes them hard to compare, then the tables.

Every score is on the same untruncated references. A difference is given with the interval of a paired bootstrap and the p of
a randomisation test over rows: both tell how sure the rows are, not how another seed would have come out.
"""

import json
import math
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files.atomic import write_file
from ..run.monitor import clock
from .answers import answers
from .caveats import caveats, said
from .charts import Level, Series, histogram, line_chart
from .html import Best
from .metrics import Measured, interval, measured_rows, paired
from .page import Document
from .rating import RATE_SCRIPT, RATE_STYLE
from .record import Record, read_record
from .verdict import made_worse, verdict

CHOSEN = "rougeL_char"  # the metric of the verdict
MOST_TOLD = 5  # runs, all of which are told against the first; of more, the best alone
NOT_SETTINGS = ("output", "model", "data", "val")  # told by what they hold, where that is known
AXES = {"step": "step", "tokens": "tokens read", "time": "seconds"}


def compare(folders: list[str], output: str | Path, failed: Sequence[str] = ()) -> list[str]:
    """Write OUTPUT (html) and its twin in markdown; returns what they say first, in sentences. failed: what of runs that are not there."""
    runs = [read_record(folder) for folder in folders]
    if len(runs) < 2:
        raise UsageError("one run cannot be compared", "Give two or more; minilora report RUN is for one.")
    letters = string.ascii_uppercase
    if len(runs) > len(letters):
        raise UsageError(f"{len(runs)} runs are too many", f"Give at most {len(letters)}.")
    for run, letter in zip(runs, letters, strict=False):
        run.name = f"{letter}: {run.name}"
    page = comparison(runs, failed)
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_file(output, page.html(RATE_STYLE, RATE_SCRIPT))
    write_file(output.with_suffix(".md"), page.markdown())
    return page.verdicts


def comparison(runs: list[Record], failed: Sequence[str] = ()) -> Document:
    """The document on these runs."""
    page = Document(f"{len(runs)} runs compared")
    measured = {run.name: measured_rows(run.scored) for run in runs if run.scored}
    for text in verdicts(runs, measured):
        page.verdict(text)
    page.text(", ".join(f"{run.letter} is {run.name.partition(': ')[2]}" for run in runs) + ".", "dim")
    for warning in [*failed, *caveats(runs)]:
        page.text(warning, "warning")
    _differences(page, runs)
    page.heading("Runs")
    page.table(["run", "folder", "trained", "test rows"], [_about(run) for run in runs])
    _scores(page, runs, measured)
    _losses(page, runs)
    _lengths(page, runs)
    answers(page, runs, measured)
    return page


def _about(run: Record) -> list[Any]:
    steps = f"{run.metrics[-1]['step']:,} steps" if run.metrics else "no training"
    return [
        run.name,
        str(run.folder),
        steps + ("" if run.finished or not run.metrics else " (not finished)"),
        len(run.rows),
    ]


def _differences(page: Document, runs: list[Record]) -> None:
    """The settings that are not the same everywhere, and no others."""
    page.heading("What differs")
    trained = [r for r in runs if r.config]
    keys = dict.fromkeys(key for run in trained for key in run.config if key not in NOT_SETTINGS)
    rows = [(key, [run.config.get(key) for run in trained]) for key in keys]
    for name, known in (("model", "base"), ("data", "train_hash"), ("val", "val_hash")):
        same = len({run.data.get(known) for run in trained}) == 1 and all(run.data.get(known) for run in trained)
        values = [run.config.get(name) for run in trained]
        rows.append((name, values if not same else values[:1] * len(values)))
    differing = [(key, values) for key, values in rows if any(v != values[0] for v in values)]
    for run in trained:
        if run.data.get("train_hash") is None:
            page.text(f"{run.letter} has no data.json: what became of its rows is not known", "note")
    if not trained:
        page.text("No run was trained here.", "dim")
    elif differing:
        page.table(["setting", *(r.letter for r in trained)], [[key, *map(said, values)] for key, values in differing])
    else:
        page.text("The settings are the same." if len(trained) > 1 else "Only one of them was trained.")
    seeds = {run.config.get("seed") for run in trained}
    if len(trained) > 1 and len(seeds) == 1:
        page.text(
            "Each setting was trained with one seed. Another seed moves scores too; what is said of p below is about the "
            "test rows alone.",
            "note",
        )


def verdicts(runs: list[Record], measured: dict[str, dict[str, Measured]]) -> list[str]:
    """Which run is best, on the test set and by validation loss, where that can be compared; and which were made worse."""
    told = []
    answered = _answered_alike(runs)
    if len(answered) > 1:
        tests = len(_shared_metrics(answered, measured)) * (len(answered) - 1)
        values = {run.letter: interval(measured[run.name][CHOSEN]) for run in answered}
        best = max(values, key=lambda letter: values[letter].value)
        told.append(f"{best} has the highest score on the test set: {CHOSEN} {values[best].value:.2f} of 100.")
        for run in answered[1:] if len(answered) <= MOST_TOLD else [r for r in answered[1:] if r.letter == best]:
            d = paired(measured[answered[0].name][CHOSEN], measured[run.name][CHOSEN])
            told.append(_significance(answered[0], run, CHOSEN, d, tests))
    for group in _validated_alike([run for run in runs if not run.going_on]):
        best, *others = sorted(group, key=_best)
        if others and not made_worse(best):
            rest = ", ".join(f"{run.letter} {_best(run)[0]:.4g}" for run in others)
            told.append(
                f"{best.letter} has the lowest validation loss: {_best(best)[0]:.4g} at step {_best(best)[1]:,} ({rest})."
            )
    told += [f"{run.letter}: {verdict(run)}" for run in runs if made_worse(run)]
    return told or [f"{run.letter}: {verdict(run)}" for run in runs if run.metrics]


def _answered_alike(runs: list[Record]) -> list[Record]:
    """The runs that answered the test rows of the first that answered any which have a reference."""
    answered = [run for run in runs if run.scored]
    return [run for run in answered if answered[0].answers_the_rows_of(run)]


def _best(run: Record) -> tuple[float, float]:
    """(loss, step) of the lowest validation loss."""
    return (run.best[1], run.best[0]) if run.best else (math.nan, 0)


def _validated_alike(runs: list[Record]) -> list[list[Record]]:
    """The runs with validation losses, those together that were validated on the same rows, of the same tokens."""
    groups: dict[tuple[Any, Any], list[Record]] = {}
    for run in runs:
        if run.best:
            groups.setdefault((run.data.get("val_hash"), run.config.get("model")), []).append(run)
    return list(groups.values())


def _shared_metrics(answered: list[Record], measured: dict[str, dict[str, Measured]]) -> list[str]:
    return [n for n in measured[answered[0].name] if all(n in measured[run.name] for run in answered)]


def _scores(page: Document, runs: list[Record], measured: dict[str, dict[str, Measured]]) -> None:
    """Every metric of every run with its interval, and the differences from the first."""
    answered = [run for run in runs if run.scored]
    bare = [
        f"{len(run.rows) - len(run.scored):,} of {len(run.rows):,} of {run.letter}"
        for run in runs
        if len(run.scored) < len(run.rows)
    ]
    if bare:
        page.text(f"Test rows without a reference answer, which are answered and not scored: {', '.join(bare)}.")
    if not answered:
        return
    page.heading("Scores on the test set")
    names = _shared_metrics(answered, measured)
    first, *others = alike = _answered_alike(runs)
    rows = []
    for name in names:
        found = [interval(measured[run.name][name]) for run in answered]
        told = [with_interval(i.value, i.low, i.high) for i in found]
        rows.append([name, *(marked(told, [i.value for i in found]) if alike == answered else told)])
    page.table(["metric", *(r.letter for r in answered)], rows)
    if others:
        page.heading(f"Differences from {first.letter}, row by row", small=True)
        lines = []
        for name in names:
            line: list[Any] = [name]
            for run in others:
                d = paired(measured[first.name][name], measured[run.name][name])
                line += [with_interval(d.difference, d.low, d.high, "+.2f"), f"{d.p:.3f}"]
            lines.append(line)
        head = [h for run in others for h in (f"{run.letter} - {first.letter}", "p")]
        page.table(["metric", *head], lines)
    page.text(
        "Bold is the best of a row. In brackets: 95 % intervals of a bootstrap over rows, paired for differences. p: how often swapping the two answers of "
        "rows at random gives a difference as large (1,000 draws, two-sided); with many metrics in a table, a small p comes up "
        "by chance too.",
        "dim",
    )
    with page.fold("What the metrics count"):
        page.words((name, measured[first.name][name].definition) for name in names)


def with_interval(value: float, low: float, high: float, form: str = ".2f") -> str:
    """A score and its interval, which is not broken over lines."""
    return f"{value:{form}} ({low:{form}}\u00a0to\u00a0{high:{form}})"


def _significance(a: Record, b: Record, name: str, d: Any, tests: int) -> str:
    """The difference in words; significant only where it also stands against the number of comparisons (Bonferroni)."""
    which = "above" if d.difference > 0 else "below"
    size = f"{name}: {b.letter} is {abs(d.difference):.2f} {which} {a.letter} (p {d.p:.3f})"
    if d.p < max(0.05 / tests, 1.5 / 1000):
        return f"{size}: chance alone would hardly give that on these rows."
    if d.p < 0.05:
        return f"{size}: a hint, but {tests} comparisons were made, and one in twenty gives as much by chance."
    return f"{size}: these rows cannot tell the two apart."


def _losses(page: Document, runs: list[Record]) -> None:
    trained = [run for run in runs if run.metrics]
    if not trained:
        return
    page.heading("Losses, speed and memory")
    page.table(["", *(run.letter for run in trained)], loss_rows(trained))
    validated = [(i, run) for i, run in enumerate(trained) if run.val]
    if validated:
        series = [Series(run.name, run.val, i, dots=True) for i, run in validated]
        page.charts(line_chart(series, "step", "validation loss (nats a token)"))
    drawn = [
        line_chart(
            [Series(run.name, run.along(run.smooth, axis), i) for i, run in enumerate(trained)],
            label,
            "training loss, smoothed (nats a token)",
        )
        for axis, label in AXES.items()
    ]
    page.charts(drawn[0])
    with page.fold("The training losses by tokens and by time"):
        page.charts(*drawn[1:])
    page.text("Smoothed is a mean over about a twentieth of the steps. Bold is the best of a row.", "dim")


def loss_rows(runs: list[Record]) -> list[list[str]]:
    """Losses, size, speed and memory of runs, a quantity a row; the best is marked where the runs can be compared in it."""
    at_end = [run.val[-1][1] if run.val else math.nan for run in runs]
    smooth, best = [run.smooth[-1][1] for run in runs], [_best(run)[0] for run in runs]
    trained_alike = len({(run.data.get("train_hash"), run.config.get("model")) for run in runs}) == 1
    alike = len(_validated_alike(runs)) == 1
    told = [f"{run.best[1]:.4f} at step {run.best[0]:,}" if run.best else "none" for run in runs]
    low = [-y for y in smooth] if trained_alike else []
    return [
        ["training loss at the end, smoothed", *marked([f"{y:.4f}" for y in smooth], low)],
        [
            "validation loss at the end",
            *marked(
                [f"{y:.4f}" if run.val else "none" for run, y in zip(runs, at_end, strict=True)],
                [-y for y in at_end] if alike else [],
            ),
        ],
        ["best validation loss", *marked(told, [-y for y in best] if alike else [])],
        ["steps", *(f"{run.step:,}" for run in runs)],
        ["tokens read", *(f"{sum(m['tokens'] for m in run.metrics):,}" for run in runs)],
        ["of these trained", *(f"{sum(m['target_tokens'] for m in run.metrics):,}" for run in runs)],
        ["time", *(clock(run.metrics[-1]["time"]) for run in runs)],
        ["tokens a second, median", *marked([f"{run.speed:,.0f}" for run in runs], [run.speed for run in runs])],
        ["peak memory", *marked([f"{run.memory:.2f} GB" for run in runs], [-run.memory for run in runs])],
    ]


def marked(cells: list[str], values: list[float]) -> list[str]:
    """The cells, the one of the highest value marked, unless all read the same; no values: nothing is marked."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite or len(set(cells)) == 1:
        return cells
    top = cells[values.index(max(finite))]
    return [Best(cell) if cell == top else cell for cell in cells]


def _lengths(page: Document, runs: list[Record]) -> None:
    """What limits did to the rows of each run, and to the references of the test set."""
    known = [run for run in runs if run.data]
    if known:
        page.heading("Rows and lengths")
        shares = [100 * run.data["trained"] / max(run.data["tokens"], 1) for run in known]
        page.table(
            ["", *(run.letter for run in known)],
            [
                ["rows", *(f"{run.data['rows']:,}" for run in known)],
                *([what, *(reasons(run, what) for run in known)] for what in ("dropped", "cut")),
                ["trained on", *(f"{run.data['train_rows']:,}" for run in known)],
                ["validated on", *(f"{run.data['val_rows']:,}" for run in known)],
                ["tokens an epoch", *(f"{run.data['tokens']:,}" for run in known)],
                ["of these trained", *(f"{share:.0f} %" for share in shares)],
            ],
        )
        figures = []
        for key, label, limit in (
            ("masked_lengths", "masked tokens (the question)", "max_source_length"),
            ("trained_lengths", "trained tokens (the answers)", "max_target_length"),
        ):
            alike: dict[str, list[Record]] = {}
            for run in known:
                alike.setdefault(json.dumps(run.data.get(key) or {}), []).append(run)
            counts = [{int(n): c for n, c in json.loads(lengths).items()} for lengths in alike]
            names = [", ".join(run.name for run in group) for group in alike.values()]
            levels = [
                Level(run.config[limit], f"{run.letter}: {run.config[limit]}", i)
                for i, run in enumerate(known)
                if run.config.get(limit)
            ]
            figures.append(histogram(counts, names, label, levels))
        page.charts(*figures)
    for line in over_the_limit(runs):
        page.text(line)


def reasons(run: Record, what: str) -> str:
    """How many rows of a run were dropped, or cut, and why."""
    return ", ".join(f"{n:,} {reason}" for reason, n in (run.data.get(what) or {}).items()) or "none"


def over_the_limit(runs: list[Record]) -> list[str]:
    """How many references of the test set are longer than a run's limits let it learn."""
    lines = []
    for run in runs:
        lengths = [row["label_tokens"] for row in run.scored if isinstance(row.get("label_tokens"), int)]
        limit = run.config.get("max_target_length") or run.config.get("max_length")
        if not lengths or not limit:
            continue
        name = "max_target_length" if run.config.get("max_target_length") else "max_length"
        over = sum(n > limit for n in lengths)
        share = 100 * over / len(lengths)
        lines.append(
            f"{run.letter}: {over:,} of {len(lengths):,} test references ({share:.0f} %) are longer than its {name} of {limit:,} "
            f"tokens; the longest has {max(lengths):,}. They are scored whole."
        )
    return lines
