"""Charts as inline SVG: lines, histograms and heat maps in the colours of the page around them (html.py).

Series differ in their dashes as well as in colour. Text stays text, so any script shows in the reader's own fonts.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .html import escape

WIDTH, HEIGHT = 720, 270
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 40
COLOURS = ("var(--a)", "var(--b)", "var(--c)", "var(--d)")
DASHES = ("", "7 4", "2 3", "9 3 2 3")
MOST_POINTS = 500

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart. colour and dash count from 0; faint for raw values under a smoothed line; dots mark the points."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    dash: int = 0
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Level:
    """A horizontal (or, in a histogram, vertical) line with its name."""

    value: float
    name: str
    colour: int = 1


def line_chart(
    series: Iterable[Series], x: str, y: str, log: bool = False, levels: Iterable[Level] = (), best: Point | None = None
) -> str:
    """A chart of lines with named axes; `best` is ringed. Points that are not finite are left out."""
    series, levels = list(series), list(levels)
    kept = [[p for p in s.points if all(map(math.isfinite, p)) and (p[1] > 0 or not log)] for s in series]
    everything = [p for points in kept for p in points]
    if not everything:
        return f'<p class="dim">no {escape(y)} to draw</p>'
    ys = [p[1] for p in everything] + [level.value for level in levels]
    fit = _Fit(*_bounds([p[0] for p in everything]), *_bounds(ys, log), log)
    parts = [fit.grid(x, y)]
    for level in levels:
        parts.append(_level(fit.place((fit.left, level.value)), fit.place((fit.right, level.value)), level))
    for s, points in zip(series, kept, strict=True):
        parts.append(_line(s, [fit.place(p) for p in _thin(points)]))
    if best is not None:
        cx, cy = fit.place(best)
        parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="7" fill="none" stroke="var(--good)" stroke-width="2"/>'
                     f'<text x="{cx:.1f}" y="{cy - 11:.1f}" text-anchor="middle">best {best[1]:.4g}</text>')  # fmt: skip
    return _svg(parts, f"{y} by {x}") + _legend([s for s in series if s.name])


def histogram(counts: Sequence[dict[int, int]], names: Sequence[str], x: str, levels: Iterable[Level] = ()) -> str:
    """Counts of whole numbers {value: rows} of one or more sets, in shared bins, as outlines; levels stand upright."""
    values = [v for c in counts for v in c] + [int(level.value) for level in levels]
    if not any(counts):
        return f'<p class="dim">no {escape(x)} to draw</p>'
    width = _nice((max(values) + 1) / 40)
    step = max(1, round(width))
    bins = max(values) // step + 2
    outlines = []
    for number, (counted, name) in enumerate(zip(counts, names, strict=True)):
        rows = [0] * bins
        for value, count in counted.items():
            rows[value // step] += count
        corners = [(float(i * step), float(n)) for i, n in enumerate(rows) for i in (i, i + 1)]
        outlines.append(Series(name, [(0.0, 0.0), *corners], number % 4, number % 4))
    fit = _Fit(0, bins * step, 0, max(p[1] for s in outlines for p in s.points) * 1.05, False)
    parts = [fit.grid(x, "rows")]
    parts += [_level(fit.place((level.value, 0)), fit.place((level.value, fit.top)), level) for level in levels]
    parts += [_line(s, [fit.place(p) for p in s.points]) for s in outlines]
    return _svg(parts, f"rows by {x}") + _legend(outlines)


def heat_map(values: dict[tuple[str, str], float], x: str, y: str) -> str:
    """values[row, column] as a grid of shades from 0 to the largest, with the number in each cell's title."""
    rows, columns = (list(dict.fromkeys(key[i] for key in values)) for i in (0, 1))
    largest = max(values.values(), default=0.0) or 1.0
    label = 8 * max((len(r) for r in rows), default=1) + 14
    cell, tall = min(34.0, (WIDTH - label) / max(len(columns), 1)), 20
    parts = []
    for j, row in enumerate(rows):
        parts.append(f'<text x="{label - 6}" y="{j * tall + 14}" text-anchor="end">{escape(row)}</text>')
        for i, column in enumerate(columns):
            if (row, column) in values:
                share = values[row, column] / largest
                title = f"{escape(row)}, {escape(x)} {escape(column)}: {values[row, column]:.4g}"
                parts.append(
                    f'<rect x="{label + i * cell:.1f}" y="{j * tall}" width="{cell - 1:.1f}" height="{tall - 1}" '
                    f'fill="var(--a)" fill-opacity="{0.06 + 0.94 * share:.3f}"><title>{title}</title></rect>'
                )
    under = len(rows) * tall + 14
    every = max(1, len(columns) // 12)
    for i, column in list(enumerate(columns))[::every]:
        parts.append(
            f'<text x="{label + (i + 0.5) * cell:.1f}" y="{under}" text-anchor="middle">{escape(column)}</text>'
        )
    parts.append(f'<text x="{label}" y="{under + 18}">{escape(x)}; the darkest cell is {largest:.4g}</text>')
    return _svg(parts, f"{y} by {x}", under + 24)


@dataclass(frozen=True)
class _Fit:
    """Where a value lies on the canvas."""

    left: float
    right: float
    bottom: float
    top: float
    log: bool

    def place(self, point: Point) -> Point:
        low, value, high = (math.log10(v) if self.log else v for v in (self.bottom, point[1], self.top))
        across = (point[0] - self.left) / ((self.right - self.left) or 1)
        up = (value - low) / ((high - low) or 1)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def grid(self, x: str, y: str) -> str:
        parts = []
        for value in _ticks(self.bottom, self.top, self.log):
            at = self.place((self.left, value))[1]
            parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="var(--line)"/>'
                         f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_short(value)}</text>')  # fmt: skip
        for value in _ticks(self.left, self.right, False):
            at = self.place((value, self.bottom))[0]
            parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_short(value)}</text>')
        middle = TOP + (HEIGHT - TOP - BOTTOM) / 2
        parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>'
                     f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(y)}</text>')  # fmt: skip
        return "".join(parts)


