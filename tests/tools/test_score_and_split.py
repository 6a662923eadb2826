"""data score and data split from the command line."""

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from seen import Seen
from tiny import make_model

import minilora
from minilora.__main__ import main
from minilora.data import load_examples
from minilora.tools.score_data import score_rows

ROWS = [{"prompt": f"question {i}", "completion": "answer " * (i % 4 + 1) + str(i), "id": i} for i in range(12)]


def write(path: Path, *rows) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def lines(path: Path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "m")


def score(model: Path, data: Path, *more) -> int:
    return main(["data", "score", "--model", str(model), "--data", str(data), "--device", "cpu", *map(str, more)])


def test_scores_are_the_rows_own(tmp_path, model, capsys):
    """The perplexity of each row is that of the row alone, from the logits of the model."""
    data = write(tmp_path / "x.jsonl", *ROWS)
    assert score(model, data, "--scores", tmp_path / "s", "--max-length", 300, "--html", tmp_path / "p.html") == 0
    found = lines(tmp_path / "s")
    assert [f["row"] for f in found] == ROWS and [f["where"] for f in found] == [
        f"{data}, line {i + 1}" for i in range(12)
    ]
    decoder = minilora.load_model(model, device="cpu")
    examples, _ = load_examples(data, minilora.load_tokenizer(model))
    for example, line in zip(examples, found, strict=True):
        with torch.no_grad():
            logits = decoder.logits(torch.from_numpy(example.ids)).double()
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(example.targets)).item()
        assert line["tokens"] == example.trained
        assert math.isclose(line["loss"], loss, rel_tol=2e-5) and math.isclose(
            line["perplexity"], math.exp(line["loss"])
        )
    out = capsys.readouterr().out
    worst = max(found, key=lambda f: f["perplexity"])
    assert f"{worst['perplexity']:.2f}  {worst['where']}" in out and "50 % of the rows below" in out
    page = (tmp_path / "p.html").read_text()
    assert "http" not in page.replace("http-equiv", "") and f"{worst['perplexity']:.2f}" in Seen(page).text


def test_rows_are_kept_by_perplexity(tmp_path, model):
    data = write(tmp_path / "x.jsonl", *ROWS)
    assert score(model, data, "--scores", tmp_path / "s") == 0
    values = {f["row"]["id"]: f["perplexity"] for f in lines(tmp_path / "s")}
    low, high = sorted(values.values())[2], sorted(values.values())[8]
    assert score(model, data, "--keep-below", repr(high), "--keep-above", repr(low), "--output", tmp_path / "kept") == 0
    assert (
        lines(tmp_path / "kept") == [r for r in ROWS if low <= values[r["id"]] <= high]
        and len(lines(tmp_path / "kept")) == 7
    )


def test_a_raw_text_in_pieces_is_one_row(tmp_path, model):
    (tmp_path / "x.txt").write_text("abcdefgh" * 20 + "\nshort\n")
    assert score(model, tmp_path / "x.txt", "--max-length", 32, "--scores", tmp_path / "s") == 0
    assert [f["tokens"] for f in lines(tmp_path / "s")] == [161 - 6, 5]


def test_what_score_refuses(tmp_path, model, capsys):
    data = write(tmp_path / "x", ROWS[0], {"prompt": "a", "completion": ""})
    for more, code, part in (
        (["--keep-below", "5"], 2, "belong together"),
        (["--output", "x"], 2, "belong together"),
        (["--keep-below", "x"], 2, "is not a number from 0"),
        ([], 3, "line 2: there is nothing to learn"),
    ):
        assert score(model, data, *more) == code
        assert part in capsys.readouterr().err
    assert score(model, data, "--skip-bad") == 0


def test_two_outputs_of_score_are_two_files(tmp_path, model, capsys):
    data, out = write(tmp_path / "x", *ROWS), tmp_path / "out"
    (tmp_path / "same").symlink_to(tmp_path)
    assert score(model, data, "--keep-below", "9", "--output", out, "--scores", tmp_path / "same" / "out") == 2
    assert "the same file" in capsys.readouterr().err and not out.exists()


def test_a_file_that_appears_while_rows_are_scored_stays(tmp_path, model, monkeypatch, capsys):
    data, out = write(tmp_path / "x", *ROWS), tmp_path / "out"

    def slowly(*arguments):
        out.write_text("precious")
        return score_rows(*arguments)

    monkeypatch.setattr("minilora.tools.score_data.score_rows", slowly)
    assert score(model, data, "--keep-below", "9", "--output", out) == 8
    assert "is there already" in capsys.readouterr().err and out.read_text() == "precious"


def split(data, output: Path, *more) -> int:
    return main(["data", "split", "--data", str(data), "--output", str(output), *map(str, more)])


def test_split_files(tmp_path, capsys):
    rows = [*ROWS, {"prompt": "question 3", "completion": "again"}]
    data = write(tmp_path / "x.jsonl", *rows)
    assert split(data, tmp_path / "out", "--val", "2", "--test", "0.2") == 0
    sides = {name: lines(tmp_path / "out" / f"{name}.jsonl") for name in ("train", "val", "test")}
    assert sorted(json.dumps(r) for side in sides.values() for r in side) == sorted(map(json.dumps, rows))
    assert (
        len({tuple(i for i, side in enumerate(sides.values()) if any(r["prompt"] == "question 3" for r in side))}) == 1
    )
    table = json.loads((tmp_path / "out" / "split.json").read_text())
    assert table["sources"] == {str(data): hashlib.sha256(data.read_bytes()).hexdigest()}
    assert {n: len(s) for n, s in sides.items()} == table["rows"] == {n: len(h) for n, h in table["hashes"].items()}
    out = capsys.readouterr().out
    assert hashlib.sha256((tmp_path / "out" / "val.jsonl").read_bytes()).hexdigest()[:16] in out
    assert split(data, tmp_path / "out", "--val", "2") == 8
    assert "is not empty" in capsys.readouterr().err


def test_split_tells_of_duplicates_and_of_rows_that_are_alike(tmp_path, capsys):
    long = "the quick brown fox jumps over the lazy dog and runs away from the angry farmer " * 3
    rows = [{"prompt": f"{long}{i}", "completion": "yes"} for i in range(6)] * 2
    assert split(write(tmp_path / "x", *rows), tmp_path / "out", "--val", "2", "--drop-duplicates") == 0
    out = capsys.readouterr().out
    assert "6 rows are duplicates and left out" in out and "2 rows of val and test are nearly a training row" in out
    assert len(json.loads((tmp_path / "out" / "split.json").read_text())["near"]) == 2


def test_what_split_refuses(tmp_path, capsys):
    data = write(tmp_path / "x", *ROWS[:3], "{")
    for more, code, part in (
        ([], 2, "neither --val nor --test"),
        (["--val", "1"], 3, "line 4"),
        (["--val", "1", "--test", "2", "--skip-bad"], 3, "Leave rows"),
        (["--val", "x", "--skip-bad"], 2, "val is 'x'"),
    ):
        assert split(data, tmp_path / "out", *more) == code
        assert part in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_where_no_row_can_be_used_the_split_says_why(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"instruction": "q", "output": ""}\n')
    words = [
        "data",
        "split",
        "--data",
        str(tmp_path / "rows.jsonl"),
        "--val",
        "1",
        "--skip-bad",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(words) == 3
    assert "no row can be used (1 empty answer)" in capsys.readouterr().err and not (tmp_path / "out").exists()
