"""The answers of runs to the same questions: beside each other, those that differ most first, and rated without knowing whose they are."""

from collections.abc import Callable
from itertools import combinations

import numpy as np

from .metrics import Measured, rouge_l
from .page import Document
from .rating import rating_block
from .record import Record

MOST_SAMPLES, MOST_RATED = 30, 40
PAGE_CHARACTERS = 200_000  # of answers on a page, 6 bytes each at worst


def answers(page: Document, runs: list[Record], measured: dict[str, dict[str, Measured]]) -> None:
    """The blind rating of the first two runs, and the answers of all side by side."""
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
    page.text(
        f"The {len(shown):,} of {count:,} rows in which the answers differ most (by ROUGE-L of characters between answers); "
        f"in {same:,} rows all answers are the same."
    )
    scored = {i: n for n, i in enumerate(i for i, row in enumerate(answered[0].rows) if row["label"])}
    for i in shown:
        row = answered[0].rows[i]
        page.heading(str(row.get("where", f"row {i + 1}")), small=True)
        page.verbatim(cut(row.get("question", row.get("prompt", ""))))
        sides = [("reference", cut(row["label"])) if row["label"] else ("no reference", "")]
        for run in answered:
            told = [f"rougeL_char {measured[run.name]['rougeL_char'].counts[scored[i], 0]:.0f}"] if i in scored else []
            told += ["cut by the limit"] if run.rows[i].get("cut") else []
            sides.append((f"{run.name} ({', '.join(told)})" if told else run.name, cut(run.rows[i]["predict"])))
        page.sides(sides)


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
    page.text(
        f"{len(drawn):,} rows drawn at random from the {len(differing):,} in which the two differ, of {len(a.rows):,}."
    )
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
