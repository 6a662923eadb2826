"""A histogram with marks (limits, cut-offs) on it: as lines of a terminal, and as inline SVG of a page."""

import math
from collections.abc import Mapping

import numpy as np

from .html import escape


def bins(values: np.ndarray, marks: Mapping[str, float], count: int) -> tuple[np.ndarray, np.ndarray]:
    """(edges [n + 1], numbers [n]) of n <= count even steps from 0 to the largest value, or a mark that is near.

    The highest 2 % of the values share the last bin if they are far out.
    """
    top = float(values.max(initial=1))
    usual = float(np.quantile(values, 0.98)) if len(values) else top
    top = usual if top > 2 * usual > 0 else top
    top = max([top, *_near(values, marks).values()])
    step = _round_up(top / count)
    edges = np.arange(min(int(top // step) + 1, count) + 1) * step
    numbers, _ = np.histogram(np.minimum(values, edges[-1]), bins=edges)
    return edges, numbers


def _near(values: np.ndarray, marks: Mapping[str, float]) -> dict[str, float]:
    """The marks that stand in a picture of the values; one that is far above all of them would only press these together."""
    return {name: mark for name, mark in marks.items() if mark <= 1.5 * float(values.max(initial=1))}


def _round_up(step: float) -> float:
    """The next of 1, 2, 5, 10, 20 ... times a power of ten; at least 1 for counts."""
    power = 10 ** math.floor(math.log10(max(step, 1e-3)))
    return next(power * f for f in (1, 2, 5, 10) if power * f >= step * (1 - 1e-9))


def text_histogram(values: np.ndarray, marks: Mapping[str, float], count: int = 16, width: int = 46) -> list[str]:
    """One line a bin: its range, a bar, how many; a mark stands in the line of its bin, with the share that is over it."""
    edges, numbers = bins(values, marks, count)
    unit, lines = width / max(int(numbers.max(initial=1)), 1), []
    for low, high, number in zip(edges, edges[1:], numbers, strict=False):
        bar = "█" * round(number * unit) or ("▏" if number else "")
        inside = [f"◂ {name} {mark:g} ({over(values, mark)})" for name, mark in marks.items() if low <= mark < high]
        lines.append(f"{low:>8g} {bar}{f' {number:,}' if number else ''}  {'  '.join(inside)}".rstrip())
    far = [f"{name} {mark:g}: {over(values, mark)}" for name, mark in marks.items() if name not in _near(values, marks)]
    return lines + [f"{'':>8} {text}" for text in far]


def over(values: np.ndarray, mark: float) -> str:
    """How many values are over a mark, in words."""
    number = int((values > mark).sum())
    return "none over" if not number else f"{number:,} over, {100 * number / len(values):.1f} %"


def svg_histogram(values: np.ndarray, marks: Mapping[str, float], label: str, count: int = 48) -> str:
    """An SVG picture of 720 x 190 that takes its colours from the page."""
    edges, numbers = bins(values, marks, count)
    left, right, top, bottom = 44, 708, 26, 150
    scale_x, most = (right - left) / float(edges[-1]), max(int(numbers.max(initial=1)), 1)
    parts = []
    for low, high, number in zip(edges, edges[1:], numbers, strict=False):
        x, w, h = left + low * scale_x, (high - low) * scale_x, (bottom - top) * number / most
        hint = f"{low:g} to {high:g}: {number:,}"
        parts.append(f'<rect x="{x:.1f}" y="{bottom - h:.1f}" width="{max(w - 1, 0.5):.1f}" height="{h:.1f}" fill="var(--a)"><title>{hint}</title></rect>')  # fmt: skip
    for value in np.arange(0, edges[-1] * 1.001, _round_up(float(edges[-1]) / 6)):
        parts.append(f'<text x="{left + value * scale_x:.1f}" y="{bottom + 16}" text-anchor="middle">{value:,.4g}</text>')  # fmt: skip
    far = [
        f"{escape(name)} {mark:g}: {over(values, mark)}"
        for name, mark in marks.items()
        if name not in _near(values, marks)
    ]
    parts += [
        f'<text x="{right}" y="{top - 10 + 15 * row}" text-anchor="end">{text}</text>' for row, text in enumerate(far)
    ]
    for row, (name, mark) in enumerate(_near(values, marks).items()):
        x = left + mark * scale_x
        side = "end" if x > (left + right) / 2 else "start"
        words = f"{escape(name)} {mark:g}: {over(values, mark)}"
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 8}" y2="{bottom}" stroke="var(--b)" stroke-width="2" stroke-dasharray="4 3"/>')  # fmt: skip
        parts.append(f'<text x="{x + (-5 if side == "end" else 5):.1f}" y="{top + 4 + 15 * row}" text-anchor="{side}">{words}</text>')  # fmt: skip
    parts.append(f'<text x="{left - 6}" y="{top + 4}" text-anchor="end">{most:,}</text><text x="{left - 6}" y="{bottom}" text-anchor="end">0</text>')  # fmt: skip
    parts.append(f'<line x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}" stroke="var(--dim)"/>')
    parts.append(f'<text x="{(left + right) / 2}" y="{bottom + 34}" text-anchor="middle">{escape(label)}</text>')
    name = f"histogram: {escape(label)}"
    picture = f'<svg viewBox="0 0 720 190" width="720" role="img" aria-label="{name}">{"".join(parts)}</svg>'
    return f'<div class="wide">{picture}</div>'
