"""A histogram with marks (limits, cut-offs) on it: as lines of a terminal, and as a chart of a page."""

import math
from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from .axis import round_up, short
from .charts import Level, bin_name, outlines

COLUMNS = 80  # of a terminal
PER_DECADE = (20, 10, 5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02)  # bins of a logarithmic histogram, finest first


def bins(
    values: np.ndarray, marks: Mapping[str, float], count: int, log: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(edges [n + 1], numbers [n]) of n <= count steps up to the largest value, or a mark that is near.

    Even steps from 0; the highest 2 % of the values share the last bin if they are far out. Or, with log, even factors from
    the smallest value on, where every value has its own place, however far out.
    """
    if log:
        edges = _factors(np.array([*values, *_near(values, marks, log).values()]), count)
        return edges, np.histogram(values, bins=edges)[0]
    top = float(values.max(initial=1))
    usual = float(np.quantile(values, 0.98)) if len(values) else top
    top = usual if top > 2 * usual > 0 else top
    top = max([top, *_near(values, marks).values()])
    step = round_up(max(top / count, 1e-3))
    step = max(step, 1.0) if np.issubdtype(values.dtype, np.integer) else step
    edges = np.arange(min(int(top // step) + 1, count) + 1) * step
    numbers, _ = np.histogram(np.minimum(values, edges[-1]), bins=edges)
    return edges, numbers


def _factors(values: np.ndarray, count: int) -> np.ndarray:
    """Edges of at most `count` bins around values above 0: 1, 1.1, 1.3 ... 10, or coarser, to two digits."""
    low, high = float(values.min(initial=1e300)), float(values.max(initial=1e-300))
    edges = [1.0, 10.0]
    for per in PER_DECADE if low <= high else ():
        first, last = math.floor(math.log10(low) * per) - 1, math.ceil(math.log10(high) * per) + 2
        edges = [float(f"{10 ** min(k / per, 308):.2g}") for k in range(first, last)]
        start = max(i for i, edge in enumerate(edges) if edge <= low)
        end = next(i for i, edge in enumerate(edges) if edge > high)
        edges = edges[start : end + 1]
        if len(edges) <= count + 1:
            break
    return np.array(edges)


def _near(values: np.ndarray, marks: Mapping[str, float], log: bool = False) -> dict[str, float]:
    """The marks that stand in a picture of the values; one that is far from all of them would only press these together."""
    low = float(values.min(initial=1e300)) / 1.5 if log else -math.inf
    return {name: mark for name, mark in marks.items() if low <= mark <= 1.5 * float(values.max(initial=1))}


def text_histogram(
    values: np.ndarray, marks: Mapping[str, float], count: int = 16, width: int = 46, log: bool = False
) -> list[str]:
    """One line a bin: where it begins, a bar, how many; a mark stands in the line of its bin, with the share that is over it."""
    edges, numbers = bins(values, marks, count, log)
    behind = []  # what stands behind each bar
    for low, high, number in zip(edges, edges[1:], numbers, strict=False):
        inside = [f"◂ {name} {mark:g} ({over(values, mark)})" for name, mark in marks.items() if low <= mark < high]
        behind.append("  ".join([f" {number:,}" if number else "", *inside]))
    width = max(min(width, COLUMNS - 9 - max(map(len, behind), default=0)), 8)
    unit, lines = width / max(int(numbers.max(initial=1)), 1), []
    for low, number, text in zip(edges, numbers, behind, strict=False):
        bar = "█" * round(number * unit) or ("▏" if number else "")
        lines.append(f"{short(low):>8} {bar}{text}".rstrip())
    if values.max(initial=0) > edges[-1]:
        lines[-1] += f"  and more, the largest is {values.max():,.6g}"
    near = _near(values, marks, log)
    return lines + [
        f"{'':>8} {name} {mark:g}: {over(values, mark)}" for name, mark in marks.items() if name not in near
    ]


def over(values: np.ndarray, mark: float) -> str:
    """How many values are over a mark, in words."""
    number = int((values > mark).sum())
    return "none over" if not number else f"{number:,} over, {100 * number / len(values):.1f} %"


def svg_histogram(
    values: np.ndarray, marks: Mapping[str, float], label: str, count: int = 48, log: bool = False
) -> str:
    """The picture for a page, with what is not in it told under it."""
    edges, numbers = bins(values, marks, count, log)
    whole = bool(np.issubdtype(values.dtype, np.integer))
    names = [bin_name(low, high, whole) for low, high in pairwise(edges)]
    if values.max(initial=0) > edges[-1]:
        names[-1] = f"{edges[-2]:g} and more, the largest is {values.max():,.6g}"
    near = _near(values, marks, log)
    said = {name: f"{name} {mark:g}: {over(values, mark)}" for name, mark in marks.items()}
    levels = [Level(mark, said[name], 1) for name, mark in near.items()]
    notes = ["the scale is logarithmic"] * log + [said[name] for name in marks if name not in near]
    notes += [f"the last bin: {names[-1]}"] if values.max(initial=0) > edges[-1] else []
    return outlines(edges.tolist(), [numbers.tolist()], names, [""], label, levels, log, "; ".join(notes))
