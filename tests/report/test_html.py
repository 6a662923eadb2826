"""Pages hold a stranger's text as text, whatever it is, and ask no network for anything."""

import base64
import hashlib
import json
import re

from hypothesis import given, settings
from hypothesis import strategies as st
from seen import Seen

from minilora.report.html import embed, escape, page, table

HOSTILE = "</script></title><img src=x onerror=alert(1)>\"'&amp;\u202e\x1b[2J\ud800"


def test_a_hostile_text_stays_text():
    seen = Seen(page(HOSTILE, table([HOSTILE], [[HOSTILE, 1234567, 0.5]]) + embed("x", HOSTILE)))
    assert "img" not in seen.tags and seen.tags.count("script") == 1
    assert seen.text.count("<img src=x onerror=alert(1)>\"'&amp;⟨U+202E⟩⟨U+001B⟩[2J⟨U+D800⟩") == 4
    page(HOSTILE, "").encode()


def test_the_policy_allows_our_script_and_no_request():
    text = page("t", "", script="let a = 1")
    digest = base64.b64encode(hashlib.sha256(b"let a = 1").digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text and "default-src 'none'" in text
    assert not re.search(r"https?:|//|url\(|@import", page("t", table(["a"], [["b"]]), script="let a = 1"))
    assert "script-src" not in page("t", "")


@settings(deadline=None, max_examples=200)
@given(value=st.recursive(st.text() | st.integers() | st.none(), lambda inner: st.lists(inner, max_size=3)))
def test_embedded_values_come_back(value):
    text = embed("data", value)
    assert json.loads(text.partition(">")[2].removesuffix("</script>")) == value
    assert not set(text.partition(">")[2].removesuffix("</script>")) & set("<>&")


@settings(deadline=None, max_examples=200)
@given(text=st.text())
def test_escaped_texts_open_no_tag(text):
    assert Seen(f'<p title="{escape(text)}">{escape(text)}</p>').tags == ["p"]
    assert not re.search(r"[<>\"']", escape(text))
