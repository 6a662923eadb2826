"""Charts as inline SVG: lines, histograms and heat maps, as wide as the page is, in its colours (html.py).

Places are shares of the picture's width and height, so that a picture stretches and its texts and strokes do not. Series
differ in their dashes as well as in colour. Text stays text, so any script shows in the reader's own fonts. READOUT, the
script of a page with charts, tells the values under the pointer or the finger.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .axis import Axis, axis_around, round_up, short
from .html import escape

COLOURS = ("var(--a)", "var(--b)", "var(--c)", "var(--d)")
DASHES = ("", "7 4", "2 3", "9 3 2 3")
MOST_POINTS, MOST_DOTS = 500, 60

STYLE = """
.chart { margin: .8rem 0 1.4rem; min-width: 0 } .chart figcaption { display: flex; flex-wrap: wrap; gap: 0 1rem; font-size: .9em }
.chart output { color: var(--dim); font-variant-numeric: tabular-nums; min-height: 1.5em }
.plot { margin: .5rem .9rem 0 3.2rem; height: 14rem; touch-action: pan-y } .plot svg { overflow: visible }
.plot > svg { display: block; width: 100%; height: 100% } .plot polyline { vector-effect: non-scaling-stroke }
.plot text { fill: var(--text); font-size: 12px; paint-order: stroke; stroke: var(--back); stroke-width: 3px }
.chart .across { text-align: center; font-size: .9em; margin: 1.4rem 0 0 } .cursor { visibility: hidden }
.legend { display: flex; flex-wrap: wrap; gap: 0 1.2rem; overflow-wrap: anywhere } .legend b { font-variant-numeric: tabular-nums }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 0 1.5rem }
"""

READOUT = """
"use strict";
for (const chart of document.querySelectorAll(".chart")) {
  const plot = chart.querySelector(".plot"), told = chart.querySelector("output");
  const cursor = chart.querySelector(".cursor"), slots = chart.querySelectorAll(".legend b");
  const data = JSON.parse(chart.dataset.values || "null");
  const share = x => data.log ? Math.log(x / data.low) / Math.log(data.high / data.low) : (x - data.low) / (data.high - data.low);
  const number = value => String(Number(value.toPrecision(5)));
  const nearest = (points, far) => points.reduce((a, b) => far(b) < far(a) ? b : a);
  function read(event) {
    if (!data) {
      const cell = event.target.querySelector("title");
      if (cell) told.textContent = cell.textContent;
      return;
    }
    const box = plot.getBoundingClientRect(), at = (event.clientX - box.left) / box.width;
    const near = data.series.map(points => nearest(points, p => Math.abs(share(p[0]) - at)));
    const here = nearest(near, p => Math.abs(share(p[0]) - at)), place = 100 * share(here[0]) + "%";
    told.textContent = data.x + " " + (here[2] ?? number(here[0])) + (slots.length ? "" : ": " + number(here[1]));
    slots.forEach((slot, i) => {
      const apart = Math.abs(share(near[i][0]) - share(here[0])) > 0.005;
      slot.textContent = number(near[i][1]) + (apart ? " at " + (near[i][2] ?? number(near[i][0])) : "");
    });
    cursor.setAttribute("x1", place);
    cursor.setAttribute("x2", place);
    cursor.style.visibility = "visible";
  }
  function leave(event) {
    if (event.pointerType !== "mouse") return;  // what a finger has pointed at stays
    told.textContent = "";
    for (const slot of slots) slot.textContent = "";
    if (cursor) cursor.style.visibility = "hidden";
  }
  plot.addEventListener("pointermove", read);
  plot.addEventListener("pointerdown", read);
  plot.addEventListener("pointerleave", leave);
}
"""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart. look counts from 0 and gives colour and dash; faint for raw values under a smoothed line; dots mark the points, if they are few."""

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
    """A horizontal (or, in a histogram, vertical) line with its name."""

    value: float
    name: str
    look: int = 1


