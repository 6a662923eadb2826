"""`minilora compare`: runs side by side on one page, with what makes them hard to compare said first.

Every score is on the same untruncated references. A difference is given with the interval of a paired bootstrap and the p of
a randomisation test over rows: both tell how sure the rows are, not how another seed would have come out.
"""

import string
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ..durable import write_file
from ..errors import UsageError
from ..monitor import clock
from .caveats import caveats, said
from .charts import Level, Series, histogram, line_chart
from .document import Document
from .metrics import Measured, interval, measured_rows, paired, rouge_l
from .rating import RATE_SCRIPT, RATE_STYLE, rating_block
from .record import Record, read_record

MOST_SAMPLES, MOST_RATED = 30, 40
PAGE_CHARACTERS = 200_000  # of answers on a page, 6 bytes each at worst
NOT_SETTINGS = ("output", "model", "data", "val")  # told by what they hold, where that is known
AXES = {"step": "step", "tokens": "tokens read", "time": "seconds"}


def compare(folders: list[str], output: str | Path) -> str:
    """Write OUTPUT (html) and its twin in markdown; returns the markdown."""
    runs = [read_record(folder) for folder in folders]
    if len(runs) < 2:
        raise UsageError("one run cannot be compared", "Give two or more; minilora report RUN is for one.")
    letters = string.ascii_uppercase
    if len(runs) > len(letters):
        raise UsageError(f"{len(runs)} runs are too many", f"Give at most {len(letters)}.")
    for run, letter in zip(runs, letters, strict=False):
        run.name = f"{letter}: {run.name}"
    page = comparison(runs)
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_file(output, page.html(RATE_STYLE, RATE_SCRIPT))
    write_file(output.with_suffix(".md"), page.markdown())
    return page.markdown()


def comparison(runs: list[Record]) -> Document:
    """The document on these runs."""
    page = Document(f"{len(runs)} runs compared")
    measured = {run.name: measured_rows(run.scored) for run in runs if run.scored}
    for warning in caveats(runs):
        page.text(warning, "warning")
    page.heading("Runs")
    page.table(["run", "folder", "trained", "test rows"], [_about(run) for run in runs])
    _differences(page, runs)
    _scores(page, runs, measured)
    _losses(page, runs)
    _lengths(page, runs)
    _samples(page, runs, measured)
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
        page.text("Each setting was trained with one seed. Another seed moves scores too; what is said of p below is about the "
                  "test rows alone.", "note")  # fmt: skip


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
    names = [n for n in measured[answered[0].name] if all(n in measured[r.name] for r in answered)]
    rows = []
    for name in names:
        found = [interval(measured[run.name][name]) for run in answered]
        rows.append([name, *(f"{i.value:.2f}  ({i.low:.2f} to {i.high:.2f})" for i in found)])
    page.table(["metric", *(r.letter for r in answered)], rows)
    first, others = answered[0], [r for r in answered[1:] if answered[0].answers_the_rows_of(r)]
    if others:
        page.heading(f"Differences from {first.letter}, row by row", small=True)
        lines, told = [], []
        for name in names:
            line: list[Any] = [name]
            for run in others:
                d = paired(measured[first.name][name], measured[run.name][name])
                line += [f"{d.difference:+.2f}  ({d.low:+.2f} to {d.high:+.2f})", f"{d.p:.3f}"]
                if name == "rougeL_char":
                    told.append(_verdict(first, run, name, d, len(names) * len(others)))
            lines.append(line)
        head = [h for run in others for h in (f"{run.letter} - {first.letter}", "p")]
        page.table(["metric", *head], lines)
        for text in told:
            page.text(text)
    page.text("In brackets: 95 % intervals of a bootstrap over rows, paired for differences. p: how often swapping the two answers of "
              "rows at random gives a difference as large (1,000 draws, two-sided); with many metrics in a table, a small p comes up "
              "by chance too.", "dim")  # fmt: skip
    page.table(["metric", "what it counts"], [[name, measured[first.name][name].definition] for name in names])


def _verdict(a: Record, b: Record, name: str, d: Any, tests: int) -> str:
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
    for axis, label in AXES.items():
        series = []
        for i, run in enumerate(trained):
            series.append(Series(run.name, run.along(run.smooth, axis), i, i))
            if run.val:
                series.append(Series(f"{run.letter}, validation", run.along(run.val, axis), i, i, dots=True))
        page.chart(line_chart(series, label, "loss (nats a token)"))
    page.text("Training losses are smoothed over a twentieth of the steps.", "dim")


def loss_rows(runs: list[Record]) -> list[list[str]]:
    """Losses, size, speed and memory of runs, a quantity a row."""

    def best(run: Record) -> str:
        return f"{run.best[1]:.4f} at step {run.best[0]:,}" if run.best else "none"

    quantities: dict[str, Callable[[Record], str]] = {
        "training loss at the end, smoothed": lambda run: f"{run.smooth[-1][1]:.4f}",
        "validation loss at the end": lambda run: f"{run.val[-1][1]:.4f}" if run.val else "none",
        "best validation loss": best,
        "steps": lambda run: f"{run.metrics[-1]['step']:,}",
        "tokens read": lambda run: f"{sum(m['tokens'] for m in run.metrics):,}",
        "of these trained": lambda run: f"{sum(m['target_tokens'] for m in run.metrics):,}",
        "time": lambda run: clock(run.metrics[-1]["time"]),
        "tokens a second, median": lambda run: f"{run.speed:,.0f}",
        "peak memory": lambda run: f"{run.memory:.2f} GB",
    }
    return [[name, *(of(run) for run in runs)] for name, of in quantities.items()]


