"""An inspection of an adapter as a story: on a terminal with maps of letters, as a page with pictures.

Each paragraph says what a number means, what this adapter has, and what would be unusual.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median

from ..console import Console
from ..report.charts import Series, heat_map, line_chart
from ..report.page import Document, visible
from .inspect_adapter import KEPT, STRONGEST, AdapterInspection, Change

SHADES = "·░▒▓█"
CELLS = 64  # of a line of a terminal

Value = Callable[[Change], float]


def size(c: Change) -> float:
    """||dW||, as a share of ||W|| where the base was read, else of the elements' root mean square."""
    return c.base.relative if c.base else c.rms


def sentences(found: AdapterInspection) -> dict[str, list[str]]:
    """The paragraphs of each part of the story, by its heading; a part that was not measured is not there."""
    alive = [c for c in found.changes if not c.dead]
    parts = {"How much it changes": _sizes(found.changes, alive)}
    if alive:
        parts["In how many directions"] = _ranks(alive)
    if any(c.base for c in alive):
        parts["Where its directions lie"] = _directions(alive)
    if found.drift or any(c.rotated is not None for c in alive):
        parts["How it got there"] = _way(found, alive)
    if found.likeness:
        parts["Beside the other adapter"] = _likeness(found)
    return parts


def _sizes(changes: Sequence[Change], alive: Sequence[Change]) -> list[str]:
    dead = [c for c in changes if c.dead]
    told = [f"{len(changes)} linears have an adapter, of rank {_range(sorted({c.r for c in changes}))}."]
    if alive:
        largest = max(alive, key=size)
        unit = "of the weight it is added to" if largest.base else "in root mean square of its elements"
        told.append(
            f"The change dW = scale x B A is {_share(median(map(size, alive)), largest)} {unit} in the median, and largest in "
            f"{largest.path} ({_share(size(largest), largest)})."
        )
    if dead:
        told.append(
            f"{len(dead)} of them are dead: their change is below a hundredth of the median ({_few(dead)}). They were not "
            "trained, or never saw a gradient."
        )
    else:
        told.append("None of them is dead: every one has a change above a hundredth of the median.")
    return told


def _ranks(alive: Sequence[Change]) -> list[str]:
    r = max(c.r for c in alive)
    needed = [c.rank_99 for c in alive]
    told = [
        (
            "The singular values of dW say how strongly it acts in each of its directions. The effective rank counts the directions "
            "that matter: it is the rank if all are equally strong, and 1 if one has everything."
        ),
        (
            f"Here it is {median(c.effective_rank for c in alive):.1f} in the median, and {median(c.rank_90 for c in alive):g} of "
            f"{r} directions hold 90 % of the energy."
        ),
    ]
    if max(needed) < r:
        told.append(
            f"Rank {max(needed)} keeps {KEPT:.0%} of the energy of every linear: a smaller adapter would do (--to-rank {max(needed)})."
        )
    elif median(needed) >= r:
        told.append("Most linears use their whole rank: a larger one might learn more.")
    return told


def _directions(alive: Sequence[Change]) -> list[str]:
    based = [c.base for c in alive if c.base]
    strong, chance = fmean(b.strong for b in based), fmean(b.by_chance for b in based)
    with_intruders = [c for c in alive if c.base and c.base.intruders]
    told = [
        f"{strong:.1%} of the energy of dW lies in the strong directions of W (the first tenth of its singular directions, on both "
        f"sides); of a random change it would be {chance:.1%}. "
        + (
            "More than by chance: the adapter amplifies what the base already does."
            if strong > 2 * chance
            else "That is about chance: the adapter adds what the base does not emphasise."
        )
    ]
    if with_intruders:
        most = max(with_intruders, key=lambda c: c.base.intruders if c.base else 0)
        told.append(
            f"{len(with_intruders)} linears have intruder dimensions: strong directions of W + dW that resemble none of W "
            f"(most in {most.path}: {most.base.intruders if most.base else 0} of the first {STRONGEST}). Models with many of them "
            "forget more of what they knew (Shuttleworth et al., 2024); a lower rate or a higher rank makes fewer."
        )
    else:
        told.append(
            f"No linear has an intruder dimension: each of the first {STRONGEST} directions of W + dW resembles one of W. "
            "Full fine-tuning looks like that (Shuttleworth et al., 2024)."
        )
    return told


def _way(found: AdapterInspection, alive: Sequence[Change]) -> list[str]:
    told = []
    rotated = [c.rotated for c in alive if c.rotated is not None]
    if rotated:
        told.append(
            f"The directions that A reads began at random. In the median {median(rotated):.1%} of them rotated away from that start; "
            "near 0 %, A stayed where it began, and only B learned."
        )
    told += [
        f"At step {m.step} the change had {m.norm:.0%} of its size and a cosine of {m.cosine:.3f} with it."
        for m in found.drift
    ]
    return told


def _likeness(found: AdapterInspection) -> list[str]:
    alike = fmean(x.cosine for x in found.likeness)
    return [
        (
            f"Beside {found.other}, on {len(found.likeness)} linears: the mean cosine of the two changes is {alike:.3f} (1 equal, 0 "
            "unrelated, -1 opposite)."
        ),
        (
            f"What they write overlaps by {fmean(x.outputs for x in found.likeness):.1%}, what they read by "
            f"{fmean(x.inputs for x in found.likeness):.1%}. A starts at random, so that runs of different seeds read other directions at first."
        ),
    ]


def show(found: AdapterInspection, console: Console) -> None:
    """Print an inspection."""
    for heading, told in sentences(found).items():
        console.print(f"\n{heading}", style="bold")
        for text in told:
            console.print(visible(text))
        for title, value in _maps(found, heading):
            console.say(f"\n{title}")
            console.say("\n".join(letter_map(found.changes, value)))


