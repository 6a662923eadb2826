"""A document that is written twice: as a self-contained HTML page and as markdown. What comes in is text, never markup."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from . import charts
from .html import Best, escape, page, table

STYLE = """
.warning { border-left: 4px solid var(--bad); padding-left: .7rem } .note { border-left: 4px solid var(--line); padding-left: .7rem }
.verdict { font-size: 1.1rem; font-weight: 600; border-left: 4px solid var(--a); padding-left: .7rem; margin: .8rem 0 }
.wide th, .wide td:first-child { overflow-wrap: normal } td:first-child { min-width: 4rem }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem; margin: 1rem 0 }
.numbers div { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .5rem .8rem }
.numbers dt { color: var(--dim); font-size: .9em } .numbers dd { margin: 0 } .numbers dd:first-of-type { font-size: 1.3rem; font-weight: 600 }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: 0 .8rem } .sides > div { min-width: 0 }
.words dt { font-weight: 600 } .words dd { margin: 0 0 .4rem 1rem }
"""


class Document:
    """Blocks in reading order; `html` and `markdown` give the whole. refresh: seconds after which the page loads itself anew."""

    def __init__(self, title: str, refresh: int = 0):
        self.title, self.refresh = title, refresh
        self.verdicts: list[str] = []
        self._html: list[str] = []
        self._markdown: list[str] = [f"# {_line(title)}"]

    def heading(self, text: str, small: bool = False) -> None:
        self.add(f"<h{2 + small}>{escape(text)}</h{2 + small}>", f"{'##'}{'#' * small} {_line(text)}")

    def text(self, text: str, kind: str = "") -> None:
        """A paragraph; kind is warning, note or dim."""
        look = f' class="{kind}"' if kind else ""
        word = {"warning": "Warning:", "note": "Note:"}.get(kind)
        bold, stars = (f"<b>{word}</b> ", f"**{word}** ") if word else ("", "")
        self.add(f"<p{look}>{bold}{escape(text)}</p>", stars + _line(text))

    def verdict(self, text: str) -> None:
        """What the page comes to, in a sentence."""
        self.verdicts.append(text)
        self.add(f'<p class="verdict">{escape(text)}</p>', f"**{_line(text)}**")

    def numbers(self, items: Iterable[tuple[str, str, str]]) -> None:
        """What a reader looks for first: (name, value, what belongs to it)."""
        items = list(items)
        cards = "".join(
            f'<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd class="dim">{escape(more)}</dd></div>'
            for name, value, more in items
        )
        lines = [f"- {_line(name)}: {_line(value)}{f' ({_line(more)})' if more else ''}" for name, value, more in items]
        self.add(f'<dl class="numbers">{cards}</dl>', "\n".join(lines))

    def words(self, items: Iterable[tuple[str, str]]) -> None:
        """Words and what they mean."""
        items = list(items)
        told = "".join(f"<dt>{escape(word)}</dt><dd>{escape(means)}</dd>" for word, means in items)
        self.add(f'<dl class="words">{told}</dl>', "\n".join(f"- {_line(w)}: {_line(m)}" for w, m in items))

    def sides(self, items: Iterable[tuple[str, str]]) -> None:
        """(name, text) beside each other where there is room, else one under the other."""
        self.add('<div class="sides">')
        for name, text in items:
            self.add("<div>")
            self.text(name, "dim")
            self.verbatim(text)
            self.add("</div>")
        self.add("</div>")

    @contextmanager
    def fold(self, summary: str) -> Iterator[None]:
        """What is written inside is folded under its summary; markdown has it open."""
        self.add(f"<details><summary>{escape(summary)}</summary>", f"{_line(summary)}:")
        yield
        self.add("</details>")

    def table(self, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        rows = list(rows)
        lines = [[f"**{_line(v)}**" if isinstance(v, Best) else _line(_shown(v)) for v in row] for row in rows]
        marks = ["---"] * len(head)
        self.add(
            table(head, rows),
            "\n".join("| " + " | ".join(row) + " |" for row in [[_line(h) for h in head], marks, *lines]),
        )

    def charts(self, *figures: str) -> None:
        """Markup from charts.py, beside each other where there is room; markdown goes without."""
        self.add("".join(figures) if len(figures) == 1 else f'<div class="charts">{"".join(figures)}</div>')

    def verbatim(self, text: str) -> None:
        """A text as it is, line by line."""
        fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
        self.add(f'<div class="text">{escape(text)}</div>', f"{fence}\n{text}\n{fence}")

    def add(self, html: str, markdown: str = "") -> None:
        """Markup of our own making."""
        self._html.append(html)
        if markdown:
            self._markdown.append(markdown)

    def html(self, style: str = "", script: str = "") -> str:
        return page(
            self.title, "\n".join(self._html), charts.STYLE + STYLE + style, charts.READOUT + script, self.refresh
        )

    def markdown(self) -> str:
        return "\n\n".join(self._markdown) + "\n"


def _shown(value: Any) -> str:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"{value:,}" if number and isinstance(value, int) else f"{value:,.4g}" if number else str(value)


def _line(text: str) -> str:
    """A text on one line of markdown, in which nothing is markup."""
    return re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", " ".join(text.split()))
