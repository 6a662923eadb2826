"""Pages on runs: what makes runs incomparable is said, what is said is true, and no text of a model becomes markup."""

import json
import math
import os
import re
import shutil
import tracemalloc

import numpy as np
import pytest
import torch
from seen import Seen

from minilora.__main__ import main
from minilora.checkpoint.adapter import load_adapter
from minilora.checkpoint.factors import read_factors
from minilora.checkpoint.load import load_model
from minilora.config import to_yaml
from minilora.errors import DataError, Diverged, UsageError
from minilora.files.atomic import locked
from minilora.lora import adapters
from minilora.report.answers import disagreement
from minilora.report.caveats import caveats, over_the_limit
from minilora.report.charts import Axis, Level, Series, heat_map, histogram, line_chart
from minilora.report.compare import compare, comparison
from minilora.report.page import Document
from minilora.report.record import Record, read_record
from minilora.report.run_page import report
from minilora.report.verdict import reading, verdict
from minilora.settings import resolve

HOSTILE = "</script><script>alert(1)</script><img src=https://evil.example/x onerror=alert(1)>'\"`|*&amp;\u202e"


def assert_harmless(page: str) -> None:
    seen = Seen(page).elements
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
        lines.append(
            {
                "step": i,
                "loss": loss,
                "lr": 1e-3,
                "grad_norm": 1.5 - i / 100,
                "tokens": 100,
                "target_tokens": 40,
                "tokens_per_second": 50.0,
                "memory_gb": 1.0,
                "time": i * 2.0,
                **more,
            }
        )
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
    rows = [
        {
            "row": i,
            "prompt": "p",
            "predict": a,
            "label": label,
            "question": f"q{i}",
            "where": f"test.json, row {i + 1}",
            "tokens": len(a),
            "label_tokens": len(label) + 1,
            "cut": False,
        }
        for i, a in enumerate(answers)
    ]
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


def test_lengths_of_more_rows_than_memory_are_drawn(tmp_path):
    run = read_record(make_run(tmp_path / "run"))
    run.data["masked_lengths"] = {"5": 3 * 10**11, "9": 10**11}
    lengths = run.lengths("masked")
    assert 10**6 < len(lengths) <= 10**7 + 2 and abs(float((lengths == 5).mean()) - 0.75) < 1e-6


