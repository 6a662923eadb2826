"""Scores of rows on a terminal and as a page: the histogram, the cut-offs, the strangest rows."""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from ..console import Console
from ..report.charts import marked_histogram, text_histogram
from ..report.page import Document
from ..rows.token_store import Examples
from .score_data import RowScore

EVERY = 5.0  # seconds between two lines of progress
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
NOTE = (
    "Perplexity is exp of the mean cross-entropy over a row's trained tokens. A high one can mean noise, a wrong answer, "
    "another language, or simply something new that is worth learning; a short answer scatters more. Read the worst rows "
    "before you choose a cut-off."
)


def shown_progress(scores: Iterator[RowScore], rows: int, console: Console) -> Iterator[RowScore]:
    """The scores, with a line from time to time."""
    began = shown = time.monotonic()
    for done, score in enumerate(scores, 1):
        yield score
        now = time.monotonic()
        if now - shown > EVERY:
            shown = now
            console.print(f" {done:>7,}/{rows:,} rows  {done / (now - began):,.1f} rows/s")


def perplexities(scores: list[RowScore]) -> np.ndarray:
    return np.array([s.perplexity for s in scores])


def to_text(scores: list[RowScore], examples: Examples, marks: Mapping[str, float], worst: int) -> str:
    """The scores as lines of a terminal."""
    values = perplexities(scores)
    total, tokens = sum(s.total for s in scores), sum(s.tokens for s in scores)
    lines = [
        f"perplexity  {np.exp(total / tokens):.3f} over all {tokens:,} trained tokens; of a row: half at most {np.median(values):.2f}",
        "cut-offs    " + ", ".join(f"{100 * q:.0f} % of the rows below {v:.2f}" for q, v in cut_offs(values)),
        "",
        *text_histogram(values, marks, log=True),
    ]
    for score in strangest(scores, worst):
        where, value = examples.value(score.number)
        lines += [
            "",
            f"{score.perplexity:>8.2f}  {where}, {score.tokens:,} tokens",
            f"          {json.dumps(value, ensure_ascii=False)[:300]}",
        ]
    return "\n".join([*lines, ""])


def cut_offs(values: np.ndarray) -> list[tuple[float, float]]:
    """(share, the perplexity that this share of the rows has at most)."""
    return list(zip(QUANTILES, np.quantile(values, QUANTILES).tolist(), strict=True))


def strangest(scores: list[RowScore], count: int) -> list[RowScore]:
    """The rows of highest perplexity."""
    return sorted(scores, key=lambda s: -s.perplexity)[:count]


def to_html(
    data: str, model: str, scores: list[RowScore], examples: Examples, marks: Mapping[str, float], worst: int
) -> str:
    """The scores as a page."""
    page = Document(f"Perplexity of {Path(data).name}")
    page.text(f"{len(scores):,} rows of {data} under {model}", "dim")
    page.text(NOTE)
    page.heading("Perplexity of a row")
    values = perplexities(scores)
    page.charts(marked_histogram(values, marks, "perplexity of a row", log=True))
    page.table(["rows below", "perplexity"], [(f"{100 * q:.0f} %", f"{v:.2f}") for q, v in cut_offs(values)])
    shown = strangest(scores, worst)
    page.heading(f"The {len(shown)} strangest rows")
    for score in shown:
        where, value = examples.value(score.number)
        page.heading(f"{score.perplexity:.2f}: {where}, {score.tokens:,} tokens", small=True)
        page.verbatim(json.dumps(value, ensure_ascii=False, indent=1))
    return page.html()
