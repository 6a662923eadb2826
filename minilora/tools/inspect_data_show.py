"""An inspection of rows for a terminal and as a page: colour is the role, underlined is trained, dim is masked.

Where there is no colour, in a pipe, each line says which it is.
"""

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape as rich_escape
from rich.text import Text

from ..console import Console
from ..errors import quote
from ..report.charts import READOUT
from ..report.charts import STYLE as CHARTS
from ..report.histogram import svg_histogram, text_histogram
from ..report.html import UNSEEN, escape, page, table
from ..report.token_view import Token
from ..rows.sources import parse_sources
from .inspect_data import Inspection

COLOURS = {"system": "magenta", "user": "cyan", "assistant": "green", "format": "yellow"}
NAMES = {"total": "tokens of a row", "source": "masked tokens (source)", "target": "trained tokens (target)"}
STYLE = """
.tokens { line-height: 2; white-space: pre-wrap; overflow-wrap: anywhere } .tokens span { padding: .1em 0; border-radius: 2px }
.system { color: var(--d) } .user { color: var(--a) } .assistant { color: var(--c) } .format { color: var(--dim) }
.t { border-bottom: 2px solid currentColor; background: var(--mark) } .s { font-weight: 700; border: 1px dotted currentColor; padding: 0 .2em !important }
.tokens span:hover { outline: 2px solid var(--b) }
"""


def summary(result: Inspection) -> list[tuple[str, str]]:
    """Name and text of the first lines."""
    total, target = result.lengths["total"], result.lengths["target"]
    shapes = ", ".join(f"{shape} {n:,}" for shape, n in result.shapes.most_common())
    share = 100 * target.sum() / max(total.sum(), 1)
    lines = [("data", f"{result.path}   {result.rows:,} rows ({shapes})"), *(("", note) for note in result.notes)]
    if len(total):
        lines.append(
            ("tokens", f"{total.sum():,}, {target.sum():,} trained ({share:.0f} %), longest row {total.max():,}")
        )
    if result.check is not None:
        lines.append(("template", check_words(result)))
    return lines


def check_words(result: Inspection) -> str:
    """What the comparison with the folder's own chat template came to."""
    check = result.check
    assert check is not None
    words = f"{check.same:,} of {check.chats:,} compared rows have the ids of the folder's own chat template"
    if check.first is not None:
        d = check.first
        words += f"; first difference: {result.checked[d.chat]}, token {d.token}, after {quote(d.before)}: ours {quote(d.ours)} {d.our_ids}, its {quote(d.theirs)} {d.their_ids}"
    return words + (f"; it refused a row: {quote(check.error, 200)}" if check.error else "")


def show(result: Inspection, console: Console) -> None:
    """Print an inspection."""
    for name, text in summary(result):
        console.print(f"[bold]{name:<9}[/]{rich_escape(text)}", highlight=False, soft_wrap=True)
    console.print()
    if not result.problems:
        console.print("[bold]problems[/] none", highlight=False)
    for kind, problem in result.problems.items():
        console.print(f"[bold red]{problem.rows:>8,}[/] {rich_escape(kind)}", highlight=False, soft_wrap=True)
        for place in problem.places[:2]:
            console.print(f"         [dim]{rich_escape(_brief(result, place))}[/]", highlight=False, soft_wrap=True)
    for name, values in result.lengths.items():
        if len(values):
            console.print(f"\n[bold]{NAMES[name]}[/]  {middle(values)}", highlight=False)
            console.print("\n".join(text_histogram(values, result.limits(name))), highlight=False, markup=False)
    for sample in result.samples:
        console.print(f"\n[bold]{rich_escape(_plain(sample.where))}[/]", highlight=False, soft_wrap=True)
        for problem in sample.problems:
            console.print(f"[red]{rich_escape(_plain(problem))}[/]", highlight=False, soft_wrap=True)
        shown = _coloured(sample.tokens) if console.color_system else Text("\n".join(_marked(sample.tokens)))
        console.print(shown, soft_wrap=True)
    if result.samples:
        console.print(_legend() if console.color_system else "\n↵ is a line end of the text", highlight=False)


