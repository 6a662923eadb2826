"""The answer of a sweep's runs to its question: differences between groups of runs, with intervals over seeds.

A sweep file says how to read its runs:

    question:
      ask: Does the best learning rate depend on the rank?
      published: With the scale alpha / r hardly (Schulman et al., LoRA Without Regret, 2025).
      compare: [lora_r]     # settings whose values make the groups; each group is compared with the first one
      best_of: lr           # in each seed, a group is taken at its best value of this setting
      read: rate            # compares these best values, as a ratio; loss (the default) compares losses, in nats
      along: batch_size     # compares the differences at the first and at the last value of this setting
      loss: train           # smoothed training loss at the end; val (the default) is the validation loss at the end
      expect: [0.5, 2]      # a difference in this range is what was published
      spectra: true         # the page also has the spectra of dW, for LoRA and for full fine-tuning

Runs of one seed share rows, their order and the initial A, so differences are paired by seed; the interval is Student's t
over seeds.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

from ..errors import UsageError, quote
from ..settings import canonical
from .charts import Series, line_chart
from .page import Document
from .record import Record, as_text

# 0.975 quantile of Student's t for 1, 2, ... degrees of freedom
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
NORMAL = 1.959964
LOSSES = {"val": "validation loss", "train": "training loss"}

Values = tuple[str, ...]  # of the compared settings: a group
Place = tuple[str, Values, int, float]  # of a run: value along, group, seed, value of best_of
Table = tuple[list[str], list[list[Any]]]  # head and rows


@dataclass(frozen=True)
class Question:
    """The section `question` of a sweep file."""

    ask: str
    published: str
    compare: tuple[str, ...]
    expect: tuple[float, float]
    best_of: str = ""
    along: str = ""
    read: Literal["loss", "rate"] = "loss"
    loss: Literal["val", "train"] = "val"
    spectra: bool = False

    @classmethod
    def of(cls, section: dict[str, Any], where: str) -> Self:
        """UsageError for a key or a value that has no meaning."""
        known = {f.name: f for f in fields(cls)}
        wrong = next((key for key in section if key not in known), None)
        if wrong is not None:
            raise UsageError(f"{where}: question has {wrong!r}", f"It holds {', '.join(known)}.")
        missing = [key for key in ("ask", "published", "compare", "expect") if not section.get(key)]
        if missing:
            raise UsageError(f"{where}: question has no {missing[0]}", "See minilora/report/experiment.py.")
        for key in ("ask", "published"):
            if isinstance(section[key], (list, dict)):
                raise UsageError(f"{where}: {key} is {section[key]!r}", "It is a text; quote it.")
        for key in ("read", "loss"):
            if key in section and section[key] not in get_args(known[key].type):
                raise UsageError(
                    f"{where}: {key} is {section[key]!r}", f"It is {' or '.join(get_args(known[key].type))}."
                )
        expect = section["expect"]
        if not isinstance(expect, list) or len(expect) != 2 or not all(isinstance(x, (int, float)) for x in expect):
            raise UsageError(f"{where}: expect is {expect!r}", "Give the ends of a range: [0.5, 2]; .inf is no end.")
        if section.get("read") == "rate" and not section.get("best_of"):
            raise UsageError(f"{where}: read: rate needs best_of", "Name the setting whose best value is compared.")
        compare = section["compare"] if isinstance(section["compare"], list) else [section["compare"]]
        values: dict[str, Any] = {key: canonical(str(section[key])) for key in ("best_of", "along") if section.get(key)}
        values |= {key: str(section[key]) for key in ("ask", "published")}
        values |= {"compare": tuple(canonical(str(name)) for name in compare), "expect": tuple(map(float, expect))}
        return cls(**section | values)

    def place(self, config: Mapping[str, Any]) -> Place:
        """Where a run of these settings belongs: the value along, the group, the seed and the value of best_of."""
        along = as_text(config.get(self.along)) if self.along else ""
        group = tuple(as_text(config.get(name)) for name in self.compare)
        tried = config[self.best_of] if self.best_of else 1.0
        if not isinstance(tried, (int, float)):
            what = f"best_of is {self.best_of}, which is {quote(str(tried))} in a run"
            raise UsageError(what, "Name a setting whose values are numbers.")
        return along, group, config["seed"], float(tried)

    def places(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Place]:
        """The place of each run, by its name; UsageError for two in one place: one of them would not be counted."""
        found = {name: self.place(config) for name, config in configs.items()}
        taken: dict[Place, str] = {}
        for name, place in found.items():
            if taken.setdefault(place, name) != name:
                what = f"{taken[place]} and {name} differ in nothing that the question names"
                raise UsageError(what, "Name under compare, along or best_of what differs, or make two sweeps of them.")
        return found


def student(freedom: int) -> float:
    """The 0.975 quantile of Student's t, to three decimals (for many degrees: Abramowitz and Stegun, 26.7.5)."""
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    z, n = NORMAL, freedom
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its 95 % interval; with one seed there is none."""

    mean: float
    low: float
    high: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        mean, n = statistics.fmean(values), len(values)
        half = student(n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.inf
        return cls(mean, mean - half, mean + half, n)

    def exp(self) -> "Estimate":
        """The same of the exponentials, if the values were logarithms."""
        mean, low, high = (math.exp(x) if x < 700 else math.inf for x in (self.mean, self.low, self.high))
        return Estimate(mean, low, high, self.seeds)

    def text(self, form: str) -> str:
        inside = f"{self.low:{form}}\u00a0to\u00a0{self.high:{form}}" if math.isfinite(self.high) else "one seed"
        return f"{self.mean:{form}} ({inside})"


@dataclass(frozen=True)
class Best:
    """The best run of one group in one seed: the value of best_of, the loss, the run, and whether that value is at an edge of the range tried."""

    rate: float
    loss: float
    run: Record
    edge: bool

    @classmethod
    def of(cls, tried: dict[float, tuple[float, Record]]) -> Self:
        """The lowest of the losses that were measured; its place is the vertex of the parabola through it and its two neighbours.

        tried: loss and run by the value of best_of. The axes of the parabola are logarithmic.
        """
        points = sorted((x, loss) for x, (loss, _) in tried.items())
        i = min(range(len(points)), key=lambda i: points[i][1])
        rate, loss = points[i]
        run = tried[rate][1]
        near = points[i - 1 : i + 2] if i else []
        if len(near) < 3:
            return cls(rate, loss, run, len(points) > 1)
        if not all(0 < y < math.inf for _, y in near):
            return cls(rate, loss, run, False)
        (x0, y0), (x1, y1), (x2, y2) = ((math.log(x), math.log(y)) for x, y in near)
        up, down = (x1 - x0) * (y1 - y2), (x1 - x2) * (y1 - y0)
        shift = 0.5 * ((x1 - x0) * up - (x1 - x2) * down) / (up - down) if up != down else 0.0
        return cls(math.exp(x1 - shift), loss, run, False)


class Cells:
    """The runs of a sweep by (value along, group, seed), each at the best of best_of."""

    def __init__(self, question: Question, runs: Iterable[Record]):
        self.question = question
        self.runs: dict[tuple[str, Values, int], dict[float, tuple[float, Record]]] = {}
        found = {str(run.folder): run for run in runs}
        places = question.places({name: run.config for name, run in found.items()})
        short = _short({text for along, group, _, _ in places.values() for text in (along, *group)})
        for name, (along, group, seed, tried) in places.items():
            key = short[along], tuple(short[text] for text in group), seed
            self.runs.setdefault(key, {})[tried] = _loss(found[name], question.loss), found[name]
        ended = {key: any(math.isfinite(loss) for loss, _ in runs.values()) for key, runs in self.runs.items()}
        self._bests = {key: Best.of(runs) for key, runs in self.runs.items() if ended[key]}
        self.alongs, self.groups, self.seeds = (list(dict.fromkeys(part)) for part in zip(*self.runs, strict=True))

    def bests(self, along: str, group: Values) -> dict[int, Best]:
        """By seed; seeds without a finished run are left out."""
        return {seed: self._bests[key] for seed in self.seeds if (key := (along, group, seed)) in self._bests}

    def values(self, along: str, group: Values) -> dict[int, float]:
        """By seed: the loss, or the logarithm of the best rate."""
        rate = self.question.read == "rate"
        return {seed: math.log(best.rate) if rate else best.loss for seed, best in self.bests(along, group).items()}

    def differences(self, along: str, group: Values) -> dict[int, float]:
        """By seed, from the first group; only seeds in which both have a value."""
        mine, first = self.values(along, group), self.values(along, self.groups[0])
        return {seed: mine[seed] - first[seed] for seed in mine if seed in first}

    def estimate(self, group: Values) -> Estimate | None:
        """The difference of a group from the first; along a setting, the change of it from the setting's first value to its last."""
        found = self.differences(self.alongs[-1], group)
        if self.question.along:
            if len(self.alongs) < 2:
                return None
            before = self.differences(self.alongs[0], group)
            found = {seed: found[seed] - before[seed] for seed in found if seed in before}
        if not found:
            return None
        estimate = Estimate.of(list(found.values()))
        return estimate.exp() if self.question.read == "rate" else estimate


