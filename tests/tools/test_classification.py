"""The recipe `classification` on GPT-2: what a row becomes in training and in the test, and that it learns labels."""

import csv
import json
from pathlib import Path

import pytest
from oracle import tiny_folder
from tiny import byte_tokenizer

from minilora.__main__ import main
from minilora.config import TrainConfig, to_yaml
from minilora.data import IGNORE, load_examples
from minilora.report.record import RESULTS
from minilora.rows.questions import read_questions
from minilora.text.tokenizer import load_tokenizer
from minilora.tools.sweep import read_sweep

TOKENIZER = Path(__file__).parents[1] / "golden" / "tokenizers" / "gpt2" / "tokenizer.json"
ROWS = [(f"{n} {word} " + "the rest " * (n % 3 * 20) + f"is {word}", label)
        for n in range(6) for word, label in (("good", "1"), ("bad", "0"))]  # fmt: skip


def settings(place: Path, tokenizer: str, **sizes: int) -> TrainConfig:
    """The recipe's settings for a tiny GPT-2 and rows of our own, some of more than 32 tokens."""
    folder = tiny_folder(place / "m", "gpt2", **sizes)
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    with open(place / "rows.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *ROWS])
    rows = str(place / "rows.csv")
    flags = {
        "model": str(folder),
        "data": rows,
        "val": rows,
        "lr": 3e-2,
        "epochs": 12,
        "batch_size": 6,
        "device": "cpu",
    }
    (point,) = read_sweep("classification", place / "out", flags).points
    return point.config


def test_a_row_is_its_last_tokens_the_end_of_text_and_its_label(tmp_path: Path):
    config = settings(tmp_path, TOKENIZER.read_text(encoding="utf-8"), vocab_size=50257, n_embd=4, n_inner=4)
    tokenizer, said = load_tokenizer(config.model), []
    examples, report = load_examples(config.data, tokenizer, config)
    questions = read_questions(config.data, tokenizer, config, said.append)
    longer = sum(len(tokenizer.encode(text)) > 32 for text, _ in ROWS)
    assert len(examples) == len(ROWS) > longer > 0
    for example, question, (text, label) in zip(examples, questions, ROWS, strict=True):
        prompt = [*tokenizer.encode(text)[-32:], 50256]
        assert example.ids.tolist() == [*prompt, *tokenizer.encode(label), 50256] and question.ids == prompt
        assert example.targets.tolist() == [IGNORE] * (len(prompt) - 1) + tokenizer.encode(label) + [IGNORE] * 2
        assert question.label == label
    assert report.cut == {"source_tail 32": longer} and report.trained == len(ROWS)
    assert said == [f"{longer} of {len(ROWS)} questions are read from their last 32 tokens on"]


def test_it_learns_the_labels(tmp_path: Path, capsys: pytest.CaptureFixture):
    j = json.loads(byte_tokenizer())  # few tokens: a tiny head tells them apart
    j["added_tokens"] = j["added_tokens"][:1]
    j["model"]["vocab"] = {token: i for token, i in j["model"]["vocab"].items() if i <= 256}
    config = settings(tmp_path, json.dumps(j), vocab_size=257, n_embd=32, n_inner=64)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert main(["train", "-c", str(tmp_path / "run.yaml")]) == 0
    told = capsys.readouterr().out
    assert f"{len(ROWS)} of {len(ROWS)} rows have one trained token" in told and "chat format plain" in told
    words = [
        "--model",
        config.model,
        "--adapter",
        f"{config.output}/adapter",
        "--data",
        config.val,
        "--max-tokens",
        "1",
    ]
    assert (
        main(["predict", *words, "--output", str(tmp_path / "answers"), *config.reading_flags(), "--device", "cpu"])
        == 0
    )
    results = json.loads((tmp_path / "answers" / RESULTS).read_text())
    assert results["metrics"]["exact"]["value"] == 100  # the accuracy
