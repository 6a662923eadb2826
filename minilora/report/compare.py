"""`minilora compare`: runs side by side on one page. First the best, then what makes them hard to compare, then the tables.

Every score uses the same whole references. A difference comes with the interval of a paired bootstrap and the p of a
randomisation test over rows: both tell how sure the rows are, not how another seed would have come out.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..terminal import clock
from .answers import answers
from .caveats import caveats, over_the_limit
from .charts import Level, Series, histogram, line_chart
from .metrics import interval, paired
from .page import Best, Document, write_both
from .record import LETTERS, LIMITS, Record, as_text, as_written, read_record
from .verdict import made_worse, verdict

CHOSEN = "rougeL_char"  # the metric of the verdict
MOST_TOLD = 5  # runs that are all compared with the first in the verdict; of more, only the best is
NOT_SETTINGS = ("output", "model", "data", "val")  # compared by their contents, where these are known
AXES = {"step": "step", "tokens": "tokens read", "time": "seconds"}


def compare(folders: list[str], output: str | Path, failed: Sequence[str] = ()) -> list[str]:
    """Write OUTPUT (html) and its twin in markdown; returns their verdicts. failed: sentences on runs that are missing."""
    runs = [read_record(folder) for folder in folders]
    if len(runs) < 2:
        raise UsageError("one run cannot be compared", "Give two or more; minilora report RUN is for one.")
    if len(runs) > len(LETTERS):
        raise UsageError(f"{len(runs)} runs are too many", f"Give at most {len(LETTERS)}.")
    for run, letter in zip(runs, LETTERS, strict=False):
        run.name = f"{letter}: {run.name}"
    with as_written(", ".join(folders)):
        page = comparison(runs, failed)
        html, markdown = page.html(), page.markdown()
    write_both(Path(output), html, markdown)
    return page.verdicts


def comparison(runs: list[Record], failed: Sequence[str] = ()) -> Document:
    """The document on these runs."""
    page = Document(f"{len(runs)} runs compared")
    for text in verdicts(runs):
        page.verdict(text)
    page.text(", ".join(f"{run.letter} is {run.name.partition(': ')[2]}" for run in runs) + ".", "dim")
    for warning in [*failed, *caveats(runs)]:
        page.text(warning, "warning")
    _differences(page, runs)
    page.heading("Runs")
    page.table(
        ["run", "folder", "trained", "test rows"], [[r.name, str(r.folder), _trained(r), len(r.rows)] for r in runs]
    )
    _scores(page, runs)
    _losses(page, [run for run in runs if run.step])
    _lengths(page, [run for run in runs if run.data])
    for line in over_the_limit(runs):
        page.text(line)
    answers(page, runs)
    return page


def _trained(run: Record) -> str:
    if not run.step:
        return "no training"
    return f"{run.step:,} steps" + ("" if run.finished else " (not finished)")


def _differences(page: Document, runs: list[Record]) -> None:
    """The settings that are not the same everywhere, and no others."""
    page.heading("What differs")
    trained = [r for r in runs if r.config]
    keys = dict.fromkeys(key for run in trained for key in run.config if key not in NOT_SETTINGS)
    rows = {key: [run.config.get(key) for run in trained] for key in keys}
    for name, contents in (("model", "base"), ("data", "train_hash"), ("val", "val_hash")):
        found = {run.data.get(contents) for run in trained}
        if len(found) != 1 or not all(found):
            rows[name] = [run.config.get(name) for run in trained]
    differing = [[key, *map(as_text, row)] for key, row in rows.items() if any(value != row[0] for value in row)]
    for run in trained:
        if run.data.get("train_hash") is None:
            page.text(f"{run.letter} has no data.json: it is not known how its rows were used", "note")
    if not trained:
        page.text("No run was trained here.", "dim")
    elif differing:
        page.table(["setting", *(run.letter for run in trained)], differing)
    else:
        page.text("The settings are the same." if len(trained) > 1 else "Only one of them was trained.")
    if len(trained) > 1 and len({run.config.get("seed") for run in trained}) == 1:
        page.text(
            "Each setting was trained with one seed. Another seed changes scores too; every p below is about the test rows "
            "alone.",
            "note",
        )


def verdicts(runs: list[Record]) -> list[str]:
    """The best run on the test set and by validation loss, where runs can be compared; and those that training made worse."""
    found = []
    answered = _answered_alike(runs)
    if len(answered) > 1:
        tests = len(_shared_metrics(answered)) * (len(answered) - 1)
        first, *others = answered
        best = max(answered, key=lambda run: run.measured[CHOSEN].value)
        scores = {run.letter: f"{run.measured[CHOSEN].value:.2f}" for run in answered}
        score = scores[best.letter]
        found.append(f"{_leaders(scores, score, 'highest', 'score on the test set')}: {CHOSEN} {score} of 100.")
        found += [_significance(first, run, tests) for run in others if len(answered) <= MOST_TOLD or run is best]
    for group in _validated_alike([run for run in runs if not run.going_on]):
        best, *others = sorted(group, key=_best)
        if others and not made_worse(best):
            losses = {run.letter: f"{_best(run)[0]:.4g}" for run in group}
            loss, step = losses[best.letter], _best(best)[1]
            rest = ", ".join(f"{letter} {text}" for letter, text in losses.items() if text != loss)
            where = f" at step {step:,}" if loss not in (losses[run.letter] for run in others) else ""
            told = _leaders(losses, loss, "lowest", "validation loss")
            found.append(f"{told}: {loss}{where}" + (f" ({rest})." if rest else "."))
    found += [f"{run.letter}: {verdict(run)}" for run in runs if made_worse(run)]
    return found or [f"{run.letter}: {verdict(run)}" for run in runs if run.step]


def _leaders(shown: dict[str, str], best: str, superlative: str, what: str) -> str:
    """The runs whose value reads as the best does, and what they have: a superlative only where another run has less."""
    *first, last = [letter for letter, text in shown.items() if text == best]
    if not first:
        return f"{last} has the {superlative} {what}"
    same = "same" if 1 + len(first) == len(shown) else f"same {superlative}"
    return f"{', '.join(first)} and {last} have the {same} {what}"


def _answered_alike(runs: list[Record]) -> list[Record]:
    """The runs that answered the same test rows as the first that answered any with a reference."""
    answered = [run for run in runs if run.scored]
    return [run for run in answered if answered[0].answers_the_rows_of(run)]


def _validated_alike(runs: list[Record]) -> list[list[Record]]:
    """The runs with validation losses, grouped by the rows, the model and the objective that these are of."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for run in runs:
        if run.best:
            groups.setdefault((run.data.get("val_hash"), *_base(run)), []).append(run)
    return list(groups.values())