def _short(texts: set[str]) -> dict[str, str]:
    """A name for each value of a setting: of a path its last part, where no other path has the same."""
    last = {text: text.rsplit("/", 1)[-1] for text in texts}
    return {text: name if [*last.values()].count(name) == 1 else text for text, name in last.items()}


def _loss(run: Record, kind: str) -> float:
    """The loss at the end of a run; infinite if there is none."""
    if not run.finished:
        return math.inf
    loss = run.smooth[-1][1] if kind == "train" else run.val[-1][1] if run.val else math.inf
    return loss if math.isfinite(loss) else math.inf


def sentence(question: Question, cells: Cells, group: Values) -> str:
    """What the runs say of one group beside the first, and whether it is what was published."""
    mine, first = _name(question, group), _name(question, cells.groups[0])
    found = cells.estimate(group)
    if found is None:
        return f"There is no seed in which {mine} and {first} can be compared."
    what = f"{LOSSES[question.loss]} of {mine}"
    if question.read == "rate":
        said = f"The best {question.best_of} of {mine} is {found.text('.2f')} times that of {first}"
    elif question.along:
        ends = f"From {question.along} {cells.alongs[0]} to {cells.alongs[-1]}"
        said = f"{ends}, the {what} less that of {first} changes by {found.text('+.3f')} nats"
    else:
        said = f"The {what} less that of {first} is {found.text('+.3f')} nats"
    low, high = question.expect
    if low <= found.low and found.high <= high:
        judged = "as published"
    elif found.high < low or high < found.low:
        judged = "not as published"
    else:
        judged = "these runs cannot tell"
    return f"{said}: {judged}."