def test_losses_of_another_beta_or_base_have_no_lowest(tmp_path):
    """A smaller beta is a smaller loss, whatever was learned."""
    val = [(0, 0.69), (40, 0.5)]
    runs = [make_run(tmp_path / f"b{beta}", val=val, objective="dpo", beta=beta) for beta in (0.1, 0.2)]
    assert "another objective, or with another beta" in told(*runs)
    compare([str(run) for run in runs], tmp_path / "compare.html")
    assert "has the lowest validation loss" not in (tmp_path / "compare.md").read_text()
    same = [
        make_run(tmp_path / name, val=[(0, 0.69), (40, loss)], beta=beta)
        for name, loss, beta in (("x", 0.4, 0.1), ("y", 0.5, 0.2))
    ]
    assert told(*same).count("beta") == 0
    compare([str(run) for run in same], tmp_path / "same.html")
    assert "has the lowest validation loss" in (tmp_path / "same.md").read_text()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"decoding": {"max_tokens": 50, "temperature": 0.9, "greedy": False}}, "decoded in another way"),
        ({"decoding": {"max_tokens": 50, "temperature": 0.9, "greedy": False}}, "drawn at random"),
        ({"decoding": {"max_tokens": 20, "greedy": True}}, "max_tokens 50 and 20"),
        ({"dtype": "float32"}, "A and B answered in bfloat16 and in float32"),
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
        (b / "trained_rows.u64").write_bytes(np.array(sorted(pairs), "<u8").tobytes())
        return told(a, b)

    assert trained_on((1, 1), (2**63 - 1, 5)) == ""
    assert "B was trained on the questions of 2 of 120 test rows, all of them with" in trained_on(*hashes[3:5], (1, 1))
    assert "of 3 of 120 test rows, 1 of them" in trained_on(hashes[0], (2**63 + 1, 7), (2**63 + 2, 8))
    os.truncate(b / "trained_rows.u64", 1 << 36)  # a hole, more than memory holds: only where a hash would be is looked
    assert told(a, b) == ""
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
    assert "C is not finished: 40 of 99 steps" in told(a, b, c)
    assert told(a, b, c).count("were trained on other rows") == 1  # one sentence for all pairs
    assert "A and C, B and C were trained on other rows" in told(a, b, c)
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
    assert re.search(r"\| exact \| 50\.00 +\(4\d\.\d\d to [56]\d\.\d\d\) \| \*\*100\.00", text)
    assert re.search(r"\| exact \| \+50\.00 +\(\+4\d\.\d\d to \+[56]\d\.\d\d\) \| 0\.001 \|", text)
    # 5 tokens each: over the limit of 4, within 8
    assert "A: 120 of 120 test references (100 %) are longer than its max\\_target\\_length of 4" in text
    assert "B: 0 of 120 test references (0 %) are longer than its max\\_target\\_length of 8" in text
    assert "2 over max\\_target\\_length 4, 1 empty answer" in text and "chance alone would hardly give that" in text
    page = (tmp_path / "page.html").read_text()
    assert_harmless(page)
    assert page.count('<figure class="chart"') == 5 and page.count('id="rate"') == 1


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
    assert "\u202e" not in (tmp_path / "page.md").read_text()
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
    "unlearns": ([4 * 0.95**i for i in range(60)], [(0, 2.0), (60, 2.6)], "never better than before training"),
    "short": ([2.0] * 5, [], "too few to read"),
    "spike": ([2.0] * 30 + [9.0] + [2.0] * 30, [], "first: step 31"),
}


def test_what_is_equal_is_not_called_the_best(tmp_path):
    val = [(0, 0.5), (40, 0.5)]
    a, b, c = (make_run(tmp_path / name, answers=["一个答案"] * 9, val=val) for name in "abc")
    found = "\n".join(compare([str(a), str(b)], tmp_path / "page.html"))
    assert "A and B have the same score on the test set: rougeL_char 100.00" in found and "B is as high as A" in found
    assert "A and B have the same validation loss: 0.5." in found and "worst" not in found and "worse" not in found
    assert "Training did not lower the validation loss: 0.5 before it" in verdict(read_record(a))
    write_answers(c / "predict", ["别的"] * 9)
    found = "\n".join(compare([str(a), str(b), str(c)], tmp_path / "page.html"))
    assert "A and B have the same highest score" in found and "has the" not in found


@pytest.mark.parametrize("name", CURVES)
def test_reading_a_curve(tmp_path, name):
    losses, val, said = CURVES[name]
    run = read_record(make_run(tmp_path / "run", losses=losses, val=val))
    text = " ".join(reading(run))
    assert said in text
    assert ("over-fitting looks" in text) == (name == "over-fits")
    words = {"over-fits": "over-fitted", "unlearns": "made it worse", "fits": "Training helped", "broken": "diverged"}
    assert words.get(name, "The training loss") in verdict(run)
    assert report(tmp_path / "run").is_file()