def _best(run: Record) -> tuple[float, float]:
    """(loss, step) of the lowest validation loss."""
    return (run.best[1], run.best[0]) if run.best else (math.nan, 0)


def _shared_metrics(answered: list[Record]) -> list[str]:
    return [name for name in answered[0].measured if all(name in run.measured for run in answered)]


def _scores(page: Document, runs: list[Record]) -> None:
    """Every metric of every run with its interval, and the differences from the first."""
    bare = [
        f"{len(run.rows) - len(run.scored):,} of {len(run.rows):,} of {run.letter}"
        for run in runs
        if len(run.scored) < len(run.rows)
    ]
    if bare:
        page.text(f"Test rows without a reference answer, which are answered and not scored: {', '.join(bare)}.")
    answered = [run for run in runs if run.scored]
    if not answered:
        return
    page.heading("Scores on the test set")
    names = _shared_metrics(answered)
    first, *others = alike = _answered_alike(runs)
    rows = []
    for name in names:
        found = [interval(run.measured[name]) for run in answered]
        rows.append([name, *marked(list(map(str, found)), [i.value for i in found] if alike == answered else [])])
    page.table(["metric", *(r.letter for r in answered)], rows)
    if others:
        page.heading(f"Differences from {first.letter}, row by row", small=True)
        head, rows = ["metric"], [[name] for name in names]
        for run in others:
            head += [f"{run.letter} - {first.letter}", "p"]
            for row in rows:
                difference = paired(first.measured[row[0]], run.measured[row[0]])
                row += [str(difference), f"{difference.p:.3f}"]
        page.table(head, rows)
    page.text(
        "Bold is the best of a row. In brackets: 95 % intervals of a bootstrap over rows, paired for differences. p: how often "
        "swapping the two answers of rows at random gives a difference as large (1,000 draws, two-sided); with many metrics in "
        "a table, a small p comes up by chance too.",
        "dim",
    )
    with page.fold("What the metrics count"):
        page.words((name, first.measured[name].definition) for name in names)


def _significance(a: Record, b: Record, tests: int) -> str:
    """The difference in words; significant only if it also holds against the number of comparisons (Bonferroni)."""
    d = paired(a.measured[CHOSEN], b.measured[CHOSEN])
    apart = f"{abs(d.difference):.2f} {'above' if d.difference > 0 else 'below'}"
    how = apart if not apart.startswith("0.00") else "as high as"
    size = f"{CHOSEN}: {b.letter} is {how} {a.letter} (p {d.p:.3f})"
    if d.p < max(0.05 / tests, 1.5 / 1000):
        return f"{size}: chance alone would hardly give that on these rows."
    if d.p < 0.05:
        return f"{size}: a hint, but {tests} comparisons were made, and one in twenty gives as much by chance."
    return f"{size}: these rows cannot tell the two apart."


