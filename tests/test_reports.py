"""Pages on runs: what makes runs incomparable is said, what is said is true, and no text of a model becomes markup."""

import html.parser
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch

from minilora.__main__ import main
from minilora.adapter import load_adapter
from minilora.checkpoint import load_model
from minilora.config import resolve, to_yaml
from minilora.errors import DataError, UsageError
from minilora.lora import adapters
from minilora.reports.caveats import caveats
from minilora.reports.charts import Level, Series, heat_map, histogram, line_chart
from minilora.reports.compare import compare, comparison, disagreement, over_the_limit
from minilora.reports.document import Document
from minilora.reports.record import Record, read_record
from minilora.reports.report import adapter_norms, reading, report

HOSTILE = "</script><script>alert(1)</script><img src=https://evil.example/x onerror=alert(1)>'\"`|*&amp;\u202e"


class Seen(html.parser.HTMLParser):
    """The tags of a page with their attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def assert_harmless(page: str) -> None:
    seen = Seen(page).tags
    names = {tag for tag, _ in seen}
    assert not names & {"img", "iframe", "link", "object", "embed", "form", "base", "audio", "video", "image", "use"}
    assert not [
        a for _, attrs in seen for a in attrs if a.startswith("on") or a in ("src", "href", "srcdoc", "xlink:href")
    ]
    assert [attrs for tag, attrs in seen if tag == "script" and attrs.get("type") != "application/json"] in ([], [{}])
    assert not re.search(r"@import|url\(", page) and len(page.encode()) < 2_000_000


def make_run(folder, losses=None, val=(), answers=None, label="一个答案", **settings):
    """A run folder as train and predict leave it, without a model."""
    folder.mkdir(parents=True)
    config = resolve({"model": "m", "data": "train.json", "output": folder}, settings)
    (folder / "config.yaml").write_text(to_yaml(config))
    losses = [3.0 * 0.93**i + 0.02 * (-1) ** i for i in range(40)] if losses is None else losses
    lines = [{"step": s, "val_loss": v} for s, v in val if s == 0]
    for i, loss in enumerate(losses, 1):
        more = {"val_loss": dict(val)[i]} if i in dict(val) else {}
        lines.append({"step": i, "loss": loss, "lr": 1e-3, "grad_norm": 1.5 - i / 100, "tokens": 100, "target_tokens": 40,
                      "tokens_per_second": 50.0, "memory_gb": 1.0, "time": i * 2.0, **more})  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"rows": 10, "dropped": {"over max_target_length 4": 2, "empty answer": 1}, "cut": {}, "train_rows": 8, "val_rows": 0, "tokens": 1000,
            "trained": 400, "masked_lengths": {"5": 3, "9": 5}, "trained_lengths": {"4": 8}, "steps": len(losses),
            "train_hash": "t", "val_hash": "v", "base": "b"}  # fmt: skip
    (folder / "data.json").write_text(json.dumps(data))
    if answers is not None:
        write_answers(folder / "predict", answers, label)
    return folder


def write_answers(folder, answers, label="一个答案", **settings):
    folder.mkdir(exist_ok=True, parents=True)
    rows = [{"row": i, "prompt": "p", "predict": a, "label": label, "question": f"q{i}", "where": f"test.json, row {i + 1}",
             "tokens": len(a), "label_tokens": len(label) + 1, "cut": False} for i, a in enumerate(answers)]  # fmt: skip
    (folder / "generated_predictions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    decoding = {"max_tokens": 50, "greedy": True}
    results = {"metrics": {"exact": {"value": 1, "definition": "d"}},
               "settings": {"data": "test.json", "dtype": "bfloat16", "decoding": decoding} | settings}  # fmt: skip
    (folder / "predict_results.json").write_text(json.dumps(results))


def told(*folders) -> str:
    runs = [read_record(f) for f in folders]
    for run, letter in zip(runs, "ABC", strict=False):
        run.name = f"{letter}: {run.name}"
    return "\n".join(caveats(runs))


MANY = ["一个答案"] * 60 + ["别的"] * 60


def test_runs_that_compare_are_not_warned_of(tmp_path):
    a, b = (make_run(tmp_path / name, answers=MANY) for name in "ab")
    assert told(a, b) == ""


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"decoding": {"max_tokens": 50, "temperature": 0.9, "greedy": False}}, "decoded in another way"),
        ({"decoding": {"max_tokens": 50, "temperature": 0.9, "greedy": False}}, "drawn at random"),
        ({"decoding": {"max_tokens": 20, "greedy": True}}, "max_tokens 50 and 20"),
        ({"dtype": "float32"}, "A answered in bfloat16, B in float32"),
        ({"data": "train.json"}, "B was trained on the file that it is tested on"),
    ],
)
def test_other_decoding_is_told(tmp_path, settings, said):
    a, b = (make_run(tmp_path / name, answers=MANY) for name in "ab")
    write_answers(b / "predict", MANY, **settings)
    assert said in told(a, b)


def test_trained_on_test_rows_is_told_by_the_rows(tmp_path):
    a, b = (make_run(tmp_path / name, answers=MANY) for name in "ab")
    path = b / "predict" / "generated_predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    hashes = [(2**63 + i, 2**62 + i) for i in range(len(rows))]
    lines = [
        json.dumps(r | {"hashes": [f"{h:016x}" for h in pair]}) + "\n" for r, pair in zip(rows, hashes, strict=True)
    ]
    path.write_text("".join(lines))

    def trained_on(*pairs) -> str:
        (b / "trained_rows.u64").write_bytes(np.array(pairs, "<u8").tobytes())
        return told(a, b)

    assert trained_on((1, 1), (2**63 - 1, 5)) == ""
    assert "B was trained on the questions of 2 of 120 test rows, all of them with" in trained_on(*hashes[3:5], (1, 1))
    assert "of 3 of 120 test rows, 1 of them" in trained_on(hashes[0], (2**63 + 1, 7), (2**63 + 2, 8))
    (b / "trained_rows.u64").write_bytes(b"cut")
    with pytest.raises(DataError, match="is damaged"):
        read_record(b)


def test_other_rows_metrics_and_unfinished_runs_are_told(tmp_path):
    a, b, c = (make_run(tmp_path / name, answers=MANY) for name in "abc")
    write_answers(b / "predict", MANY, label="一个")
    assert "A and B answered other test rows" in told(a, b)
    runs = [read_record(a), read_record(b)]
    assert "Differences from" not in comparison(runs).markdown()  # no p across other rows
    results = json.loads((c / "predict" / "predict_results.json").read_text())
    results["metrics"]["exact"]["definition"] = "another"
    (c / "predict" / "predict_results.json").write_text(json.dumps(results))
    assert "scored by another metric when they were predicted (exact)" in told(a, c)
    data = json.loads((c / "data.json").read_text())
    (c / "data.json").write_text(json.dumps(data | {"steps": 99, "train_hash": "u"}))
    assert "C is not finished: 40 of 99 steps" in told(a, b, c) and "A and C were trained on other rows" in told(
        a, b, c
    )
    shutil.rmtree(b / "predict")
    assert "B answered no test set" in told(a, b)
    few = make_run(tmp_path / "few", answers=["x"] * 5)
    assert "fewer than 100 test rows" in told(few, few)
    validated = [make_run(tmp_path / n, val=[(0, 3.0), (40, 2.0)]) for n in ("v1", "v2")]
    (validated[1] / "data.json").write_text(json.dumps(data | {"steps": 40, "val_hash": "w"}))
    assert "their validation losses are not comparable" in told(*validated)


def test_the_page_says_what_differs_and_only_that(tmp_path):
    a = make_run(tmp_path / "a", answers=MANY, lr=1e-3, max_target_length=4)
    b = make_run(tmp_path / "b", answers=["一个答案"] * 120, lr=2e-3, max_target_length=8)
    assert main(["compare", str(a), str(b), "--output", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.md").read_text()
    section = text.partition("## What differs")[2].partition("##")[0]
    assert re.findall(r"^\| (\S+) \|", section, re.MULTILINE) == ["setting", "---", "max\\_target\\_length", "lr"]
    assert re.search(r"\| exact \| 50\.00 +\(4\d\.\d\d to [56]\d\.\d\d\) \| 100\.00", text)
    assert re.search(r"\| exact \| \+50\.00 +\(\+4\d\.\d\d to \+[56]\d\.\d\d\) \| 0\.001 \|", text)
    # 5 tokens each: over the limit of 4, within 8
    assert "A: 120 of 120 test references (100 %) are longer than its max\\_target\\_length of 4" in text
    assert "B: 0 of 120 test references (0 %) are longer than its max\\_target\\_length of 8" in text
    assert "2 over max\\_target\\_length 4, 1 empty answer" in text and "chance alone would hardly give that" in text
    page = (tmp_path / "page.html").read_text()
    assert_harmless(page)
    assert page.count("<svg viewBox") == 5 and page.count('id="rate"') == 1


def test_limits_count_references(tmp_path):
    run = read_record(make_run(tmp_path / "r", answers=["a"] * 3, max_target_length=5))
    for row, tokens in zip(run.rows, (5, 6, 50), strict=True):
        row["label_tokens"] = tokens
    assert "2 of 3 test references (67 %)" in over_the_limit([run])[0] and "longest has 50" in over_the_limit([run])[0]


def test_hostile_texts_stay_texts(tmp_path):
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    a = make_run(folder, answers=[HOSTILE] * 3, label=HOSTILE, define={"name": HOSTILE}, lora_targets=HOSTILE)
    b = make_run(tmp_path / "b", answers=["x"] * 3, label=HOSTILE)
    (a / "samples.jsonl").write_text(
        json.dumps({k: HOSTILE for k in ("question", "label", "before", "after", "where")})
    )
    compare([str(a), str(b)], tmp_path / "page.html")
    for page in ((tmp_path / "page.html").read_text(), report(a).read_text()):
        assert_harmless(page)
        assert "alert(1)" in page  # it is there, as text
    markdown = re.sub(r"^```+\n.*?\n```+$", "", (tmp_path / "page.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"(?<!\\)<", markdown)


def test_long_answers_keep_the_page_small(tmp_path):
    answers = [f"{i}" + "好" * 900 for i in range(60)]
    folders = [make_run(tmp_path / name, answers=[name + x for x in answers], label="好" * 900) for name in "ab"]
    for folder in folders:
        (folder / "predict" / "generated_predictions.jsonl").write_text(
            "".join(
                json.dumps({"predict": a, "label": "好" * 900, "question": "问" * 3000, "where": "w"}) + "\n"
                for a in answers
            )
        )
    page = comparison([read_record(f) for f in folders])
    assert len(page.html().encode()) < 2_000_000 and "more characters" in page.markdown()


def test_disagreement_sorts_what_differs():
    assert disagreement(["同样", "同样"]) == 0 and disagreement(["甲", "乙"]) == 100
    assert 0 < disagreement(["今天很好", "今天不好"]) < 100


CURVES = {
    "falls": ([4 * 0.99**i for i in range(60)], [], "still falls"),
    "level": ([1 + 3 * 0.7**i + 0.05 * math.sin(i * 2) for i in range(60)], [], "level within its scatter"),
    "rises": ([1.0] * 40 + [1 + 0.05 * i for i in range(40)], [], "may be diverging"),
    "broken": ([2.0] * 20 + [math.nan], [], "not finite from step 21"),
    "over-fits": ([4 * 0.95**i for i in range(60)], [(0, 4.0), (20, 2.0), (40, 2.2), (60, 2.6)], "best at step 20"),
    "fits": ([4 * 0.95**i for i in range(60)], [(0, 4.0), (20, 2.0), (60, 1.5)], "no over-fitting is seen"),
    "unlearns": ([4 * 0.95**i for i in range(60)], [(0, 2.0), (60, 2.6)], "best before training"),
    "short": ([2.0] * 5, [], "too few to read"),
    "spike": ([2.0] * 30 + [9.0] + [2.0] * 30, [], "first: step 31"),
}


@pytest.mark.parametrize("name", CURVES)
def test_reading_a_curve(tmp_path, name):
    losses, val, said = CURVES[name]
    run = read_record(make_run(tmp_path / "run", losses=losses, val=val))
    text = " ".join(reading(run))
    assert said in text
    assert ("over-fitting looks" in text) == (name == "over-fits")
    assert report(tmp_path / "run").is_file()


def test_adapter_norms_are_those_of_the_product(tmp_path):
    from tiny import make_model, make_rows

    model, rows = make_model(tmp_path / "model"), make_rows(tmp_path / "rows.json")
    run = tmp_path / "run"
    words = [
        "--model",
        model,
        "--data",
        rows,
        "--output",
        run,
        "--max-steps",
        "12",
        "--lora-r",
        "3",
        "--rslora",
        "on",
        "--device",
        "cpu",
    ]
    assert main(["train", *map(str, words)]) == 0
    assert_harmless((run / "report.html").read_text())
    decoder = load_model(model, torch.float64, "cpu")
    load_adapter(decoder, run / "adapter")
    found = adapter_norms(run / "adapter")
    wanted = {
        path: float((w.scale * w.lora_B.detach().double() @ w.lora_A.detach().double()).norm())
        for path, w in adapters(decoder)
    }
    assert found == pytest.approx(wanted, rel=1e-6) and all(wanted.values())
    assert main(["report", str(run), "--samples", "2"]) == 0
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 and any(s["before"] != s["after"] for s in samples)
    record = read_record(run)
    assert record.finished and record.data["train_rows"] == 14 and sum(record.data["trained_lengths"].values()) == 14
    assert record.data["tokens"] == sum(
        int(n) * c for k in ("masked_lengths", "trained_lengths") for n, c in record.data[k].items()
    )


def test_folders_that_are_no_runs(tmp_path):
    with pytest.raises(UsageError, match="is not there"):
        read_record(tmp_path / "none")
    with pytest.raises(UsageError, match="neither a run nor a prediction"):
        read_record(tmp_path)
    run = make_run(tmp_path / "run", answers=["a"])
    with pytest.raises(UsageError, match="one run cannot be compared"):
        compare([str(run)], tmp_path / "page.html")
    (run / "predict" / "generated_predictions.jsonl").write_text('{"predict": 1}\n')
    with pytest.raises(DataError, match="damaged"):
        read_record(run)


def test_curves_along_tokens_and_time(tmp_path):
    run = read_record(make_run(tmp_path / "run", losses=[3.0, 2.0], val=[(0, 4.0), (2, 2.5)]))
    assert run.along(run.loss, "tokens") == [(100, 3.0), (200, 2.0)]
    assert run.along(run.val, "time") == [(0, 4.0), (4.0, 2.5)]


def test_charts_hold_what_they_are_given():
    points = [(float(i), float(np.sin(i / 50))) for i in range(5000)]
    points[1234] = (1234.0, 50.0)  # one spike among thousands of points is drawn
    svg = line_chart([Series("a", points)], "x", "y")
    drawn = [tuple(map(float, p.split(","))) for p in re.findall(r'points="([^"]+)"', svg)[0].split()]
    assert len(drawn) < 1100 and min(y for _, y in drawn) < 30  # the top of the canvas
    svg = line_chart([Series("a", [(1, math.nan), (2, math.inf), (3, -1.0)])], "x", "y", log=True)
    assert "no y to draw" in svg and "no x to draw" in histogram([{}], ["a"], "x")
    assert 'class="number"' not in heat_map({("q", "0"): 2.0, ("k", "1"): 0.0}, "layer", "module")
    assert "&lt;b&gt;" in histogram([{3: 1}], ["<b>"], "x", [Level(5, "<b>")])


def test_markdown_and_html_say_the_same():
    page = Document("a <b> | c")
    page.table(["x|y"], [["`code` *star*"], [1234567]])
    page.verbatim("```\nfence")
    assert "# a \\<b\\> \\| c" in page.markdown() and "| 1,234,567 |" in page.markdown()
    assert "````\n```\nfence\n````" in page.markdown() and "1,234,567" in page.html()
    assert Record("r", None).best is None  # pyright: ignore[reportArgumentType]
