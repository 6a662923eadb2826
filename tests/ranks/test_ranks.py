"""Several ranks, over gloo on a CPU, compute what one computes; and when one is lost, all end, with one message and one exit code."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rank_runs import (
    ENVIRONMENT,
    ROOT,
    adapter,
    interrupted,
    killing,
    losses,
    metrics,
    ranks_of,
    run,
    steps,
    torchrun,
    training,
)
from tiny import make_model

from minilora.ranks.deal import deal, imbalance

# which rank has which stream


def test_streams_are_dealt_once_each_and_longest_first():
    tokens = [5, 9, 1, 7, 7, 2]
    dealt = deal(tokens, 3)
    assert sorted(i for streams in dealt for i in streams) == list(range(6))
    assert [sum(tokens[i] for i in streams) for streams in dealt] == [10, 12, 9]
    assert deal(tokens, 1) == [list(range(6))] and deal([3], 2) == [[0], []]
    assert imbalance(tokens, 3) == pytest.approx(12 * 3 / 31) and imbalance([4, 4], 2) == 1.0


# the same numbers


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    model = make_model(folder / "model")
    script = str(ROOT / "tests/ranks/steps.py")
    for command in ([sys.executable], torchrun(2), torchrun(4)):
        subprocess.run([*command, script, str(model), str(folder)], check=True, env=ENVIRONMENT, capture_output=True)
    return folder


def read(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.mark.parametrize("case", ["lora", "full", "checkpointing", "dropout", "one stream"])
@pytest.mark.parametrize("count", [2, 4])
def test_ranks_compute_what_one_computes(found: Path, count: int, case: str):
    """In fp64: sums in another order, and nothing else."""
    alone, *all_ranks = read(found / "1-0.json")[case], *(read(found / f"{count}-{r}.json")[case] for r in range(count))
    assert len({one["bits"] for one in all_ranks}) == 1, "ranks have other bits"
    one = all_ranks[0]
    for mine, theirs in zip(one["steps"], alone["steps"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-12)
    assert one["some"] == pytest.approx(alone["some"], rel=1e-10, abs=1e-12)
    assert (one["val"], one["tokens"]) == (pytest.approx(alone["val"], rel=1e-12), alone["tokens"])


# a run of several ranks that is killed, stopped, or diverges


def test_a_rank_that_is_killed_ends_the_run_and_a_resumed_one_has_the_same_bits(tmp_path: Path):
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert run(training(tmp_path, str(whole))).returncode == 0
    code, said, _ = interrupted(training(tmp_path, str(out)), lambda: steps(out) >= 3, killing(1, out))
    assert code == 10 and said.count("error:") == 1 and "Traceback" not in said, said
    assert "error: rank 1 on" in said and "died (step" in said
    assert not ranks_of(out) and not list(out.glob("**/.tmp-*"))
    done = run([*training(tmp_path, str(out)), "--resume"])
    assert done.returncode == 0 and "resume  from" in done.stdout
    assert adapter(out) == adapter(whole)
    # what is trained does not depend on the number of ranks but for the order of a sum
    alone = tmp_path / "alone"
    assert run(training(tmp_path, str(alone), ranks=1)).returncode == 0
    assert losses(alone) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.parametrize("whom", ["torchrun", "rank"])
def test_a_signal_saves_once_and_ends_all(tmp_path: Path, whom: str):
    out = tmp_path / "run"

    def stop(process: subprocess.Popen) -> None:
        os.kill(process.pid if whom == "torchrun" else ranks_of(out)[1], signal.SIGTERM)

    code, said, _ = interrupted(training(tmp_path, str(out)), lambda: steps(out) >= 2, stop)
    assert code == 75 and said.count("stopped by") == 1 and "Traceback" not in said, said
    assert not ranks_of(out) and "--resume" in said


def test_divergence_ends_all_with_its_own_code(tmp_path: Path):
    done = run([*training(tmp_path, str(tmp_path / "run")), "--lr", "1e30"])
    assert done.returncode == 5 and done.stderr.count("error:") == 1, done.stderr


@pytest.mark.long
def test_killing_each_rank_again_and_again_loses_nothing(tmp_path: Path):
    """50 kills at random steps of a run that is resumed each time, on 4, 2 and 3 ranks."""
    choose, out = random.Random(0), tmp_path / "run"
    command = training(tmp_path, str(out), ranks=4)
    command[command.index("--max-steps") + 1] = "400"
    for kill in range(50):
        count = (4, 2, 3)[kill % 3]
        command[command.index("--gpus") + 1] = str(count)
        rank, before = choose.randrange(count), steps(out)
        until = before + choose.randint(1, 7)
        code, said, _ = interrupted(
            [*command, *["--resume"] * bool(before)], lambda until=until: steps(out) >= until, killing(rank, out)
        )
        assert code == 10 and said.count("error:") == 1, said
        assert not ranks_of(out)
    assert run([*command, "--resume"]).returncode == 0
    assert [line["step"] for line in metrics(out) if "loss" in line] == list(range(1, 401))