def _coloured(tokens: Iterable[Token]) -> Text:
    text = Text()
    for token in tokens:
        mask = " underline" if token.trained else " dim"
        text.append(_shown(token), COLOURS[token.role] + mask + " reverse" * token.special)
    return text


def _legend() -> Text:
    text = Text("\n")
    for word, style in (*COLOURS.items(), ("trained", "underline"), ("masked", "dim"), ("special token", "reverse")):
        text.append(word, style).append("  ")
    return text


def _marked(tokens: Iterable[Token]) -> Iterator[str]:
    """The text in lines that are trained or masked as a whole, and begin with that word."""
    for trained, group in groupby(tokens, key=lambda token: token.trained):
        for line in "".join(map(_shown, group)).removesuffix("\n").split("\n"):
            yield f"{'trained' if trained else 'masked':<7}  {line}"


def middle(values: np.ndarray) -> str:
    """Median, 95th percentile and the largest, in words."""
    half, most, top = np.quantile(values, [0.5, 0.95, 1.0])
    return f"half are at most {half:.0f}, 95 % at most {most:.0f}, the longest is {top:.0f}"


def _brief(result: Inspection, place: str) -> str:
    """A place without the folders of its file."""
    for source in parse_sources(result.path):
        place = place.replace(source.path, Path(source.path).name)
    return _plain(place)


def _plain(text: str) -> str:
    return UNSEEN.sub(lambda m: f"⟨U+{ord(m[0]):04X}⟩", text)


def _shown(token: Token) -> str:
    """The token's text; a line end and a tab can be seen."""
    return _plain(token.text.replace("\r", "␍").replace("\t", "⇥\t").replace("\n", "↵\n"))


def to_html(result: Inspection, model: Path) -> str:
    """An inspection as a page of its own."""
    head = table(["", ""], [("model", str(model)), *summary(result)])
    if result.problems:
        rows = [
            (p.rows, kind, "\n".join(_brief(result, place) for place in p.places))
            for kind, p in result.problems.items()
        ]
        problems = table(
            ["rows", "problem", f"the first {max(len(p.places) for p in result.problems.values())} of them"], rows
        )
    else:
        problems = '<p class="good">None was found.</p>'
    pictures = "".join(
        f'<div><h3>{NAMES[name].capitalize()}</h3><p class="dim">{middle(values)}</p>{svg_histogram(values, result.limits(name), "tokens")}</div>'
        for name, values in result.lengths.items()
        if len(values)
    )
    legend = "".join(f'<span class="{role}">{role}</span>   ' for role in COLOURS)
    legend += '<span class="t">trained</span>   masked   <span class="s">special token</span>'
    body = f'{head}<h2>Problems</h2>{problems}<h2>Lengths</h2><div class="charts">{pictures}</div><h2>What the model sees</h2>'
    body += f'<p class="tokens">{legend}</p><p class="dim">Point at a token for its id.</p>'
    body += "".join(map(_sample, result.samples))
    return page(f"Rows of {Path(result.path).name}", body, CHARTS + STYLE, READOUT)


def _sample(sample: Any) -> str:
    spans = []
    for token in sample.tokens:
        kinds = token.role + " t" * token.trained + " s" * token.special
        ids = " ".join(map(str, token.ids))
        hint = f"{ids} {token.role}, {'trained' if token.trained else 'masked'}"
        spans.append(f'<span class="{kinds}" title="{escape(hint)}">{escape(_shown(token))}</span>')
    problems = "".join(f'<p class="bad">{escape(p)}</p>' for p in sample.problems)
    return f'<h3>{escape(sample.where)}</h3>{problems}<div class="text tokens">{"".join(spans)}</div>'
