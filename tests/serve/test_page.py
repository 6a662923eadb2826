"""The page in headless Chromium, by clicks: two models side by side, text that stays text, curves that grow, a key."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
browser = pytest.importorskip("playwright.sync_api")

from served import make_models, make_run, running, step

from minilora.generate import Request
from minilora.serve.app import Guards
from minilora.serve.models import Asked
from minilora.text.tools_qwen import Hermes

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason="there is no /usr/bin/chromium")
MARKUP = "<img src=x onerror=document.title='owned'><b>bold</b>"


@pytest.fixture(scope="module")
def chromium():
    with browser.sync_playwright() as p:
        started = p.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(chromium):
    page, wrong = chromium.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    yield page
    page.close()
    assert not [text for text in wrong if "status of 40" not in text], wrong  # a refusal that the test asks for


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("page"))


def say(page, text: str) -> None:
    page.fill("#text", text)
    page.click("#send")
    page.wait_for_selector("#send:enabled")


def test_two_models_answer_side_by_side(page, models):
    with running(models) as (url, _):
        page.goto(url)
        page.click("summary")
        page.fill("#max-tokens", "20")
        say(page, "hello")
        page.press("#text", "Enter")  # nothing was typed: nothing is said
        first, second = (page.locator(".talk").nth(n) for n in (0, 1))
        assert first.locator("select").input_value() == "tiny" and second.locator("select").input_value() == "red"
        answers = page.locator(".answer").all_inner_texts()
        assert len(answers) == 2 and answers[0] != answers[1] and all(answers)
        about = first.locator(".about").inner_text()
        assert about.startswith("tiny, 20 tokens") and about.endswith("cut at its longest")
        page.select_option(".talk:nth-child(2) select", "blue")
        say(page, "again")
        assert second.locator(".about").last.inner_text().startswith("blue") and second.locator(".asked").count() == 2
        page.click("#new")
        assert page.locator(".answer").count() == 0


def test_text_is_never_markup(page, models, monkeypatch):
    """What a user says and what a model says."""
    monkeypatch.setattr(models.base.tokenizer, "decode", lambda ids: MARKUP if ids else "")
    with running(models) as (url, _):
        page.goto(url)
        page.select_option(".talk:nth-child(2) select", "")
        say(page, MARKUP)
        assert page.locator(".asked").first.inner_text() == MARKUP == page.locator(".answer").first.inner_text()
        assert page.locator(".said img, .said b").count() == 0 and page.title() == "minilora chat"


def test_a_call_of_a_tool_is_shown_and_answered(page, models, monkeypatch):
    tokenizer = models.base.tokenizer
    monkeypatch.setattr(tokenizer, "template", replace(tokenizer.template, tools=Hermes()))
    ids = [*tokenizer.encode('hm\n<tool_call>\n{"name": "f", "arguments": {"k": "<b>é", "n": [2]}}\n</tool_call>'), 258]
    monkeypatch.setattr(Asked, "add", lambda self, _, logits: Request.add(self, ids[len(self.ids)], logits))
    with running(models, context=2000) as (url, _):
        page.goto(url)
        page.select_option(".talk:nth-child(2) select", "")
        page.click("summary")
        page.fill("#max-tokens", "200")
        page.fill("#tools", "[")
        say(page, "hi")
        assert "The tools are not JSON" in page.locator(".about.failed").inner_text()
        page.click("#new")
        page.fill("#tools", json.dumps([{"type": "function", "function": {"name": "f"}}]))
        say(page, "hi")
        assert (
            page.locator(".call").inner_text() == "f\nk: <b>é\nn: [2]" and page.locator(".answer").inner_text() == "hm"
        )
        assert page.locator(".about").inner_text().endswith("your next message is the result")
        with page.expect_request("**/v1/chat/completions") as sent:
            say(page, "42")
        _, call, result = sent.value.post_data_json["messages"]
        assert result == {"role": "tool", "content": "42", "tool_call_id": call["tool_calls"][0]["id"]}
        assert page.locator(".call").count() == 2


def test_an_answer_can_be_stopped_and_an_error_is_told(page, models, monkeypatch):
    import time

    choose = models.choose
    monkeypatch.setattr(models, "choose", lambda requests: time.sleep(0.05) or choose(requests))
    with running(models) as (url, _):
        page.goto(url)
        page.fill("#text", "hello")
        page.click("#send")
        page.click("#stop")
        page.wait_for_selector("#send:enabled")
        assert page.locator(".about").first.inner_text().endswith("stopped")
        page.click("summary")
        page.fill("#max-tokens", "5000")
        with page.expect_response(lambda r: r.status == 400):
            page.fill("#text", "hello")
            page.click("#send")
        page.wait_for_selector("#send:enabled")
        assert "together at most 200" in page.locator(".about.failed").first.inner_text()


def test_curves_grow_and_reports_open(page, tmp_path):
    run = make_run(tmp_path / "runs" / MARKUP.replace("/", "")[:30])
    (run / "report.html").write_text("<title>R</title><p>a report</p>")
    with running(None, tmp_path / "runs") as (url, _):
        page.goto(url)
        page.wait_for_selector("#curves polyline")
        assert page.locator("#run h2").inner_text() == run.name and page.locator("#to-chat").is_hidden()
        assert "step 3" in page.locator("#curves output").first.inner_text()
        with open(run / "metrics.jsonl", "a") as file:
            file.write(step(4, val_loss=0.5) + step(5))
        page.wait_for_selector("#curves circle")
        assert "finished, step 5 of 5" in page.locator("#state").inner_text()
        assert "validation 0.5" in page.locator("#curves output").first.inner_text()
        with page.context.expect_page() as opened:
            page.click("#reports a")
        opened.value.wait_for_load_state()
        assert opened.value.locator("p").inner_text() == "a report"
        opened.value.close()


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_nothing_is_wider_than_the_screen(page, models, tmp_path, width):
    make_run(tmp_path / ("a-run-with-a-name-that-is-long" * 3))
    with running(models, tmp_path) as (url, _):
        page.set_viewport_size({"width": width, "height": 700})
        page.goto(url)
        page.wait_for_selector("#chat:not([hidden])")
        say(page, "x" * 100)
        for part in ("chat", "runs"):
            page.click(f"#to-{part}")
            assert page.evaluate("() => document.documentElement.scrollWidth") <= width, part
        page.wait_for_selector("#curves polyline")


def test_the_page_asks_for_the_key_and_keeps_it(page, models, tmp_path):
    make_run(tmp_path / "run")
    with running(models, tmp_path, Guards(key="sesame")) as (url, _):
        page.goto(url)
        for key in ("wrong", "sesame"):
            page.wait_for_selector("#lock[open]")
            with page.expect_response("**/key"):
                page.fill("#key", key)
                page.click("#lock button")
        page.wait_for_selector("#chat:not([hidden])")
        say(page, "hello")
        assert page.locator(".answer").count() == 2 and all(page.locator(".answer").all_inner_texts())
        page.click("#to-runs")
        page.wait_for_selector("#curves polyline")
        page.reload()
        page.wait_for_selector("#chat:not([hidden])")
        assert (
            json.dumps(page.evaluate("() => [document.cookie, {...localStorage}, {...sessionStorage}]"))
            == '["", {}, {}]'
        )