def test_adapter_norms_are_those_of_the_product(tmp_path, monkeypatch):
    from tiny import make_model, make_rows

    model, rows = make_model(tmp_path / "model"), make_rows(tmp_path / "rows.json")
    run, pages = tmp_path / "run", []
    monkeypatch.setattr("minilora.train.REFRESH", -1)  # at every checkpoint, however soon
    for module in ("train", "run.ending"):
        monkeypatch.setattr(
            f"minilora.{module}.report_quietly", lambda folder: pages.append(report(folder).read_text())
        )
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
        "--save-every",
        "5",
    ]
    assert main(["train", *map(str, words)]) == 0
    # the page is there while the run goes on, and says so
    assert [re.findall(r"going on: step (\d+) of 12", page)[:1] for page in pages] == [["5"], ["10"], []]
    assert [page.count('http-equiv="refresh"') for page in pages] == [1, 1, 0]
    assert_harmless(pages[-1])
    made = read_record(run).data["machine"]
    for text in (f"torch {torch.__version__}", f"minilora {made['minilora']}", made["device"], "parameters", "MB"):
        assert text in pages[-1]
    decoder = load_model(model, torch.float64, "cpu")
    load_adapter(decoder, run / "adapter")
    found = {path: factors.norm for path, factors in read_factors(run / "adapter").items()}
    wanted = {
        path: float((w.scale * w.lora_B.detach().double() @ w.lora_A.detach().double()).norm())
        for path, w in adapters(decoder)
    }
    assert found == pytest.approx(wanted, rel=1e-6) and all(wanted.values())
    assert main(["report", str(run), "--samples", "2"]) == 0
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 and any(s["before"] != s["after"] for s in samples)
    opened = []
    monkeypatch.setattr(
        "minilora.checkpoint.open_model.load_model",
        lambda *args, **more: opened.append(more["quant"]) or load_model(*args, **more),
    )
    made = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(made.replace("quant: keep", "quant: int8"))
    assert main(["report", str(run), "--samples", "2"]) == 0 and opened == ["int8"]  # on the bits of the training
    (run / "config.yaml").write_text(made)
    record = read_record(run)
    assert record.finished and record.data["train_rows"] == 14 and sum(record.data["trained_lengths"].values()) == 14
    assert record.data["tokens"] == sum(
        int(n) * c for k in ("masked_lengths", "trained_lengths") for n, c in record.data[k].items()
    )


def test_a_run_that_ends_early_leaves_no_page_that_says_it_goes_on(tmp_path, monkeypatch):
    from tiny import make_model, make_rows

    from minilora import train

    model, rows, run = make_model(tmp_path / "model"), make_rows(tmp_path / "rows.json"), tmp_path / "run"
    monkeypatch.setattr(train, "REFRESH", -1)
    step, seen = train.train_step, []

    def breaks(*args):
        if args[4] == 3:
            seen.append((run / "report.html").read_text())
            raise Diverged("the loss is not finite", "lower --lr")
        return step(*args)

    monkeypatch.setattr(train, "train_step", breaks)
    words = ["--model", model, "--data", rows, "--output", run, "--max-steps", 9, "--save-every", 1, "--device", "cpu"]
    assert main(["train", *map(str, words)]) == Diverged.code
    page = (run / "report.html").read_text()
    assert "going on: step 3 of 9" in seen[0] and "was stopped: step 3 of 9" in page
    assert 'http-equiv="refresh"' in seen[0] and 'http-equiv="refresh"' not in page


def test_the_page_of_a_long_run_takes_few_bytes_a_step(tmp_path):
    peaks = []
    for steps in (600, 1600):
        make_run(tmp_path / str(steps), losses=[1.0 + i % 7 for i in range(steps)], val=[(0, 3.0), (9, 2.0)])
        report(tmp_path / str(steps))  # what is loaded once
        tracemalloc.start()
        report(tmp_path / str(steps))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 1000 < 250  # 13 columns of 8 bytes, smoothed ones, and one that is sorted


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
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": "low"}\n')
    with pytest.raises(DataError, match="metrics.jsonl: a file of this run holds what no run writes"):
        read_record(run)


def pointed_at(figure: str) -> dict:
    """What a chart's values under the pointer are read from."""
    return next(json.loads(a["data-values"]) for tag, a in Seen(figure).elements if tag == "figure")


