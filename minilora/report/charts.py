"""Charts: lines, histograms and heat maps as inline SVG in the colours of page.css; histograms also as lines of a terminal.

Positions are shares of the picture's width and height, so that the picture stretches with the page while its texts and
strokes do not. Series differ in their dashes as well as in their colours. charts.js shows the values under the pointer.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np

from .curve import Point
from .page import escape

COLOURS = ("var(--a)", "var(--b)", "var(--c)", "var(--d)")
DASHES = ("", "7 4", "2 3", "9 3 2 3")
MOST_POINTS, MOST_DOTS = 500, 60
COLUMNS = 80  # of a terminal
PER_DECADE = (20, 10, 5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02)  # bins of a logarithmic histogram, finest first


@dataclass(frozen=True)
class Axis:
    """From low to high; log: equal factors have equal lengths, and low is above 0."""

    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        """The position of a value: 0 at low, 1 at high."""
        low, value, high = (math.log10(v) if self.log else v for v in (self.low, value, self.high))
        return (value - low) / ((high - low) or 1)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values on the axis: about `most` of them, or 1, 2, 5, 10, ... as far as there is room."""
        if not self.log:
            step = round_up((self.high - self.low) / most or 1)
            return [round(i * step, 12) for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for within in ((1, 2, 5), (1, 3), (1,)):
            found = [m * 10.0**d for d in decades for m in within if self.low <= m * 10.0**d <= self.high]
            if len(found) <= most + 2:
                return found
        return found[:: -(-len(found) // most)]


def axis_around(values: Sequence[float], log: bool = False) -> Axis:
    """The axis of some values with a little room on both sides."""
    low, high = min(values), max(values)
    if log:
        return Axis(low / 1.2, high * 1.2, log)
    room = 0.05 * (high - low) or 0.5 * abs(high) or 1.0
    return Axis(low if low >= 0 and low - room < 0 else low - room, high + room)


def round_up(step: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... at or above, at any power of ten."""
    power = 10.0 ** math.floor(math.log10(max(step, 1e-300)))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))


def short(value: float) -> str:
    """A number as it is written at a tick."""
    for size, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= size:
            return f"{value / unit:g}{letter}"
    return f"{value:.4g}"


@dataclass(frozen=True)
class Series:
    """One line of a chart. look: 0, 1, ... for colour and dash; faint: of raw values; dots: mark the points if they are few."""

    name: str
    points: Sequence[Point]
    look: int = 0
    faint: bool = False
    dots: bool = False

    @property
    def stroke(self) -> str:
        """Colour and dash, which tell 16 series apart; the first four differ in both."""
        dash = DASHES[(self.look + self.look // 4) % 4]
        look = f'stroke="{COLOURS[self.look % 4]}"' + (f' stroke-dasharray="{dash}"' if dash else "")
        return look + (' stroke-width="1" stroke-opacity="0.65"' if self.faint else ' stroke-width="2"')


@dataclass(frozen=True)
class Level:
    """A horizontal (in a histogram, vertical) line with its name."""

    value: float
    name: str
    look: int = 1

    @property
    def stroke(self) -> str:
        return f'stroke="{COLOURS[self.look % 4]}" stroke-dasharray="5 4"'


@dataclass(frozen=True)
class Plane:
    """The two axes of a picture, and markup of what is drawn on them."""

    across: Axis
    up: Axis

    def at(self, x: float, y: float) -> tuple[str, str]:
        return _percent(self.across.share(x)), _percent(1 - self.up.share(y))

    def grid(self, whole: bool = False) -> str:
        """Ticks with their numbers; whole: heights are counts."""
        parts = []
        for value in self.up.ticks(5):
            if not whole or value == round(value):
                y = _percent(1 - self.up.share(value))
                parts.append(
                    _rule("0", "100%", y, y, 'stroke="var(--line)"') + _text("0", y, short(value), "end", -6, 4)
                )
        for value in self.across.ticks():
            x = _percent(self.across.share(value))
            parts.append(_rule(x, x, "100%", "99%", 'stroke="var(--dim)"'))
            parts.append(_text(x, "100%", short(value), "middle", 0, 16))
        return "".join(parts)

    def level(self, level: Level) -> str:
        y = _percent(1 - self.up.share(level.value))
        return _rule("0", "100%", y, y, level.stroke) + _text("100%", y, level.name, "end", -4, -5)

    def upright(self, level: Level, number: int) -> str:
        """A vertical level; its name is on the wider side, below those of the `number` levels before it."""
        share = self.across.share(level.value)
        x, (anchor, dx) = _percent(share), ("end", -5) if share > 0.5 else ("start", 5)
        return _rule(x, x, "0", "100%", level.stroke) + _text(x, "0", level.name, anchor, dx, 10 + 16 * number)

    def line(self, s: Series, points: Iterable[Point], fill: bool = False) -> str:
        """On a canvas of 1000 x 1000."""
        path = " ".join(f"{1000 * self.across.share(x):.1f},{1000 - 1000 * self.up.share(y):.1f}" for x, y in points)
        inside = f'fill="{COLOURS[s.look % 4]}" fill-opacity="0.12"' if fill else 'fill="none"'
        return f'<polyline points="{path}" {inside} {s.stroke}/>'

    def dots(self, s: Series, points: Iterable[Point]) -> str:
        places = [self.at(x, y) for x, y in points]
        return "".join(f'<circle cx="{x}" cy="{y}" r="3" fill="{COLOURS[s.look % 4]}"/>' for x, y in places)

    def ring(self, point: Point, name: str) -> str:
        """A ring around a point, with its name where there is room."""
        x, y = self.at(*point)
        share = self.across.share(point[0])
        anchor = "start" if share < 0.15 else "end" if share > 0.85 else "middle"
        circle = f'<circle cx="{x}" cy="{y}" r="7" fill="none" stroke="var(--good)" stroke-width="2"/>'
        return circle + _text(x, y, name, anchor, 0, -12 if self.up.share(point[1]) < 0.85 else 22)


def line_chart(
    series: Iterable[Series],
    x: str,
    y: str,
    log: bool = False,
    levels: Iterable[Level] = (),
    best: Point | None = None,
    log_x: bool = False,
) -> str:
    """A chart of lines with named axes; `best` is ringed. Points that are not finite are left out. log: of y."""
    drawn = [(s, points) for s in series if (points := _thinned(s.points, log))]
    levels = list(levels)
    if not drawn:
        return f'<p class="dim">no {escape(y)} to draw</p>'
    every_x, every_y = zip(*(p for _, points in drawn for p in points), strict=True)
    plane = Plane(axis_around(every_x, log_x), axis_around([*every_y, *(level.value for level in levels)], log))
    parts = [plane.grid(), *map(plane.level, levels), _stretched(plane.line(s, points) for s, points in drawn)]
    parts += [plane.dots(s, points) for s, points in drawn if s.dots and len(points) <= MOST_DOTS]
    parts += [plane.ring(best, f"best {best[1]:.4g}")] if best is not None else []
    legend = [s for s, _ in drawn] if any(s.name for s, _ in drawn) else []
    return _figure(parts, x, y, legend, _values(x, plane.across, [points for _, points in drawn]))


def histogram(
    sets: Mapping[str, np.ndarray], x: str, levels: Sequence[Level] = (), log: bool = False, notes: Iterable[str] = ()
) -> str:
    """How many values of each named set are in each of some shared bins, as outlines; levels are vertical."""
    values = np.concatenate([*sets.values()])
    if not len(values):
        return f'<p class="dim">no {escape(x)} to draw</p>'
    edges, _ = bins(values, [level.value for level in levels], 48, log)
    steps = list(pairwise(edges))
    near = [level for level in levels if _is_near(level.value, values, log)]
    names = [_bin_name(low, high, np.issubdtype(values.dtype, np.integer)) for low, high in steps]
    notes = [*notes, *["the scale is logarithmic"] * log]
    notes += [f"{level.name} (outside the picture)" for level in levels if level not in near]
    if values.max() > edges[-1]:
        names[-1] = f"{edges[-2]:g} and more, the largest is {values.max():,.6g}"
        notes.append(f"the last bin: {names[-1]}")
    middles = [math.sqrt(low * high) if log else (low + high) / 2 for low, high in steps]
    counts = [_count(one, edges).tolist() for one in sets.values()]
    series = [Series(name, list(zip(middles, counts[i], strict=True)), i) for i, name in enumerate(sets)]
    most = max(map(max, counts))
    right = max([edges[-1], *(level.value for level in near), 0 if log else 6])
    plane = Plane(Axis(edges[0], right, log), Axis(0, most * 1.05))
    outlines = []
    for s, row in zip(series, counts, strict=True):
        corners = [(edge, n) for step, n in zip(steps, row, strict=True) for edge in step]
        outlines.append(plane.line(s, [(edges[0], 0), *corners, (edges[-1], 0)], fill=True))
    parts = [plane.grid(whole=True), _stretched(outlines)]
    # a bin of one row among thousands is a line of no height: a dot shows it
    parts += [plane.dots(s, [p for p in s.points if 0 < p[1] < most / 60]) for s in series]
    parts += [plane.upright(level, i) for i, level in enumerate(near)]
    read = [[(*point, name) for point, name in zip(s.points, names, strict=True)] for s in series]
    return _figure(
        parts, x, "rows", series if len(series) > 1 else [], _values(x, plane.across, read), "; ".join(notes)
    )


def marked_histogram(
    values: np.ndarray, marks: Mapping[str, float], x: str, log: bool = False, notes: Iterable[str] = ()
) -> str:
    """A histogram of one set, which notes how many values are over each mark."""
    levels = [Level(mark, f"{name} {mark:g}") for name, mark in marks.items() if _is_near(mark, values, log)]
    counted = [f"{name} {mark:g}: {over(values, mark)}" for name, mark in marks.items()]
    return histogram({"": values}, x, levels, log, [*notes, *counted])


def text_histogram(
    values: np.ndarray, marks: Mapping[str, float], count: int = 16, width: int = 46, log: bool = False
) -> list[str]:
    """A line for each bin: where it begins, a bar, how many; and in the line of a mark how many values are over it."""
    edges, numbers = bins(values, marks.values(), count, log)
    after = []  # what follows each bar
    for (low, high), number in zip(pairwise(edges), numbers, strict=True):
        inside = [f"◂ {name} {mark:g} ({over(values, mark)})" for name, mark in marks.items() if low <= mark < high]
        after.append("  ".join([f" {number:,}" if number else "", *inside]))
    width = max(min(width, COLUMNS - 9 - max(map(len, after))), 8)
    unit, lines = width / max(int(numbers.max()), 1), []
    for low, number, text in zip(edges, numbers, after, strict=False):
        bar = "█" * round(number * unit) or ("▏" if number else "")
        lines.append(f"{short(low):>8} {bar}{text}".rstrip())
    if values.max(initial=0) > edges[-1]:
        lines[-1] += f"  and more, the largest is {values.max():,.6g}"
    far = [(name, mark) for name, mark in marks.items() if not _is_near(mark, values, log)]
    return lines + [f"{'':>8} {name} {mark:g}: {over(values, mark)}" for name, mark in far]


def over(values: np.ndarray, mark: float) -> str:
    """How many values are over a mark, in words."""
    number = int((values > mark).sum())
    return "none over" if not number else f"{number:,} over, {100 * number / len(values):.1f} %"


def bins(values: np.ndarray, marks: Iterable[float], count: int, log: bool = False) -> tuple[list[float], np.ndarray]:
    """(edges [n + 1], numbers [n]) of n <= count bins up to the largest value, or a mark that is near.

    Equal steps from 0; the highest 2 % of the values share the last bin if they are far out. Or, with log, equal factors from
    the smallest value on, in which every value has its own place, however far out.
    """
    near = [mark for mark in marks if _is_near(mark, values, log)]
    edges = _equal_factors([*values.tolist(), *near], count) if log else _equal_steps(values, near, count)
    return edges, _count(values, edges)


def _equal_steps(values: np.ndarray, near: Sequence[float], count: int) -> list[float]:
    top = float(values.max(initial=1))
    usual = float(np.quantile(values, 0.98)) if len(values) else top
    top = max([usual if top > 2 * usual > 0 else top, *near])
    step = round_up(max(top / count, 1e-3))
    step = max(step, 1.0) if np.issubdtype(values.dtype, np.integer) else step
    return [i * step for i in range(min(int(top // step) + 1, count) + 1)]


def _equal_factors(values: Sequence[float], count: int) -> list[float]:
    """Edges of at most `count` bins around values above 0: 1, 1.1, 1.3 ... 10, or coarser, to two digits."""
    edges = [1.0, 10.0]
    for per in PER_DECADE if values else ():
        low, high = min(values), max(values)
        first, last = math.floor(math.log10(low) * per) - 1, math.ceil(math.log10(high) * per) + 2
        edges = [float(f"{10 ** min(k / per, 308):.2g}") for k in range(first, last)]
        start = max(i for i, edge in enumerate(edges) if edge <= low)
        end = next(i for i, edge in enumerate(edges) if edge > high)
        edges = edges[start : end + 1]
        if len(edges) <= count + 1:
            break
    return edges


def _count(values: np.ndarray, edges: Sequence[float]) -> np.ndarray:
    """How many values each bin has; the last one has all above it."""
    return np.histogram(np.minimum(values, edges[-1]), bins=edges)[0]


def _is_near(mark: float, values: np.ndarray, log: bool) -> bool:
    """Whether a mark is in the picture of some values; one far from all of them would only squeeze these together."""
    low = float(values.min(initial=1e300)) / 1.5 if log else -math.inf
    return low <= mark <= 1.5 * float(values.max(initial=1))


def _bin_name(low: float, high: float, whole: bool) -> str:
    """ "12 to 15"; whole: of whole numbers, the last of which is below `high`."""
    last = high - 1 if whole else high
    return f"{low:.6g}" if last == low else f"{low:.6g} to {last:.6g}"


def heat_map(values: dict[tuple[str, str], float], x: str, y: str) -> str:
    """values[row, column] as a grid of shades from 0 to the largest; the title of a cell tells its number."""
    rows, columns = (list(dict.fromkeys(key[i] for key in values)) for i in (0, 1))
    largest = max(values.values(), default=0.0) or 1.0
    wide, tall = 100 / max(len(columns), 1), 100 / max(len(rows), 1)
    parts = [_text("0", f"{(j + 0.5) * tall:.2f}%", row, "end", -6, 4) for j, row in enumerate(rows)]
    for (row, column), value in values.items():
        title = f"{escape(row)}, {escape(x)} {escape(column)}: {value:.4g}"
        place = f'x="{columns.index(column) * wide:.3f}%" y="{rows.index(row) * tall:.3f}%"'
        parts.append(
            f'<rect {place} width="{wide * 0.97:.3f}%" height="{tall * 0.95:.3f}%" fill="var(--a)" '
            f'fill-opacity="{0.06 + 0.94 * value / largest:.3f}"><title>{title}</title></rect>'
        )
    for i in range(0, len(columns), -(-len(columns) // 12) or 1):
        parts.append(_text(f"{(i + 0.5) * wide:.2f}%", "100%", columns[i], "middle", 0, 16))
    left = 0.52 * max((len(r) for r in rows), default=1) + 0.6
    plot = f"height: {1.4 * len(rows):.1f}rem; margin-left: {left:.1f}rem"
    figure = f"max-width: {left + 3 * len(columns):.1f}rem"
    return _figure(parts, f"{x}; the strongest shade is {largest:.4g}", y, looks=(figure, plot))


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _rule(x1: str, x2: str, y1: str, y2: str, stroke: str) -> str:
    return f'<line x1="{x1}" x2="{x2}" y1="{y1}" y2="{y2}" {stroke}/>'


def _text(x: str, y: str, text: str, anchor: str, dx: int, dy: int) -> str:
    return f'<text x="{x}" y="{y}" dx="{dx}" dy="{dy}" text-anchor="{anchor}">{escape(text)}</text>'


def _stretched(lines: Iterable[str]) -> str:
    """Lines on a canvas of 1000 x 1000 that is stretched to the picture; their strokes are not."""
    return f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" width="100%" height="100%">{"".join(lines)}</svg>'


def _thinned(points: Sequence[Point], log: bool) -> list[Point]:
    """The finite points (and with log those above 0), at most about MOST_POINTS: the lowest and the highest of each stretch, so that no spike is lost."""

    def drawable() -> Iterator[Point]:
        return (p for p in points if all(map(math.isfinite, p)) and (p[1] > 0 or not log))

    size = -(-2 * sum(1 for _ in drawable()) // MOST_POINTS)
    if size <= 2:
        return list(drawable())
    rest = drawable()
    parts = iter(lambda: list(islice(rest, size)), [])  # never all of them at once: a run may have a million steps
    ends = [
        (part[0], sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}), part[-1]) for part in parts
    ]
    return [ends[0][0], *(point for _, pair, _ in ends for point in pair), ends[-1][2]]


def _values(x: str, across: Axis, series: Sequence[Sequence[Sequence[Any]]]) -> str:
    """What charts.js reads: the axis, and the points of each line, with a text for x where a number would not do."""
    rounded = [[[float(f"{v:.6g}") if isinstance(v, float) else v for v in p] for p in points] for points in series]
    value = {"x": x, "low": across.low, "high": across.high, "log": across.log, "series": rounded}
    return json.dumps(value, separators=(",", ":"))


def _figure(
    parts: Iterable[str],
    x: str,
    y: str,
    legend: Sequence[Series] = (),
    values: str = "",
    note: str = "",
    looks: tuple[str, str] = ("", ""),
) -> str:
    """A figure: its y, the picture, its x, the legend, a note. values: for charts.js; looks: CSS of figure and picture."""
    items = "".join(
        f'<span><svg width="30" height="10" aria-hidden="true"><line x1="0" x2="30" y1="5" y2="5" {s.stroke}/></svg> '
        f"{escape(s.name)} <b></b></span>"
        for s in legend
    )
    data = f' data-values="{escape(values)}"' if values else ""
    cursor = '<line class="cursor" y1="0" y2="100%" stroke="var(--dim)"/>' if values else ""
    figure, plot = (f' style="{look}"' if look else "" for look in looks)
    return (
        f'<figure class="chart"{data}{figure}><figcaption>{escape(y)} <output></output></figcaption><div class="plot"{plot}>'
        f'<svg role="img" aria-label="{escape(f"{y} by {x}")}">{"".join(parts)}{cursor}</svg></div>'
        f'<p class="across">{escape(x)}</p>'
        + (f'<p class="legend">{items}</p>' if items else "")
        + (f'<p class="dim">{escape(note)}</p>' if note else "")
        + "</figure>"
    )
