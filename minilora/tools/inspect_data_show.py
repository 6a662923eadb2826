"""An inspection of rows on a terminal and as a page.

The colour shows the role; trained text is underlined, masked text is dim. Without colours, in a pipe, each line begins with
"trained" or "masked".
"""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
from rich.text import Text

from ..console import Console
from ..errors import quote
from ..report.charts import marked_histogram, text_histogram
from ..report.page import Document, escape, visible
from ..report.token_view import Token
from ..rows.sources import parse_sources
from .inspect_data import Inspection

COLOURS = {"system": "magenta", "user": "cyan", "assistant": "green", "format": "yellow"}
NAMES = {"total": "tokens of a row", "source": "masked tokens (source)", "target": "trained tokens (target)"}


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
    """The result of the comparison with the folder's own chat template."""
    check = result.check
    assert check is not None
    words = f"{check.same:,} of {check.chats:,} compared rows have the ids of the folder's own chat template"
    if check.first is not None:
        d = check.first
        words += f"; first difference: {result.checked[d.chat]}, token {d.token}, after {quote(d.before)}: "
        words += f"ours {quote(d.ours)} {d.our_ids}, its {quote(d.theirs)} {d.their_ids}"
    return words + (f"; it refused a row: {quote(check.error, 200)}" if check.error else "")


def show(result: Inspection, console: Console) -> None:
    """Print an inspection."""
    say = partial(console.print, markup=True, soft_wrap=True)
    for name, text in summary(result):
        say(Text.assemble((f"{name:<9}", "bold"), text))
    say()
    if not result.problems:
        say(Text.assemble(("problems", "bold"), " none"))
    for kind, problem in result.problems.items():
        say(Text.assemble((f"{problem.rows:>8,}", "bold red"), f" {kind}"))
        for place in problem.places[:2]:
            say(f"         {_brief(result, place)}", style="dim")
    for name, values in result.lengths.items():
        if len(values):
            console.print(Text.assemble("\n", (NAMES[name], "bold"), f"  {middle(values)}"))
            console.say("\n".join(text_histogram(values, result.limits(name))))
    for sample in result.samples:
        say(f"\n{visible(sample.where)}", style="bold")
        for problem in sample.problems:
            say(visible(problem), style="red")
        say(_coloured(sample.tokens) if console.color_system else Text("\n".join(_marked(sample.tokens))))
    if result.samples:
        console.print(_legend() if console.color_system else "\n↵ is a line end of the text")


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
    """The text in lines that are trained or masked as a whole and begin with that word."""
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
    return visible(place)


def _shown(token: Token) -> str:
    """The token's text with visible line ends and tabs."""
    return visible(token.text.replace("\r", "␍").replace("\t", "⇥\t").replace("\n", "↵\n"))


def to_html(result: Inspection, model: Path) -> str:
    """An inspection as a page."""
    page = Document(f"Rows of {Path(result.path).name}")
    page.table(["", ""], [("model", str(model)), *summary(result)])
    page.heading("Problems")
    if result.problems:
        most = max(len(p.places) for p in result.problems.values())
        page.table(
            ["rows", "problem", f"the first {most} of them"],
            [(p.rows, kind, "\n".join(_brief(result, x) for x in p.places)) for kind, p in result.problems.items()],
        )
    else:
        page.text("None was found.", "good")
    page.heading("Lengths")
    lengths = [(name, values) for name, values in result.lengths.items() if len(values)]
    page.charts(*(marked_histogram(v, result.limits(name), NAMES[name], notes=[middle(v)]) for name, v in lengths))
    page.heading("What the model sees")
    roles = "   ".join(f'<span class="{role}">{role}</span>' for role in COLOURS)
    kinds = '<span class="t">trained</span>   masked   <span class="s">special token</span>'
    page.add(f'<p class="tokens">{roles}   {kinds}</p>')
    page.text("Point at a token for its id.", "dim")
    for sample in result.samples:
        page.heading(sample.where, small=True)
        for problem in sample.problems:
            page.text(problem, "bad")
        page.add(f'<div class="text tokens">{"".join(map(_span, sample.tokens))}</div>')
    return page.html()


def _span(token: Token) -> str:
    kinds = token.role + " t" * token.trained + " s" * token.special
    hint = f"{' '.join(map(str, token.ids))} {token.role}, {'trained' if token.trained else 'masked'}"
    return f'<span class="{kinds}" title="{escape(hint)}">{escape(_shown(token))}</span>'