def test_the_report_says_what_matters_first(tmp_path):
    val = [(0, 4.0), (20, 1.5), (40, 1.6)]
    run = make_run(tmp_path / "run", val=val, answers=["一个答案"] * 4, lr=5e-4, define={"name": "A"}, lora_dropout=0.1)
    page = report(run).read_text()
    assert_harmless(page)
    said = [
        'class="verdict">Training helped up to step 20, then it over-fitted', "best validation loss</dt><dd>1.5000</dd>",
        "at step 20 of 40</dd>", "tokens trained</dt><dd>1,600</dd>", "time</dt><dd>1:20</dd>", "peak memory</dt><dd>1.00 GB</dd>",
        "What the curve says", "<figure", '<td class="best">1.5000 (best)</td>', "<h2>Settings",
        "<tr><td>define</td><td>name=A</td><td>none</td></tr>", "<tr><td>lora_dropout</td><td>0.1</td><td>0</td></tr>",
        "<tr><td>lr</td><td>0.0005</td><td>0.0002</td></tr>", "settings that are the default",
        "<tr><td>clip</td><td>1</td></tr>",
    ]  # fmt: skip
    places = [page.find(text) for text in said]
    assert -1 not in places and places == sorted(places), said[places.index(-1)] if -1 in places else places
    for cell in ("None", "False", "True", "{}", ""):
        assert f"<td>{cell}</td>" not in page
    # tables scroll by themselves, never the page
    assert page.count("<table>") == page.count('<div class="wide"><table>') > 2


def test_validation_and_training_differ_in_dash_and_in_colour(tmp_path):
    page = report(make_run(tmp_path / "run", val=[(0, 4.0), (40, 1.5)])).read_text()
    loss = page[page.index("<figure") : page.index("</figure>")]
    lines = [attrs for tag, attrs in Seen(loss).elements if tag == "polyline"]
    looks = [(a["stroke"], a.get("stroke-dasharray")) for a in lines]
    assert looks[0] == looks[1] and all(x != y for x, y in zip(looks[1], looks[2], strict=True))
    # the legend is drawn in the same looks, and every line can be told under the pointer
    legend = [
        (a["stroke"], a.get("stroke-dasharray"))
        for tag, a in Seen(loss).elements
        if tag == "line" and a.get("x2") == "30"
    ]
    assert legend == looks and pointed_at(loss)["series"][2] == [[0, 4.0], [40, 1.5]]
    assert len({Series("", (), i).stroke for i in range(16)}) == 16


def test_a_run_that_goes_on_draws_no_conclusion_from_its_end(tmp_path, capsys):
    run = make_run(tmp_path / "run", losses=[2.0] * 40, val=[(0, 1.0), (20, 1.5), (40, 1.8)])
    data = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps(data | {"steps": 200}))
    conclusions = re.compile("change little|converged|over-fit|at the end|made it worse|best before training")
    with locked(run):
        assert main(["report", str(run)]) == 0
        told, page = capsys.readouterr().out, (run / "report.html").read_text()
        assert "going on" in told and not conclusions.search(told)
        assert "going on: step 40 of 200" in page and '<meta http-equiv="refresh"' in page
        text = page.partition("<h1>")[2].partition("<script>")[0]
        assert not conclusions.search(text), conclusions.search(text)
        other = make_run(tmp_path / "other", val=[(0, 1.0), (40, 0.5)])
        compared = comparison([read_record(folder) for folder in (run, other)]).markdown()
        assert "is going on: 40 of 200 steps" in compared and "made it worse" not in compared
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "was stopped: step 40 of 200" in page and 'http-equiv="refresh"' not in page and "change little" not in page
    (run / "data.json").write_text(json.dumps(data))
    assert "change little" in " ".join(reading(read_record(run)))


def test_made_worse_stands_in_compare_as_in_report(tmp_path, capsys):
    worse = make_run(tmp_path / "worse", val=[(0, 1.0), (20, 1.5), (40, 1.8)])
    better = make_run(tmp_path / "better", val=[(0, 1.0), (20, 0.5), (40, 0.4)])
    assert "Training made it worse" in report(worse).read_text() and "made it worse" not in report(better).read_text()
    assert main(["compare", str(worse), str(better), "--output", str(tmp_path / "page.html")]) == 0
    assert "before training</dd>" in (worse / "report.html").read_text()
    assert "A: Training made it worse" in capsys.readouterr().out
    page, text = (tmp_path / "page.html").read_text(), (tmp_path / "page.md").read_text()
    for said in ("B has the lowest validation loss: 0.4 at step 40 (A 1)", "A: Training made it worse"):
        assert 0 < page.find(said) < page.index("<table") and 0 < text.find(said) < text.index("| --- |")
    assert '<td class="best">0.4000 at step 40</td>' in page and "| 1.0000 at step 0 | **0.4000 at step 40** |" in text