def line_chart(
    series: Iterable[Series], x: str, y: str, log: bool = False, levels: Iterable[Level] = (), best: Point | None = None
) -> str:
    """A chart of lines with named axes; `best` is ringed. Points that are not finite are left out."""
    kept = [(s, [p for p in s.points if all(map(math.isfinite, p)) and (p[1] > 0 or not log)]) for s in series]
    kept = [(s, _thin(points)) for s, points in kept if points]
    levels = list(levels)
    everything = [p for _, points in kept for p in points]
    if not everything:
        return f'<p class="dim">no {escape(y)} to draw</p>'
    across = axis_around([p[0] for p in everything])
    up = axis_around([p[1] for p in everything] + [level.value for level in levels], log)
    parts = [_grid(across, up), *(_across(up, level) for level in levels)]
    parts.append(_stretched(_line(s, across, up, points) for s, points in kept))
    parts += [_dots(s, across, up, points) for s, points in kept if s.dots and len(points) <= MOST_DOTS]
    if best is not None:
        place = across.share(best[0])
        anchor = "start" if place < 0.15 else "end" if place > 0.85 else "middle"
        at = f'x="{_percent(place)}" y="{_percent(1 - up.share(best[1]))}"'
        above = up.share(best[1]) < 0.85
        ring = at.replace("x=", "cx=").replace(" y=", " cy=")
        parts.append(
            f'<circle {ring} r="7" fill="none" stroke="var(--good)" stroke-width="2"/>'
            f'<text {at} dy="{-12 if above else 22}" text-anchor="{anchor}">best {best[1]:.4g}</text>'
        )
    named = [s for s, _ in kept] if any(s.name for s, _ in kept) else []
    return _figure(parts, x, y, named, _values(x, across, [points for _, points in kept]))


