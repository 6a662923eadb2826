"""Pages hold a stranger's text as text, whatever it is, and ask no network for anything."""

import base64
import hashlib
import json
import re
import tomllib
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from seen import Seen

from minilora.report.page import Document, asset, escape

HOSTILE = "</script></title><img src=x onerror=alert(1)>\"'&amp;\u202e\x1b[2J\ud800"


def page(title: str = "t", *scripts: str) -> Document:
    document = Document(title)
    document.table([title], [[title, 1234567, 0.5]])
    for name in scripts:
        document.script(name)
    return document


def test_a_hostile_text_stays_text():
    document = page(HOSTILE)
    document.data("x", HOSTILE)
    seen = Seen(document.html())
    assert "img" not in seen.tags and seen.tags.count("script") == 1
    assert seen.text.count("<img src=x onerror=alert(1)>\"'&amp;⟨U+202E⟩⟨U+001B⟩[2J⟨U+D800⟩") == 4
    document.html().encode()


def test_the_policy_allows_our_script_and_no_request():
    text = page("t", "charts.js", "rating.js", "charts.js").html()
    script = text.partition("<script>")[2].partition("</script>")[0]
    assert script.split() == (asset("charts.js") + asset("rating.js")).split()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text and "default-src 'none'" in text
    assert not re.search(r"https?:|url\(|@import|<link|<img|src=", text)
    assert "script-src" not in page().html()


def test_styles_and_scripts_are_in_the_package():
    """pyproject.toml names their kinds, or a wheel would leave them out."""
    root = Path(__file__).parents[2]
    kinds = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = root / "minilora" / "report"
    named = {path.name for kind in kinds["minilora.report"] for path in folder.glob(kind)}
    assert named == {p.name for p in folder.iterdir() if p.is_file() and p.suffix != ".py"} >= {"page.css", "charts.js"}


@settings(deadline=None, max_examples=200)
@given(value=st.recursive(st.text() | st.integers() | st.none(), lambda inner: st.lists(inner, max_size=3)))
def test_data_of_a_page_comes_back(value):
    document = Document("t")
    document.data("data", value)
    text = document.html().partition('id="data">')[2].partition("</script>")[0]
    assert json.loads(text) == value
    assert not set(text) & set("<>&")


@settings(deadline=None, max_examples=200)
@given(text=st.text())
def test_escaped_texts_open_no_tag(text):
    assert Seen(f'<p title="{escape(text)}">{escape(text)}</p>').tags == ["p"]
    assert not re.search(r"[<>\"']", escape(text))