def test_compare_gives_its_verdict_then_what_differs_and_marks_the_best(tmp_path):
    a = make_run(tmp_path / "a", answers=MANY, lr=1e-3)
    b = make_run(tmp_path / "b", answers=["一个答案"] * 120, lr=2e-3)
    compare([str(a), str(b)], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    order = ['class="verdict">B has the highest score on the test set', "chance alone would hardly give that", "A is a, B is b.",
             "What differs", "<td>lr</td>", ">Runs<", 'class="best">100.00', "Differences from A", "What the metrics count"]  # fmt: skip
    places = [page.find(text) for text in order]
    assert -1 not in places and places == sorted(places), list(zip(order, places, strict=True))
    assert page.count("What the metrics count") == 1 and page.count("ROUGE-L F of characters, the same way") == 1
    assert page.count('<div class="sides">') == 30  # a row's reference and answers, beside each other
    sides = page.partition('<div class="sides">')[2].partition('<div class="sides">')[0]
    assert [text.split(" (")[0] for text in re.findall(r'class="dim">([^<]+)<', sides)] == ["reference", "A: a", "B: b"]
    # lengths that are the same are one line with both names
    assert "[[5,0" not in page and [
        len(json.loads(attrs["data-values"])["series"]) for tag, attrs in Seen(page).elements if tag == "figure"
    ] == [2, 2, 2, 1, 1]


def test_ticks_are_few_and_round():
    assert Axis(0, 9.6).ticks() == [0, 2, 4, 6, 8] and Axis(1, 30, log=True).ticks() == [1, 2, 5, 10, 20]
    for low, high in ((1e-7, 2e-4), (1, 1e12), (1, 1e300), (0.9, 1.1), (3, 3.01)):
        for log in (False, True):
            found = Axis(low, high, log).ticks()
            assert len(found) <= 9 and all(low <= v <= high for v in found)


def test_curves_along_tokens_and_time(tmp_path):
    run = read_record(make_run(tmp_path / "run", losses=[3.0, 2.0], val=[(0, 4.0), (2, 2.5)]))
    assert run.along(run.loss, "tokens") == [(100, 3.0), (200, 2.0)]
    assert run.along(run.val, "time") == [(0, 4.0), (4.0, 2.5)]


def test_charts_hold_what_they_are_given():
    points = [(float(i), float(np.sin(i / 50))) for i in range(5000)]
    points[1234] = (1234.0, 50.0)  # one spike among thousands of points is drawn
    svg = line_chart([Series("a", points)], "x", "y")
    drawn = [tuple(map(float, p.split(","))) for p in re.findall(r'points="([^"]+)"', svg)[0].split()]
    assert len(drawn) < 1100 and min(y for _, y in drawn) < 60  # of 1000: the top of the canvas
    assert max(y for _, y in pointed_at(svg)["series"][0]) == 50  # and told under the pointer
    svg = line_chart([Series("a", [(1, math.nan), (2, math.inf), (3, -1.0)])], "x", "y", log=True)
    assert "no y to draw" in svg and "no x to draw" in histogram({"a": np.array([], int)}, "x")
    assert 'class="number"' not in heat_map({("q", "0"): 2.0, ("k", "1"): 0.0}, "layer", "module")
    assert "&lt;b&gt;" in histogram({"a": np.array([3])}, "x", [Level(4, "<b>")])


def test_markdown_and_html_say_the_same():
    page = Document("a <b> | c")
    page.table(["x|y"], [["`code` *star*"], [1234567]])
    page.verbatim("```\nfence")
    assert "# a \\<b\\> \\| c" in page.markdown() and "| 1,234,567 |" in page.markdown()
    assert "````\n```\nfence\n````" in page.markdown() and "1,234,567" in page.html()
    assert Record("r", None).best is None  # pyright: ignore[reportArgumentType]
