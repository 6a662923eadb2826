"""minilora predict: the files, one answer after the other, going on, and what it refuses."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import make_model, make_rows

import minilora
from minilora.__main__ import main
from minilora.config import PLAIN
from minilora.console import Console
from minilora.errors import DataError, OutputInUse, Stopped
from minilora.generate import reply
from minilora.machine import compute
from minilora.report.compare import compare
from minilora.report.record import read_json_file
from minilora.rows import read_rows, trainable
from minilora.rows.questions import read_questions
from minilora.rows.render import render_row
from minilora.rows.shapes import QUESTIONS
from minilora.text.tokenizer import load_tokenizer
from minilora.tools import predict as predict_module
from minilora.tools.predict import PART, RESULTS, ROWS, predict

QUIET = Console(quiet=True)
GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizers"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    make_model(folder / "model")
    make_rows(folder / "rows.json")
    return folder


@pytest.fixture(scope="module")
def made(work):
    return predict(work / "model", work / "rows.json", work / "out", max_tokens=12, batch=4, console=QUIET)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_are_those_of_one_question_alone(work, made):
    model, tokenizer = minilora.load_model(work / "model", device="cpu"), minilora.load_tokenizer(work / "model")
    rows = json.loads((work / "rows.json").read_text())
    found = lines(work / "out" / ROWS)
    assert len(found) == len(rows)
    for row, wanted in zip(found[:-1], rows, strict=False):
        assert row["label"] == wanted["output"] and row["question"] == wanted["instruction"]
        chat = [{"role": "user", "content": wanted["instruction"]}]
        assert row["predict"] == "".join(reply(model, tokenizer, chat, 12))
        assert wanted["instruction"] in row["prompt"] and row["prompt"].endswith("<|im_start|>assistant\n")
    talk = found[-1]
    assert talk["label"] == "two" and "one<|im_end|>" in talk["prompt"] and talk["label_tokens"] == 4


def test_results_say_what_was_counted(work, made):
    results = json.loads((work / "out" / RESULTS).read_text())
    assert results == made and not (work / "out" / PART).exists()
    rows = lines(work / "out" / ROWS)
    assert results["rows"] == len(rows) and results["cut"] == sum(r["cut"] for r in rows) > 0
    assert results["predict_bleu-4"] == results["metrics"]["bleu4_char"]["value"]
    assert all(m["low"] <= m["value"] <= m["high"] and m["definition"] for m in results["metrics"].values())
    assert results["settings"]["decoding"] == {
        "max_tokens": 12,
        "stop": results["settings"]["decoding"]["stop"],
        "greedy": True,
    }


class StopInside:
    """A signal that comes when some passes are done and answers are open."""

    name, asked, passes = "SIGTERM", 0, 4

    @property
    def requested(self):
        self.asked += 1
        return self.asked > self.passes

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_a_stopped_prediction_goes_on(work, made, tmp_path, monkeypatch):
    real, asked = predict_module.decode, []

    def counted(model, requests, slots):
        asked.append(len(requests))
        yield from real(model, requests, slots)

    monkeypatch.setattr(predict_module, "decode", counted)
    monkeypatch.setattr(predict_module, "StopSignal", StopInside)
    monkeypatch.setattr(StopInside, "passes", 14)
    arguments: dict[str, Any] = {"max_tokens": 12, "batch": 3, "console": QUIET}
    with pytest.raises(Stopped, match=r"after \d+ of 14"):
        predict(work / "model", work / "rows.json", tmp_path / "out", **arguments)
    kept = len(lines(tmp_path / "out" / PART)) - 1  # three answers of 12 tokens at a time, and 14 passes
    assert 0 < kept < 6
    monkeypatch.undo()
    monkeypatch.setattr(predict_module, "decode", counted)
    with open(tmp_path / "out" / PART, "a") as part:
        part.write('{"row": 5, "pred')  # a crash in the middle of a line
    with pytest.raises(OutputInUse, match="other weights, rows or decoding"):
        predict(work / "model", work / "rows.json", tmp_path / "out", max_tokens=11, console=QUIET)
    predict(work / "model", work / "rows.json", tmp_path / "out", **arguments)
    assert asked == [14, 14 - kept]
    assert (tmp_path / "out" / ROWS).read_bytes() == (work / "out" / ROWS).read_bytes()


def test_a_prediction_keeps_the_dtype_that_it_began_with(work, made, monkeypatch):
    """Beside other work a CPU may be measured otherwise."""
    monkeypatch.setattr(compute, "measured_rates", lambda *_: compute.Rates(2.0, 1.0))
    assert made["settings"]["dtype"] == "float32"
    again = predict(work / "model", work / "rows.json", work / "out", max_tokens=12, batch=4, console=QUIET)
    assert again == json.loads((work / "out" / RESULTS).read_text())


def test_draws_are_the_same_after_a_stop(work, tmp_path, monkeypatch):
    config = work / "model" / "generation_config.json"
    config.write_text('{"do_sample": true, "temperature": 1.0}')
    try:
        whole = predict(
            work / "model", work / "rows.json", tmp_path / "whole", max_tokens=6, sample=True, console=QUIET
        )
        monkeypatch.setattr(predict_module, "StopSignal", StopInside)
        with pytest.raises(Stopped, match="stopped by SIGTERM after"):
            predict(work / "model", work / "rows.json", tmp_path / "two", max_tokens=6, sample=True, console=QUIET)
        monkeypatch.undo()
        predict(work / "model", work / "rows.json", tmp_path / "two", max_tokens=6, sample=True, console=QUIET)
    finally:
        config.unlink()
    assert whole["settings"]["decoding"]["temperature"] == 1.0
    assert (tmp_path / "two" / ROWS).read_bytes() == (tmp_path / "whole" / ROWS).read_bytes()


def test_a_finished_prediction_is_not_made_twice(work, made, monkeypatch):
    monkeypatch.setattr(predict_module, "decode", None)
    again = predict(work / "model", work / "rows.json", work / "out", max_tokens=12, console=QUIET)
    assert again == made
    with pytest.raises(OutputInUse, match="other weights, rows or decoding"):
        predict(work / "model", work / "rows.json", work / "out", max_tokens=13, console=QUIET)
    with pytest.raises(OutputInUse, match="other weights, rows or decoding"):
        predict(work / "model", work / "rows.json", work / "out", max_tokens=12, console=QUIET, quant="nf4")


USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
WITHOUT_ANSWER = [
    {"messages": [USER]}, {"messages": [USER, {"role": "assistant", "content": " "}]}, {"conversations": [{"from": "human", "value": "q"}]},
    *({question: "q"} for question in QUESTIONS), {"instruction": "q", "input": "", "output": None}, {"question": "q", "answer": ""},
    {"content": "q", "summary": ""}, {"text": "q", "label": None}, [{"prompt": "q"}],
]  # fmt: skip


def test_rows_of_every_shape_are_answered_without_a_reference(work, tmp_path):
    tokenizer, path = minilora.load_tokenizer(work / "model"), tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"prompt": "q", "response": "a"}, *WITHOUT_ANSWER]))
    first, *others = read_questions(path, tokenizer)
    assert first.label == "a" and {(q.label, q.label_tokens) for q in others} == {("", 0)}
    assert {(tuple(q.ids), q.text) for q in others} == {(tuple(first.ids), "q")}
    talk = {"messages": [USER, ASSISTANT, USER], "system": "s"}
    path.write_text(json.dumps(talk) + "\n")
    ids, _ = tokenizer.render([{"role": "system", "content": "s"}, *talk["messages"]], prompt=True)
    assert read_questions(path, tokenizer)[0].ids == ids


def test_a_test_set_without_answers_is_answered_and_not_scored(work, tmp_path, capsys):
    (tmp_path / "some.jsonl").write_text(
        "".join(json.dumps({"instruction": q, "output": a}) + "\n" for q, a in ["qa", ("r", "")])
    )
    (tmp_path / "none.csv").write_text("question,id\nq,1\nr,2\n")
    words = ["predict", "--model", str(work / "model"), "--max-tokens", "2", "--data"]
    assert main([*words, str(tmp_path / "none.csv"), "--output", str(tmp_path / "none")]) == 0
    out = capsys.readouterr().out
    assert "2 rows without a reference answer" in out and "bleu" not in out
    assert main([*words, str(tmp_path / "some.jsonl"), "--output", str(tmp_path / "some")]) == 0
    out = capsys.readouterr().out
    assert "1 of 2 rows are scored, the others have no reference answer" in out and "bleu4_char" in out
    one = json.loads((tmp_path / "some.jsonl").read_text().splitlines()[0])
    (tmp_path / "one.jsonl").write_text(json.dumps(one) + "\n")
    alone = predict(work / "model", tmp_path / "one.jsonl", tmp_path / "one", max_tokens=2, console=QUIET)
    assert read_json_file(tmp_path / "some" / RESULTS)["metrics"] == alone["metrics"]
    for name, told in (("none", "2 of 2 of A, 2 of 2 of B"), ("some", "1 of 2 of A, 1 of 2 of B")):
        compare([str(tmp_path / name)] * 2, tmp_path / "page.html")
        text = (tmp_path / "page.md").read_text()
        assert told in text and "no reference" in text and ("rougeL" in text) == (name == "some")


def test_it_refuses_what_it_could_not_answer(work, tmp_path):
    tokenizer, path = minilora.load_tokenizer(work / "model"), tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "raw"}) + "\n")
    with pytest.raises(DataError, match="line 1: the last message is the text's"):
        read_questions(path, tokenizer)
    path.write_text(json.dumps({"question": "q", "context": "c"}) + "\n")
    with pytest.raises(DataError, match="line 1: 'context' holds something and is not read"):
        read_questions(path, tokenizer)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with pytest.raises(OutputInUse, match="thesis.txt"):
        predict(work / "model", work / "rows.json", tmp_path / "full", console=QUIET)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_the_command_prints_scores_and_definitions(work, made, capsys):
    arguments = ["predict", "--model", str(work / "model"), "--data", str(work / "rows.json"), "--max-tokens", "12"]
    assert main([*arguments, "--output", str(work / "out")]) == 0
    out = capsys.readouterr().out
    assert "bleu4_char: BLEU-4 of each answer by character" in out and "answers were cut at 12 tokens" in out
    assert main([*arguments, "--output", str(work / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == made


@pytest.mark.parametrize("thinking", ["optional", "always", "either"])
def test_a_question_with_a_thought_is_asked_as_it_was_trained(tmp_path, thinking):
    """The prompt goes up to where the training of the row begins, and the reference is all that a model then writes."""
    tokenizer = load_tokenizer(GOLDEN / "qwen3")
    tokenizer.template = dataclasses.replace(tokenizer.template, thinking=thinking)
    answer = {"role": "assistant", "reasoning_content": "a thought", "content": "an answer"}
    user, earlier = {"role": "user", "content": "q"}, {"role": "assistant", "content": "earlier", "loss": True}
    for thought in (True, False):
        last = answer if thought else {"role": "assistant", "content": "an answer"}
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps({"messages": [user, earlier, user, last]}) + "\n")
        (question,) = read_questions(path, tokenizer)
        ids, trained = render_row(
            trainable(next(iter(read_rows(path)))), tokenizer, dataclasses.replace(PLAIN, loss_on="last")
        )
        begins = len(question.ids)
        rest = [i for i, mark in zip(ids[begins:].tolist(), trained[begins:], strict=True) if mark]
        assert ids[:begins].tolist() == question.ids and question.label_tokens == len(rest)
        assert question.label == tokenizer.answer(rest)
        assert ("a thought" in question.label) == thought and "earlier" not in question.label
        assert ("<think>" in question.label) == (thought and thinking == "optional")
        assert ("</think>" in question.label) == (thought or thinking == "always")


def test_another_chat_template_than_that_of_the_training_is_told(work, tmp_path, capsys):
    shutil.copytree(work / "model", tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--data", str(work / "rows.json")]
    assert main(["train", *words, "--max-steps", "1", "--output", str(tmp_path / "run")]) == 0
    measure = ["eval", *words, "--adapter", str(tmp_path / "run" / "adapter")]
    assert main(measure) == 0 and "chat template than" not in capsys.readouterr().out
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text("{# another #}" + template.read_text())
    assert main(measure) == 0 and "trained with another chat template than" in capsys.readouterr().out
    shutil.copy(work / "model" / "chat_template.jinja", tmp_path / "run" / "adapter")
    assert main(measure) == 0 and "chat template than" not in capsys.readouterr().out  # it brings its own