def _losses(page: Document, runs: list[Record]) -> None:
    if not runs:
        return
    page.heading("Losses, speed and memory")
    page.table(["", *(run.letter for run in runs)], loss_rows(runs))
    validated = [Series(run.name, run.val, i, dots=True) for i, run in enumerate(runs) if run.val]
    if validated:
        page.charts(line_chart(validated, "step", "validation loss (nats a token)"))
    first, *others = (
        line_chart(
            [Series(run.name, run.along(run.smooth, axis), i) for i, run in enumerate(runs)],
            label,
            "training loss, smoothed (nats a token)",
        )
        for axis, label in AXES.items()
    )
    page.charts(first)
    with page.fold("The training losses by tokens and by time"):
        page.charts(*others)
    page.text("Smoothed is a mean over about a twentieth of the steps. Bold is the best of a row.", "dim")


def _base(run: Record) -> tuple[Any, ...]:
    """What losses are of beside their rows: the model and the objective."""
    return run.config.get("model"), run.base, run.objective


def loss_rows(runs: list[Record]) -> list[list[str]]:
    """Losses, size, speed and memory of runs, a quantity a row; the best is marked where the runs can be compared in it."""
    same_rows = len({(run.data.get("train_hash"), *_base(run)) for run in runs}) == 1
    same_val = len(_validated_alike(runs)) == 1
    row = partial(_row, runs)
    return [
        row(
            "training loss at the end, smoothed",
            lambda run: f"{run.smooth[-1][1]:.4f}",
            lambda run: -run.smooth[-1][1] if same_rows else math.nan,
        ),
        row(
            "validation loss at the end",
            lambda run: f"{run.val[-1][1]:.4f}" if run.val else "none",
            lambda run: -run.val[-1][1] if run.val and same_val else math.nan,
        ),
        row(
            "best validation loss",
            lambda run: f"{run.best[1]:.4f} at step {run.best[0]:,}" if run.best else "none",
            lambda run: -_best(run)[0] if same_val else math.nan,
        ),
        row("steps", lambda run: f"{run.step:,}"),
        row("tokens read", lambda run: f"{run.total('tokens'):,}"),
        row("of these trained", lambda run: f"{run.total('target_tokens'):,}"),
        row("time", lambda run: clock(run.time)),
        row("tokens a second, median", lambda run: f"{run.speed:,.0f}", lambda run: run.speed),
        row("peak memory", lambda run: f"{run.memory:.2f} GB", lambda run: -run.memory),
    ]


def _row(
    runs: list[Record],
    name: str,
    text: Callable[[Record], str],
    value: Callable[[Record], float] = lambda run: math.nan,
) -> list[str]:
    """A row of a table in which each run has a column."""
    return [name, *marked([text(run) for run in runs], [value(run) for run in runs])]


def marked(cells: list[str], values: list[float]) -> list[str]:
    """The cells, with the one of the highest finite value marked, unless there is none or all read the same."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite or len(set(cells)) == 1:
        return cells
    top = cells[values.index(max(finite))]
    return [Best(cell) if cell == top else cell for cell in cells]


def _lengths(page: Document, runs: list[Record]) -> None:
    """How many rows each run used, and how long they were."""
    if not runs:
        return
    page.heading("Rows and lengths")
    row = partial(_row, runs)
    page.table(
        ["", *(run.letter for run in runs)],
        [
            row("rows", lambda run: f"{run.data['rows']:,}"),
            row("dropped", lambda run: run.reasons("dropped")),
            row("cut", lambda run: run.reasons("cut")),
            row("trained on", lambda run: f"{run.data['train_rows']:,}"),
            row("validated on", lambda run: f"{run.data['val_rows']:,}"),
            row("tokens an epoch", lambda run: f"{run.data['tokens']:,}"),
            row("of these trained", lambda run: run.trained_share),
        ],
    )
    page.charts(*(_length_chart(runs, kind, limit) for kind, limit in LIMITS.items()))


def _length_chart(runs: list[Record], kind: str, limit: str) -> str:
    """A histogram of the lengths of rows with the limits on them; runs with the same lengths share a line."""
    alike: dict[bytes, list[Record]] = {}
    for run in runs:
        alike.setdefault(run.lengths(kind).tobytes(), []).append(run)
    sets = {", ".join(run.name for run in group): group[0].lengths(kind) for group in alike.values()}
    limits = [(run.letter, run.config.get(limit), i) for i, run in enumerate(runs)]
    levels = [Level(most, f"{letter}: {most}", i) for letter, most, i in limits if most]
    return histogram(sets, f"{kind} tokens of a row", levels)
