"""predict and eval over ranks: the files of one process, and an end of all when one is stopped or lost."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from rank_runs import ROOT, given, interrupted, killing, material, ranks_of, run, torchrun
from ranks.answers import answer

from minilora.__main__ import main

pytestmark = pytest.mark.xdist_group(__name__)  # one worker starts the processes that all its tests look at

ROWS, PART = "generated_predictions.jsonl", "part.jsonl"


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = material(tmp_path_factory.mktemp("answers"))
    (folder / "model" / "generation_config.json").write_text('{"do_sample": true, "temperature": 1.0}')
    done = run(torchrun(2, str(ROOT / "tests/ranks/answers.py"), str(folder), str(folder / "2")))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("14/14 answers") == 2 and done.stdout.count("holds this prediction already") == 1
    answer(folder, folder / "1")
    return folder


@pytest.mark.parametrize("name", ["likeliest", "drawn"])
def test_ranks_give_the_answers_of_one_process(answered: Path, name: str):
    """The same bytes: the order of the rows, the likeliest tokens, and the draws, which are of a row and not of a rank."""
    one, two = (answered / ranks / name for ranks in "12")
    assert (one / ROWS).read_bytes() == (two / ROWS).read_bytes()
    results = [json.loads((run / "predict_results.json").read_text()) for run in (one, two)]
    assert all(r.pop("predict_runtime") > 0 for r in results) and results[0] == results[1]
    assert {p.name for p in two.iterdir()} == {ROWS, "predict_results.json", ".lock"}
    assert (answered / "2/drawn" / ROWS).read_bytes() != (answered / "2/likeliest" / ROWS).read_bytes()


def test_ranks_give_the_loss_of_one_process_and_one_says_it(answered: Path):
    one, two = ((answered / ranks / "eval.json").read_text() for ranks in "12")
    assert one == two and len(two.splitlines()) == 1


@pytest.mark.long
def test_a_prediction_whose_rank_was_killed_or_stopped_goes_on_to_the_same_answers(answered: Path, tmp_path: Path):
    """Also with another number of ranks."""

    def command(output: Path) -> list[str]:
        words = ["--max-tokens", "60", "--batch", "1", "--sample", "--compute", "float32", "--output", str(output)]
        return [*given("predict", answered), *words]

    def answers() -> int:
        return (out / PART).read_text().count("\n") - 1 if (out / PART).exists() else 0

    out, whole = tmp_path / "out", tmp_path / "whole"
    two = [sys.executable, *command(out), "--gpus", "2"]
    code, said, _ = interrupted(two, lambda: answers() >= 2, killing(1, out))
    assert code == 10 and said.count("error:") == 1 and "Traceback" not in said, said
    assert "error: rank 1 on" in said and "died (answering, token" in said and "The same command goes on" in said
    kept = answers()
    code, said, _ = interrupted(two, lambda: answers() >= kept + 2, lambda _: os.kill(ranks_of(out)[1], signal.SIGTERM))
    assert code == 75 and said.count("stopped by a signal to another rank after") == 1 and "Traceback" not in said, said
    assert 2 <= kept < answers() < 14 and not ranks_of(out)
    for output in (out, whole):
        assert main(command(output)[2:]) == 0
    assert (out / ROWS).read_bytes() == (whole / ROWS).read_bytes()