def histogram(counts: Sequence[dict[int, int]], names: Sequence[str], x: str, levels: Sequence[Level] = ()) -> str:
    """Counts of whole numbers {value: rows} of one or more sets, in shared bins, as outlines; levels stand upright."""
    if not any(counts):
        return f'<p class="dim">no {escape(x)} to draw</p>'
    values = [v for c in counts for v in c]
    # a limit that is far above all rows would only press them together
    near = [level for level in levels if level.value <= 1.5 * max(values)]
    far = [f"{level.name}: no row is over it" for level in levels if level not in near]
    values += [int(level.value) for level in near]
    step = max(1, round(round_up((max(values) + 1) / 40)))
    edges = [float(i * step) for i in range(max(values) // step + 2)]
    rows = []
    for counted in counts:
        inside = [0] * (len(edges) - 1)
        for value, count in counted.items():
            inside[value // step] += count
        rows.append(inside)
    said = [bin_name(low, high, True) for low, high in pairwise(edges)]
    return outlines(edges, rows, said, names, x, near, note="; ".join(far))


def outlines(
    edges: Sequence[float],
    counts: Sequence[Sequence[int]],
    said: Sequence[str],
    names: Sequence[str],
    x: str,
    levels: Sequence[Level],
    log: bool = False,
    note: str = "",
) -> str:
    """Counts [sets][n] of the bins between edges [n + 1], whose names are said [n], as outlines; log: even factors across."""
    across = Axis(edges[0], max(edges[-1], *(level.value for level in levels), 0 if log else 6), log)
    most = max(n for row in counts for n in row)
    up = Axis(0, most * 1.05 or 1)
    series = [Series(name, (), i) for i, name in enumerate(names)]
    lines, dots, read = [], [], []
    for s, row in zip(series, counts, strict=True):
        bins = list(zip(edges, edges[1:], row, strict=False))
        corners = [(edge, float(n)) for low, high, n in bins for edge in (low, high)]
        lines.append(_line(s, across, up, [(edges[0], 0.0), *corners, (edges[-1], 0.0)], fill=True))
        middles = [math.sqrt(low * high) if log else (low + high) / 2 for low, high in pairwise(edges)]
        read.append(list(zip(middles, row, said, strict=True)))
        # a bin of one row among thousands is a line of no height: a mark shows it
        dots.append(
            _dots(s, across, up, [(x, float(n)) for x, n in zip(middles, row, strict=True) if 0 < n < most / 60])
        )
    uprights = [_upright(across, level, i) for i, level in enumerate(levels)]
    named = series if len(series) > 1 else []
    parts = [_grid(across, up, whole=True), _stretched(lines), *dots, *uprights]
    return _figure(parts, x, "rows", named, _values(x, across, read), note=note)


def bin_name(low: float, high: float, whole: bool) -> str:
    """ "12 to 15"; whole: of whole numbers, the last of which is below `high`."""
    last = high - 1 if whole else high
    return f"{low:.6g}" if last == low else f"{low:.6g} to {last:.6g}"


def heat_map(values: dict[tuple[str, str], float], x: str, y: str) -> str:
    """values[row, column] as a grid of shades from 0 to the largest; the readout and a cell's title tell its number."""
    rows, columns = (list(dict.fromkeys(key[i] for key in values)) for i in (0, 1))
    largest = max(values.values(), default=0.0) or 1.0
    wide, tall = 100 / max(len(columns), 1), 100 / max(len(rows), 1)
    parts = []
    for j, row in enumerate(rows):
        parts.append(f'<text x="0" dx="-6" y="{(j + 0.5) * tall:.2f}%" dy="4" text-anchor="end">{escape(row)}</text>')
        for i, column in enumerate(columns):
            if (row, column) in values:
                title = f"{escape(row)}, {escape(x)} {escape(column)}: {values[row, column]:.4g}"
                parts.append(
                    f'<rect x="{i * wide:.3f}%" y="{j * tall:.3f}%" width="{wide * 0.97:.3f}%" height="{tall * 0.95:.3f}%" '
                    f'fill="var(--a)" fill-opacity="{0.06 + 0.94 * values[row, column] / largest:.3f}"><title>{title}</title></rect>'
                )
    for i, column in list(enumerate(columns))[:: -(-len(columns) // 12) or 1]:
        parts.append(f'<text x="{(i + 0.5) * wide:.2f}%" y="100%" dy="16" text-anchor="middle">{escape(column)}</text>')
    label = max((len(r) for r in rows), default=1)
    left = 0.52 * label + 0.6
    plot, figure = (
        f"height: {1.4 * len(rows):.1f}rem; margin-left: {left:.1f}rem",
        f"max-width: {left + 3 * len(columns):.1f}rem",
    )
    return _figure(parts, f"{x}; the strongest shade is {largest:.4g}", y, looks=(figure, plot))


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _grid(across: Axis, up: Axis, whole: bool = False) -> str:
    """Ticks with their numbers; whole: heights are counts."""
    parts = []
    for value in up.ticks(5):
        if not whole or value == round(value):
            y = _percent(1 - up.share(value))
            parts.append(
                f'<line x1="0" x2="100%" y1="{y}" y2="{y}" stroke="var(--line)"/>'
                f'<text x="0" dx="-6" y="{y}" dy="4" text-anchor="end">{short(value)}</text>'
            )
    for value in across.ticks():
        x = _percent(across.share(value))
        parts.append(
            f'<line x1="{x}" x2="{x}" y1="100%" y2="99%" stroke="var(--dim)"/>'
            f'<text x="{x}" y="100%" dy="16" text-anchor="middle">{short(value)}</text>'
        )
    return "".join(parts)


def _across(up: Axis, level: Level) -> str:
    y = _percent(1 - up.share(level.value))
    return (
        f'<line x1="0" x2="100%" y1="{y}" y2="{y}" stroke="{COLOURS[level.look % 4]}" stroke-dasharray="5 4"/>'
        f'<text x="100%" dx="-4" y="{y}" dy="-5" text-anchor="end">{escape(level.name)}</text>'
    )


def _upright(across: Axis, level: Level, number: int) -> str:
    share = across.share(level.value)
    x, right = _percent(share), share > 0.5
    return (
        f'<line x1="{x}" x2="{x}" y1="0" y2="100%" stroke="{COLOURS[level.look % 4]}" stroke-dasharray="5 4"/>'
        f'<text x="{x}" dx="{-5 if right else 5}" y="0" dy="{10 + 16 * number}" '
        f'text-anchor="{"end" if right else "start"}">{escape(level.name)}</text>'
    )


def _stretched(lines: Iterable[str]) -> str:
    """Lines on a canvas of 1000 x 1000 that is stretched to the picture; their strokes are not."""
    return f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" width="100%" height="100%">{"".join(lines)}</svg>'


def _line(s: Series, across: Axis, up: Axis, points: Iterable[Point], fill: bool = False) -> str:
    path = " ".join(f"{1000 * across.share(x):.1f},{1000 - 1000 * up.share(y):.1f}" for x, y in points)
    inside = f'fill="{COLOURS[s.look % 4]}" fill-opacity="0.12"' if fill else 'fill="none"'
    return f'<polyline points="{path}" {inside} {s.stroke}/>'


def _dots(s: Series, across: Axis, up: Axis, points: Iterable[Point]) -> str:
    return "".join(
        f'<circle cx="{_percent(across.share(x))}" cy="{_percent(1 - up.share(y))}" r="3" fill="{COLOURS[s.look % 4]}"/>'
        for x, y in points
    )


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


def _values(x: str, across: Axis, series: Sequence[Sequence[Sequence[Any]]]) -> str:
    """What READOUT reads: the axis, and the points of each line with a text for x where a number would not do."""
    known = [
        [[float(f"{v:.6g}") if isinstance(v, float) else v for v in point] for point in points] for points in series
    ]
    told = {"x": x, "low": across.low, "high": across.high, "log": across.log, "series": known}
    return json.dumps(told, separators=(",", ":"))


def _figure(
    parts: Iterable[str],
    x: str,
    y: str,
    legend: Sequence[Series] = (),
    values: str = "",
    note: str = "",
    looks: tuple[str, str] = ("", ""),
) -> str:
    """A figure: what y is, the picture, what x is, the legend, a note. values: what READOUT reads; looks: CSS of figure and picture."""
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