def _name(question: Question, group: Values) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip(question.compare, group, strict=True))


def experiment(cells: Cells, failed: Sequence[str] = (), more: Sequence[tuple[str, str, Table]] = ()) -> Document:
    """The page on the runs of a sweep that asks something; more: heading, what it says, and head and rows of further tables."""
    question = cells.question
    page, runs = Document(question.ask), [run for place in cells.runs.values() for _, run in place.values()]
    for group in cells.groups[1:]:
        page.verdict(sentence(question, cells, group))
    page.text(f"Published: {question.published}")
    page.text(
        f"In brackets: 95 % intervals over {len(cells.seeds)} seeds (Student's t, differences taken seed by seed). As published is what "
        f"lies {_range(*question.expect)}. Other rows or another model may answer otherwise.",
        "dim",
    )
    for warning in [*failed, *_edges(question, cells)]:
        page.text(warning, "warning")
    if question.best_of:
        page.charts(*(_chart(question, cells, along) for along in cells.alongs))
    page.heading("Groups")
    page.table(*_groups(question, cells))
    for heading, text, table in more:
        page.heading(heading)
        page.table(*table)
        page.text(text, "dim")
    with page.fold(f"All {len(runs)} runs"):
        page.table(*_runs(question, runs))
    return page


def _range(low: float, high: float) -> str:
    if math.isinf(high):
        return f"above {low:g}"
    return f"below {high:g}" if math.isinf(low) else f"between {low:g} and {high:g}"


def _edges(question: Question, cells: Cells) -> list[str]:
    """Groups whose best value may lie outside of what was tried."""
    found = []
    for along in cells.alongs:
        for group in cells.groups:
            bests = cells.bests(along, group).values()
            if edges := sum(best.edge for best in bests):
                where = f" at {question.along} {along}" if along else ""
                found.append(
                    f"{_name(question, group)}{where}: in {edges} of {len(bests)} seeds the best {question.best_of} is the first or the "
                    "last that was tried; a better one may lie beyond"
                )
    return found


def _chart(question: Question, cells: Cells, along: str) -> str:
    """The mean loss over seeds by the value of best_of, a line a group."""
    series = []
    for i, group in enumerate(cells.groups):
        lines = [cells.runs.get((along, group, seed), {}) for seed in cells.seeds]
        tried = sorted({x for line in lines for x in line})
        means = [(x, statistics.fmean(line[x][0] for line in lines if x in line)) for x in tried]
        series.append(Series(_name(question, group), means, i, dots=True))
    loss = f"{LOSSES[question.loss]} at the end (nats a token)"
    return line_chart(series, question.best_of, f"{loss}, {question.along} {along}" if along else loss, log_x=True)


def _groups(question: Question, cells: Cells) -> Table:
    """Head and rows of the table of groups."""
    head = [*([question.along] if question.along else []), *question.compare, "trained parameters"]
    head += [f"best {question.best_of}"] if question.best_of else []
    head += [f"{LOSSES[question.loss]} there" if question.best_of else LOSSES[question.loss], "less that of the first"]
    rows = []
    for along in cells.alongs:
        first = cells.bests(along, cells.groups[0])
        for group in cells.groups:
            if not (bests := cells.bests(along, group)):
                continue
            parameters = next(iter(bests.values())).run.data.get("trained_parameters", "unknown")
            row = [*([along] if question.along else []), *group, parameters]
            if question.best_of:
                row.append(Estimate.of([math.log(best.rate) for best in bests.values()]).exp().text(".2g"))
            row.append(Estimate.of([best.loss for best in bests.values()]).text(".3f"))
            less = [best.loss - first[seed].loss for seed, best in bests.items() if seed in first]
            row.append(Estimate.of(less).text("+.3f") if less and group != cells.groups[0] else "")
            rows.append(row)
    return head, rows


def _runs(question: Question, runs: Sequence[Record]) -> Table:
    """Head and rows of the table of runs."""
    rows = [
        [run.name, run.step, f"{_loss(run, question.loss):.4f}", f"{run.time:.0f} s" if run.step else ""]
        for run in runs
    ]
    return ["run", "steps", LOSSES[question.loss], "time"], rows
