"""Pages: a Document is written as a self-contained HTML page and as markdown. What comes in is text, never markup.

A page is light or dark as the reader's system is, and can be read without a script. Its content security policy allows no
request, and no script but the one whose hash it names: text from a model or a file stays text even where it was not escaped.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import OutputInUse, UsageError
from ..files.atomic import write_output
from ..files.regular import open_file

# what a browser would not show, or would use to reverse the text around it: shown by its code point
UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
BREAKS = re.compile(r"(?<=[/,+])(?=[^\W\d])")  # where a path or the name of a run may be broken over lines
WORDS = {"warning": "Warning:", "note": "Note:"}  # that a paragraph of a kind begins with

# how each page begins
START = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy\""""
TWIN_START = "[//]: # (written by minilora)\n"  # and its twin in markdown, where no reader sees it


class Best(str):
    """The best cell of its row in a table."""


class Document:
    """Blocks in reading order; `html` and `markdown` give the whole. refresh: seconds until the page reloads itself."""

    def __init__(self, title: str, refresh: int = 0):
        self.title, self.refresh = title, refresh
        self.verdicts: list[str] = []
        self._html: list[str] = []
        self._markdown: list[str] = [f"# {_line(title)}"]
        self._scripts: dict[str, None] = {}

    def heading(self, text: str, small: bool = False) -> None:
        self.add(f"<h{2 + small}>{escape(text)}</h{2 + small}>", f"{'##'}{'#' * small} {_line(text)}")

    def text(self, text: str, kind: str = "") -> None:
        """A paragraph; kind is warning, note, good, bad or dim."""
        look = f' class="{kind}"' if kind else ""
        bold, stars = (f"<b>{WORDS[kind]}</b> ", f"**{WORDS[kind]}** ") if kind in WORDS else ("", "")
        self.add(f"<p{look}>{bold}{escape(text)}</p>", stars + _line(text))

    def verdict(self, text: str) -> None:
        """The conclusion of the page, in a sentence."""
        self.verdicts.append(text)
        self.add(f'<p class="verdict">{escape(text)}</p>', f"**{_line(text)}**")

    def numbers(self, items: Sequence[tuple[str, str, str]]) -> None:
        """The numbers that a reader looks for first: (name, value, detail)."""
        cards = "".join(
            f'<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd class="dim">{escape(detail)}</dd></div>'
            for name, value, detail in items
        )
        lines = [f"- {_line(name)}: {_line(value)}{f' ({_line(more)})' if more else ''}" for name, value, more in items]
        self.add(f'<dl class="numbers">{cards}</dl>', "\n".join(lines))

    def words(self, items: Iterable[tuple[str, str]]) -> None:
        """Words and their meanings."""
        items = list(items)
        cells = "".join(f"<dt>{escape(word)}</dt><dd>{escape(meaning)}</dd>" for word, meaning in items)
        self.add(f'<dl class="words">{cells}</dl>', "\n".join(f"- {_line(w)}: {_line(m)}" for w, m in items))

    def sides(self, items: Iterable[tuple[str, str]]) -> None:
        """(name, text) side by side where there is room, else one below the other."""
        self.add('<div class="sides">')
        for name, text in items:
            self.add("<div>")
            self.text(name, "dim")
            self.verbatim(text)
            self.add("</div>")
        self.add("</div>")

    @contextmanager
    def fold(self, summary: str) -> Iterator[None]:
        """The blocks that are added inside are folded under a summary; markdown shows them open."""
        self.add(f"<details><summary>{escape(summary)}</summary>", f"{_line(summary)}:")
        yield
        self.add("</details>")

    def table(self, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """A table of texts and numbers; numbers are aligned right."""
        rows = list(rows)
        top = "".join(f"<th>{escape(name)}</th>" for name in head)
        body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
        texts = [[f"**{_line(v)}**" if isinstance(v, Best) else _line(_shown(v)) for v in row] for row in rows]
        lines = [list(map(_line, head)), ["---"] * len(head), *texts]
        self.add(
            f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>',
            "\n".join(f"| {' | '.join(line)} |" for line in lines),
        )

    def charts(self, *figures: str) -> None:
        """Markup from charts.py, side by side where there is room; markdown has none of it."""
        self.add("".join(figures) if len(figures) == 1 else f'<div class="charts">{"".join(figures)}</div>')
        self.script("charts.js")

    def verbatim(self, text: str) -> None:
        """A text as it is, line by line."""
        fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
        self.add(f'<div class="text">{escape(text)}</div>', f"{fence}\n{text}\n{fence}")

    def add(self, html: str, markdown: str = "") -> None:
        """Markup of our own; every text in it is escaped."""
        self._html.append(html)
        if markdown:
            self._markdown.append(markdown)

    def data(self, name: str, value: Any) -> None:
        """A JSON value that a script reads by JSON.parse(document.getElementById(name).textContent)."""
        text = json.dumps(value).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
        self.add(f'<script type="application/json" id="{escape(name)}">{text}</script>')

    def script(self, name: str) -> None:
        """Let the page run a script of this folder."""
        self._scripts[name] = None

    def html(self) -> str:
        script = "".join(map(asset, self._scripts))
        digest = base64.b64encode(hashlib.sha256(f"\n{script}".encode()).digest()).decode()
        policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
        policy += f"; script-src 'sha256-{digest}'" if script else ""
        refresh = f'\n<meta http-equiv="refresh" content="{self.refresh}">' if self.refresh else ""
        body = "\n".join([*self._html, f"<script>\n{script}</script>"] if script else self._html)
        return f"""{START} content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">{refresh}
<title>{escape(self.title)}</title>
<style>
{asset("page.css")}</style>
</head>
<body>
<h1>{escape(self.title)}</h1>
{body}
</body>
</html>
"""

    def markdown(self) -> str:
        return visible("\n\n".join(self._markdown)) + "\n"


def write_both(path: Path, html: str, markdown: str) -> None:
    """Write a page, and its twin in markdown beside it; raises as check_page does."""
    check_page(path, twin=True)
    write_output(path, html)
    write_output(path.with_suffix(".md"), f"{TWIN_START}\n{markdown}")


def check_page(path: Path, twin: bool = False) -> None:
    """UsageError unless a page can have this name; OutputInUse if another file has it, or the name of the page's twin."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{path} is no name of a page", "Name a file that ends in .html.")
    for held, start in ((path, START), (path.with_suffix(".md"), TWIN_START))[: 1 + twin]:
        if held.exists() and not _begins(held, start.encode()):
            raise OutputInUse(f"{held} is there already, and is not of minilora", "Give another name, or take it away.")


def _begins(path: Path, start: bytes) -> bool:
    with open_file(path, OutputInUse) as file:
        return file.read(len(start)) == start


@cache
def asset(name: str) -> str:
    """The text of a stylesheet, a script or markup beside this file."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def visible(text: str) -> str:
    """A text in which characters that cannot be seen are shown as ⟨U+202E⟩."""
    return UNSEEN.sub(lambda m: f"⟨U+{ord(m[0]):04X}⟩", text.replace("\r\n", "\n"))


def escape(value: Any) -> str:
    """A value as visible text of a page or of a quoted attribute."""
    return visible(html.escape(str(value)))


def _cell(value: Any) -> str:
    look = ' class="number"' if isinstance(value, (int, float)) else ' class="best"' if isinstance(value, Best) else ""
    return f"<td{look}>{BREAKS.sub('<wbr>', escape(_shown(value)))}</td>"


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if isinstance(value, float) else str(value)


def _line(text: str) -> str:
    """A text on one line of markdown, in which nothing is markup."""
    return re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", " ".join(text.split()))