def _lengths(page: Document, runs: list[Record]) -> None:
    """What limits did to the rows of each run, and to the references of the test set."""
    known = [run for run in runs if run.data]
    if known:
        page.heading("Rows and lengths")
        rows = []
        for run in known:
            share = 100 * run.data["trained"] / max(run.data["tokens"], 1)
            rows.append([run.name, run.data["rows"], reasons(run, "dropped"), reasons(run, "cut"), run.data["train_rows"],
                         run.data["val_rows"], run.data["tokens"], f"{share:.0f} %"])  # fmt: skip
        head = ["run", "rows", "dropped", "cut", "trained on", "validated on", "tokens an epoch", "of these trained"]
        page.table(head, rows)
        for key, label, limit in (("masked_lengths", "masked tokens (the question)", "max_source_length"),
                                  ("trained_lengths", "trained tokens (the answers)", "max_target_length")):  # fmt: skip
            counts = [{int(n): c for n, c in (run.data.get(key) or {}).items()} for run in known]
            levels = [
                Level(run.config[limit], f"{run.letter}: {run.config[limit]}", i)
                for i, run in enumerate(known)
                if run.config.get(limit)
            ]
            page.chart(histogram(counts, [run.name for run in known], label, levels))
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
        lines.append(f"{run.letter}: {over:,} of {len(lengths):,} test references ({share:.0f} %) are longer than its {name} of {limit:,} "
                     f"tokens; the longest has {max(lengths):,}. They are scored whole.")  # fmt: skip
    return lines


def _samples(page: Document, runs: list[Record], measured: dict[str, dict[str, Measured]]) -> None:
    """Answers side by side, those that differ most first, and the blind rating of the first two runs."""
    answered = [run for run in runs if run.rows]
    if not answered or not all(answered[0].answers_the_rows_of(run) for run in answered):
        return
    count = len(answered[0].rows)
    apart = [disagreement([run.rows[i]["predict"] for run in answered]) for i in range(count)]
    shown = sorted(range(count), key=lambda i: -apart[i])[:MOST_SAMPLES]
    cut = _fitting(answered)
    if len(answered) > 1:
        _rating(page, answered[0], answered[1], cut)
    page.heading("Answers side by side")
    same = sum(len({run.rows[i]["predict"] for run in answered}) == 1 for i in range(count))
    page.text(f"The {len(shown):,} of {count:,} rows in which the answers differ most (by ROUGE-L of characters between answers); "
              f"in {same:,} rows all answers are the same.")  # fmt: skip
    scored = {i: n for n, i in enumerate(i for i, row in enumerate(answered[0].rows) if row["label"])}
    for i in shown:
        row = answered[0].rows[i]
        page.heading(str(row.get("where", f"row {i + 1}")), small=True)
        page.verbatim(cut(row.get("question", row.get("prompt", ""))))
        page.text("reference" if row["label"] else "no reference", "dim")
        if row["label"]:
            page.verbatim(cut(row["label"]))
        for run in answered:
            told = [f"rougeL_char {measured[run.name]['rougeL_char'].counts[scored[i], 0]:.0f}"] if i in scored else []
            told += ["cut by the limit"] if run.rows[i].get("cut") else []
            page.text(f"{run.name} ({', '.join(told)})" if told else run.name, "dim")
            page.verbatim(cut(run.rows[i]["predict"]))


def _rating(page: Document, a: Record, b: Record, cut: Callable[[str], str]) -> None:
    """The blind rating, of rows drawn at random: those that differ most would not speak for the rest."""
    differing = [i for i in range(len(a.rows)) if a.rows[i]["predict"] != b.rows[i]["predict"]]
    if not differing:
        return
    drawn = sorted(np.random.default_rng(0).permutation(differing)[:MOST_RATED].tolist())
    texts = [
        [a.rows[i].get("question", ""), a.rows[i]["label"], a.rows[i]["predict"], b.rows[i]["predict"]] for i in drawn
    ]
    page.heading(f"Rate {a.letter} against {b.letter} without knowing which is which")
    page.text(f"{len(drawn):,} rows drawn at random from the {len(differing):,} in which the two differ, "
              f"of {len(a.rows):,}.")  # fmt: skip
    page.add(rating_block([list(map(cut, row)) for row in texts], a.name, b.name), "(The rating is on the HTML page.)")


def disagreement(answers: list[str]) -> float:
    """0 to 100: how far the two most different of some answers are apart, 100 less ROUGE-L of their characters."""
    texts = ["".join(answer.split()) for answer in dict.fromkeys(answers)]
    return max((100 - rouge_l(a, b) for a, b in combinations(texts, 2)), default=0.0)


def _fitting(runs: list[Record]) -> Callable[[str], str]:
    """Cuts texts, and says so, where the longest that a page can hold would make it too large."""
    lengths = sorted((len(row[key]) for run in runs for row in run.rows for key in ("predict", "label")), reverse=True)
    texts = MOST_SAMPLES * (len(runs) + 2) + MOST_RATED * 4
    limit = next(
        n
        for n in (4000, 2000, 1000, 500, 250)
        if sum(min(n, x) for x in lengths[:texts]) <= PAGE_CHARACTERS or n == 250
    )

    def cut(text: str) -> str:
        rest = len(text) - limit
        return text if rest <= 0 else f"{text[:limit]} … ({rest:,} more characters)"

    return cut