def letter_map(changes: Sequence[Change], value: Value) -> list[str]:
    """A line for each kind of linear, a letter for each layer (the largest of several where there are many), and what is darkest."""
    rows = _by_name(changes, value)
    layers = list(dict.fromkeys(c.layer for c in changes))
    each = -(-len(layers) // CELLS)
    most = max((v for row in rows.values() for v in row.values()), default=0.0) or 1.0
    wide = max(map(len, rows))
    lines = []
    for name, row in rows.items():
        groups = [[row.get(layer) for layer in layers[i : i + each]] for i in range(0, len(layers), each)]
        cells = [max((v for v in group if v is not None), default=None) for group in groups]
        lines.append(
            f"{name:>{wide}} " + "".join(" " if v is None else SHADES[min(int(5 * v / most), 4)] for v in cells)
        )
    return [*lines, f"{'':>{wide}} layers {layers[0]} to {layers[-1]}; {SHADES[-1]} is {most:.3g}"]


def _by_name(changes: Sequence[Change], value: Value) -> dict[str, dict[str, float]]:
    rows: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for c in changes:
        rows[c.name][c.layer] = value(c)
    return dict(rows)


def _maps(found: AdapterInspection, heading: str) -> list[tuple[str, Value]]:
    """The maps of a part of the story: (title, the value of a linear)."""
    based = any(c.base for c in found.changes)
    if heading == "How much it changes":
        return [("||dW|| / ||W||" if based else "root mean square of dW", size)]
    if heading == "In how many directions":
        return [("effective rank", lambda c: c.effective_rank)]
    if heading == "Where its directions lie":
        return [("intruder dimensions", lambda c: float(c.base.intruders) if c.base else 0.0)]
    return []


def to_html(found: AdapterInspection, model: str | None = None) -> str:
    """An inspection as a page."""
    page = Document(f"What {Path(found.folder).name} learned")
    alive = [c for c in found.changes if not c.dead]
    page.numbers(
        [
            ("linears", f"{len(found.changes)}", f"{len(found.changes) - len(alive)} dead"),
            ("rank", _range(sorted({c.r for c in found.changes})), ""),
            ("effective rank", f"{median(c.effective_rank for c in alive):.1f}" if alive else "none", "median"),
            ("rank for 99 %", f"{max((c.rank_99 for c in alive), default=0)}", "of the energy, everywhere"),
        ]
    )
    page.text(f"{found.folder}" + (f" on {model}" if model else ""), "dim")
    for heading, told in sentences(found).items():
        page.heading(heading)
        for text in told:
            page.text(text)
        page.charts(*(heat_map(_grid(found.changes, value), "layer", title) for title, value in _maps(found, heading)))
        if heading == "In how many directions":
            page.charts(_spectra(alive))
        if heading == "How it got there" and len(found.drift) > 1:
            drift = [
                Series("size", [(m.step, m.norm) for m in found.drift], 0),
                Series("cosine", [(m.step, m.cosine) for m in found.drift], 1),
            ]
            page.charts(line_chart(drift, "step", "share of the final change"))
    page.heading("Every linear")
    with page.fold(f"{len(found.changes)} rows"):
        page.table(*_table(found))
    return page.html()


def _grid(changes: Sequence[Change], value: Value) -> dict[tuple[str, str], float]:
    return {(c.name, c.layer): value(c) for c in changes}


def _spectra(alive: Sequence[Change]) -> str:
    """The mean spectrum of each kind of linear, each divided by its largest value."""
    kinds: defaultdict[str, list[list[float]]] = defaultdict(list)
    for c in alive:
        kinds[c.name].append([v / c.values[0] for v in c.values])
    series = []
    for look, (name, rows) in enumerate(kinds.items()):
        longest = max(map(len, rows))
        means = [fmean(row[i] for row in rows if len(row) > i) for i in range(longest)]
        series.append(Series(name, [(i + 1, v) for i, v in enumerate(means) if v > 1e-6], look, dots=True))
    return line_chart(series, "singular value", "share of the largest", log=True)


def _table(found: AdapterInspection) -> tuple[list[str], list[list[object]]]:
    based, rotated = any(c.base for c in found.changes), any(c.rotated is not None for c in found.changes)
    alike = {x.path: x for x in found.likeness}
    head = ["linear", "[out, in]", "r", "||dW||", "effective rank", "for 90 %", "for 99 %"]
    head += ["||dW|| / ||W||", "in strong directions", "intruders"] * based + ["rotated"] * rotated
    head += ["cosine", "writes alike", "reads alike"] * bool(alike)
    rows = []
    for c in found.changes:
        row: list[object] = [
            c.path + " (dead)" * c.dead,
            str(list(c.shape)),
            c.r,
            c.norm,
            c.effective_rank,
            c.rank_90,
            c.rank_99,
        ]
        row += [c.base.relative, c.base.strong, c.base.intruders] if c.base else [""] * 3 * based
        row += [c.rotated if c.rotated is not None else ""] * rotated
        x = alike.get(c.path)
        row += [x.cosine, x.outputs, x.inputs] if x else [""] * 3 * bool(alike)
        rows.append(row)
    return head, rows


def _share(value: float, c: Change) -> str:
    return f"{value:.2%}" if c.base else f"{value:.3g}"


def _range(values: Sequence[int]) -> str:
    return f"{values[0]}" if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _few(changes: Sequence[Change]) -> str:
    names = ", ".join(c.path for c in changes[:3])
    return names + (f" and {len(changes) - 3} more" if changes[3:] else "")