def _bounds(values: Sequence[float], log: bool = False) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return low / 1.2, high * 1.2
    room = 0.05 * (high - low) or 0.5 * abs(high) or 1.0
    return (low if low >= 0 and low - room < 0 else low - room), high + room


def _nice(step: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... at or above."""
    power = 10.0 ** math.floor(math.log10(max(step, 1e-300)))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        return [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]
    step = _nice((high - low) / 6 or 1)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:.4g}"


def _thin(points: list[Point]) -> list[Point]:
    """At most about MOST_POINTS: the lowest and the highest of each stretch, so that no spike is lost."""
    size = -(-2 * len(points) // MOST_POINTS)
    if size <= 2:
        return points
    bounds = [*range(0, len(points), size), len(points)]
    kept = [points[0]]
    for start, end in pairwise(bounds):
        part = points[start:end]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return [*kept, points[-1]]


def _line(s: Series, places: list[Point]) -> str:
    if not places:
        return ""
    colour, dash = COLOURS[s.colour % 4], DASHES[s.dash % 4]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    look = f'stroke-dasharray="{dash}" ' if dash else ""
    look += 'stroke-width="1" stroke-opacity="0.35"' if s.faint else 'stroke-width="2"'
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places) if s.dots else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" {look}/>{dots}'


def _level(start: Point, end: Point, level: Level) -> str:
    upright, right = start[0] == end[0], start[0] > 0.7 * WIDTH
    x, y = (start[0] + (-4 if right else 4), TOP + 10) if upright else (WIDTH - RIGHT - 4, start[1] - 5)
    anchor = "start" if upright and not right else "end"
    return (
        f'<line x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}" '
        f'stroke="{COLOURS[level.colour % 4]}" stroke-dasharray="5 4"/>'
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(level.name)}</text>'
    )


def _legend(series: Sequence[Series]) -> str:
    items = []
    for s in series:
        dash = f' stroke-dasharray="{DASHES[s.dash % 4]}"' if DASHES[s.dash % 4] else ""
        look = 'stroke-width="1" stroke-opacity="0.5"' if s.faint else 'stroke-width="2"'
        mark = f'<line x1="0" x2="30" y1="5" y2="5" stroke="{COLOURS[s.colour % 4]}" {look}{dash}/>'
        items.append(f'<span><svg width="30" height="10" aria-hidden="true">{mark}</svg> {escape(s.name)}</span>')
    return f'<p class="legend">{" ".join(items)}</p>' if items else ""


def _svg(parts: Iterable[str], title: str, height: float = HEIGHT) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
