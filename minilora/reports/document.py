"""A document that is written twice: as a self-contained HTML page and as markdown. What comes in is text, never markup."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from .html import escape, page, table

STYLE = """
.legend span { margin-right: 1.2rem; white-space: nowrap } .warning { border-left: 4px solid var(--bad); padding-left: .7rem }
.note { border-left: 4px solid var(--line); padding-left: .7rem } .wide > svg { min-width: 34rem }
.wide th, .wide td:first-child { overflow-wrap: normal } td:first-child { min-width: 4rem }
"""


class Document:
    """Blocks in reading order; `html` and `markdown` give the whole."""

    def __init__(self, title: str):
        self.title = title
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

    def table(self, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        rows = list(rows)
        lines = [[_line(_shown(v)) for v in row] for row in rows]
        marks = ["---"] * len(head)
        self.add(
            table(head, rows),
            "\n".join("| " + " | ".join(row) + " |" for row in [[_line(h) for h in head], marks, *lines]),
        )

    def chart(self, svg: str) -> None:
        """Markup from charts.py; markdown goes without."""
        self.add(f'<div class="wide">{svg}</div>')

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
        return page(self.title, "\n".join(self._html), STYLE + style, script)

    def markdown(self) -> str:
        return "\n\n".join(self._markdown) + "\n"


def _shown(value: Any) -> str:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"{value:,}" if number and isinstance(value, int) else f"{value:,.4g}" if number else str(value)


def _line(text: str) -> str:
    """A text on one line of markdown, in which nothing is markup."""
    return re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", " ".join(text.split()))
