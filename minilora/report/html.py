"""Self-contained HTML pages: light or dark as the reader's system is, no request to any network, readable without a script.

A page's content security policy allows no request and no script but the one whose hash it names. So a text that a model or
a file supplied stays text even where somebody forgot to escape it.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable
from typing import Any

# what a browser would not show, or would use to turn the text around it: told by its code point
UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
BREAKS = re.compile(r"(?<=[/,+])(?=[^\W\d])")  # where a path or a run's name may be broken over lines

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --dim: #5b6570; --back: #ffffff; --card: #f5f7f9; --line: #d5dbe1;
  --a: #0b62b0; --b: #b65300; --c: #00745a; --d: #8a3fa0; --good: #00703c; --bad: #b3261e; --mark: #d9eaff; --shade: #0005; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ec; --dim: #98a3ae; --back: #14181c; --card: #1d2329;
  --line: #38424c; --a: #6cb4ff; --b: #ffab5e; --c: #4fd0ad; --d: #d79bea; --good: #62cf92; --bad: #ff8f86; --mark: #17406b; --shade: #fff5; } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 1rem 1.2rem 4rem; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif }
h1 { font-size: 1.5rem; margin: .6rem 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem } h3 { font-size: 1rem; margin: 1.2rem 0 .3rem }
p { margin: .4rem 0; max-width: 60rem } a { color: var(--a) } .dim { color: var(--dim) } .good { color: var(--good) } .bad { color: var(--bad) }
code, pre, .text { font-family: ui-monospace, "Cascadia Mono", Consolas, "Noto Sans Mono CJK SC", monospace; font-size: .9em }
pre, .text { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; padding: .6rem .8rem; margin: .4rem 0 }
.wide { overflow-x: auto; scrollbar-width: thin; background: linear-gradient(to right, var(--back) 40%, transparent) left / 2.5rem 100% no-repeat local,
  linear-gradient(to left, var(--back) 40%, transparent) right / 2.5rem 100% no-repeat local,
  linear-gradient(to right, var(--shade), transparent) left / 1rem 100% no-repeat scroll,
  linear-gradient(to left, var(--shade), transparent) right / 1rem 100% no-repeat scroll }
table { border-collapse: collapse; margin: .4rem 0 }
th, td { text-align: left; vertical-align: top; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: break-word; white-space: pre-line }
th { color: var(--dim); font-weight: 600 } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
@media (max-width: 30rem) { body { padding: 1rem .9rem 4rem } th, td { padding-right: .45rem; font-size: .93em } }
td.best { font-weight: 700; color: var(--good) }
h1, h2, h3, p, dd { overflow-wrap: anywhere } details { margin: .6rem 0 } summary { cursor: pointer; padding: .3rem 0 }
"""


def escape(value: Any) -> str:
    """A value as text of a page or of a quoted attribute; characters that cannot be seen are told as ⟨U+202E⟩."""
    return UNSEEN.sub(lambda m: f"⟨U+{ord(m[0]):04X}⟩", html.escape(str(value).replace("\r\n", "\n")))


class Best(str):
    """The best cell of its row in a table."""


def page(title: str, body: str, style: str = "", script: str = "", refresh: int = 0) -> str:
    """A whole page. title is text, body is HTML whose texts are escaped; style and script are ours, never a stranger's.

    refresh: seconds after which the page loads itself anew.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:" + (
        f"; script-src 'sha256-{digest}'" if script else ""
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        + (f'<meta http-equiv="refresh" content="{refresh}">\n' if refresh else "")
        + f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n"
        + (f"<script>{script}</script>\n" if script else "")
        + "</body>\n</html>\n"
    )


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table of texts and numbers, everything escaped; numbers stand at the right."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def _cell(value: Any) -> str:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    shown = f"{value:,}" if isinstance(value, int) and number else f"{value:,.4g}" if number else value
    kind = ' class="number"' if number else ' class="best"' if isinstance(value, Best) else ""
    return f"<td{kind}>{BREAKS.sub('<wbr>', escape(shown))}</td>"


def embed(name: str, value: Any) -> str:
    """A JSON value that the page's script reads by JSON.parse(document.getElementById(name).textContent)."""
    text = json.dumps(value).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return f'<script type="application/json" id="{escape(name)}">{text}</script>'
