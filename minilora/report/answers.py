"""The answers of runs to the same questions: side by side, those that differ most first, and in a blind rating of two runs."""

import hashlib
import json
from collections.abc import Callable
from itertools import combinations

import numpy as np

from .metrics import rouge_l
from .page import Document, asset
from .record import Record

MOST_SAMPLES, MOST_RATED = 30, 40
PAGE_CHARACTERS = 200_000  # of answers on a page, 6 bytes each at worst


def answers(page: Document, runs: list[Record]) -> None:
    """The blind rating of the first two runs, and the answers of all side by side."""
    answered = [run for run in runs if run.rows]
    if not answered or not all(answered[0].answers_the_rows_of(run) for run in answered):
        return
    rows = answered[0].rows
    texts = [[run.rows[i]["predict"] for run in answered] for i in range(len(rows))]
    apart = list(map(disagreement, texts))
    shown = sorted(range(len(rows)), key=lambda i: -apart[i])[:MOST_SAMPLES]
    cut = _shortener(answered)
    if len(answered) > 1:
        _rating(page, answered[0], answered[1], cut)
    page.heading("Answers side by side")
    page.text(
        f"The {len(shown):,} of {len(rows):,} rows in which the answers differ most (by ROUGE-L of characters between answers); "
        f"in {sum(len(set(row)) == 1 for row in texts):,} rows all answers are the same."
    )
    scored = {i: n for n, i in enumerate(i for i, row in enumerate(rows) if row["label"])}
    for i in shown:
        row = rows[i]
        page.heading(str(row.get("where", f"row {i + 1}")), small=True)
        page.verbatim(cut(row.get("question", row.get("prompt", ""))))
        sides = [("reference", cut(row["label"])) if row["label"] else ("no reference", "")]
        for run in answered:
            notes = [f"rougeL_char {run.measured['rougeL_char'].counts[scored[i], 0]:.0f}"] if i in scored else []
            notes += ["cut by the limit"] if run.rows[i].get("cut") else []
            sides.append((f"{run.name} ({', '.join(notes)})" if notes else run.name, cut(run.rows[i]["predict"])))
        page.sides(sides)


def _rating(page: Document, a: Record, b: Record, cut: Callable[[str], str]) -> None:
    """The blind rating of rows drawn at random: those that differ most would not stand for the rest."""
    differing = [i for i in range(len(a.rows)) if a.rows[i]["predict"] != b.rows[i]["predict"]]
    if not differing:
        return
    drawn = sorted(np.random.default_rng(0).permutation(differing)[:MOST_RATED].tolist())
    pairs = [
        [cut(text) for text in (row.get("question", ""), row["label"], row["predict"], b.rows[i]["predict"])]
        for i in drawn
        for row in [a.rows[i]]
    ]
    page.heading(f"Rate {a.letter} against {b.letter} without knowing which is which")
    page.text(
        f"{len(drawn):,} rows drawn at random from the {len(differing):,} in which the two differ, of {len(a.rows):,}."
    )
    key = "minilora-rating-" + hashlib.sha256(json.dumps([pairs, a.name, b.name]).encode()).hexdigest()[:16]
    page.add(asset("rating.html"), "(The rating is on the HTML page.)")
    page.data("rate-data", {"key": key, "a": a.name, "b": b.name, "pairs": pairs})
    page.script("rating.js")


def disagreement(answers: list[str]) -> float:
    """0 to 100: how far the two most different of some answers are apart, 100 minus ROUGE-L of their characters."""
    texts = ["".join(answer.split()) for answer in dict.fromkeys(answers)]
    return max((100 - rouge_l(a, b) for a, b in combinations(texts, 2)), default=0.0)


def _shortener(runs: list[Record]) -> Callable[[str], str]:
    """A function that shortens long texts, and says so, where the longest that a page can show would make it too large."""
    lengths = sorted((len(row[key]) for run in runs for row in run.rows for key in ("predict", "label")), reverse=True)
    longest = lengths[: MOST_SAMPLES * (len(runs) + 2) + MOST_RATED * 4]
    limits = (n for n in (4000, 2000, 1000, 500) if sum(min(n, x) for x in longest) <= PAGE_CHARACTERS)
    limit = next(limits, 250)

    def cut(text: str) -> str:
        rest = len(text) - limit
        return text if rest <= 0 else f"{text[:limit]} … ({rest:,} more characters)"

    return cut
