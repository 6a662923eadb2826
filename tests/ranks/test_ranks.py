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
    SETTINGS,
    adapter,
    given,
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

from minilora.__main__ import main
from minilora.ranks.cost import all_reduce_bytes
from minilora.ranks.deal import deal, imbalance

pytestmark = pytest.mark.xdist_group(__name__)  # one worker starts the processes that all its tests look at

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
    done = run([sys.executable, str(ROOT / "tests/ranks/steps.py"), str(model), str(folder)])
    assert done.returncode == 0, done.stderr
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


def test_a_run_goes_on_from_four_ranks_to_two_to_one(found: Path):
    """A step each, from the snapshot of the one before, is what one process computes in three; in fp64, moments too."""
    one = read(found / "1-0.json")
    assert one["gone on"] == pytest.approx(one["without a stop"], rel=1e-10, abs=1e-12)


@pytest.mark.parametrize(("count", "case"), [(2, "lora"), (2, "full"), (4, "full")])
def test_ranks_send_what_the_cost_model_says(found: Path, count: int, case: str):
    """All of them in three steps, by the kernel's count on their sockets; gloo's headers are 600 to 2,000 bytes of each rank and step."""
    ranks = [read(found / f"{count}-{r}.json")[case] for r in range(count)]
    buffer = ranks[0]["trained"] + 2 * 8  # and the loss and the signals, in fp64
    assert sum(rank["sent"] for rank in ranks) == pytest.approx(3 * count * all_reduce_bytes(buffer, count), rel=0.02)
    assert read(found / "1-0.json")[case]["sent"] == 0 == all_reduce_bytes(buffer, 1)


# a run of several ranks that is killed, stopped, or diverges


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing happens to; writes.log has what the second of them opened to write, or moved."""
    folder = tmp_path_factory.mktemp("whole")
    hook = {
        "PYTHONPATH": f"{ROOT / 'tests/ranks/audit'}{os.pathsep}{ENVIRONMENT['PYTHONPATH']}",
        "AUDITED": str(folder),
    }
    done = run(training(folder, str(folder / "run")), hook)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_the_first_rank_alone_writes_into_the_run(whole: Path):
    """So on a file system that machines share, no two write one file; and what is there appears by a rename (files/atomic.py)."""
    first, second = ((whole.parent / f"writes-{rank}.log").read_text().splitlines() for rank in (0, 1))
    assert sum("checkpoints" in line for line in first) > 3 and second == []


@pytest.mark.long
def test_torchrun_starts_the_ranks_again_and_they_go_on_by_themselves(tmp_path: Path, whole: Path):
    out = tmp_path / "run"
    words = [*given("train", tmp_path), *SETTINGS, "--output", str(out)]
    code, said, _ = interrupted(torchrun(2, "--max-restarts=1", *words), lambda: steps(out) >= 6, killing(1, out))
    assert code == 0 and said.count("resume  from") == 1, said
    assert [line["step"] for line in metrics(out)] == list(range(13)) and losses(out) == losses(whole)
    assert adapter(out) == adapter(whole)


def test_a_rank_that_is_killed_ends_the_run_and_a_resumed_one_has_the_same_bits(tmp_path: Path, whole: Path):
    out = tmp_path / "killed"
    code, said, _ = interrupted(training(tmp_path, str(out)), lambda: steps(out) >= 3, killing(1, out))
    assert code == 10 and said.count("error:") == 1 and "Traceback" not in said, said
    assert "error: rank 1 on" in said and "died (step" in said
    assert not ranks_of(out) and not list(out.glob("**/.tmp-*"))
    done = run([*training(tmp_path, str(out)), "--resume"])
    assert done.returncode == 0 and "resume  from" in done.stdout
    assert adapter(out) == adapter(whole)
    # what is trained does not depend on the number of ranks but for the order of a sum
    alone = tmp_path / "alone"
    assert main(training(tmp_path, str(alone), ranks=1)[3:]) == 0
    assert losses(alone) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.parametrize(
    "whom", ["torchrun", pytest.param("rank 1", marks=pytest.mark.long), pytest.param("all", marks=pytest.mark.long)]
)
def test_a_signal_saves_once_and_ends_all(tmp_path: Path, whom: str):
    """Ctrl-C reaches torchrun alone, which passes it on; Slurm's SIGTERM reaches all, so that ranks get it twice."""
    out = tmp_path / "run"

    def stop(torchrun: subprocess.Popen) -> None:
        if whom == "torchrun":
            return torchrun.send_signal(signal.SIGINT)
        ranks = ranks_of(out)
        for process in [ranks[1]] if whom == "rank 1" else [*ranks.values(), torchrun.pid]:
            os.kill(process, signal.SIGTERM)

    code, said, _ = interrupted(training(tmp_path, str(out)), lambda: steps(out) >= 2, stop)
    assert code == 75 and said.count("stopped by") == 1 and "Traceback" not in said, said
    assert not ranks_of(out) and "--resume" in said


def test_divergence_ends_all_with_its_own_code(tmp_path: Path):
    done = run([*training(tmp_path, str(tmp_path / "run")), "--lr", "1e30"])
    assert done.returncode == 5 and done.stderr.count("error:") == 1, done.stderr


@pytest.mark.long
def test_killing_each_rank_again_and_again_loses_nothing(tmp_path: Path):
    """50 kills at random steps of a run that is resumed each time: in the end it is the one that was never killed."""
    choose, out, whole = random.Random(0), tmp_path / "run", tmp_path / "whole"
    command = [*training(tmp_path)[:-1], "--max-steps", "250", "--eval-every", "50", "--output"]
    for kill in range(50):
        before, rank = steps(out), kill % 2
        until = before + choose.randint(1, 4)
        again = ["--resume"] if list(out.glob("checkpoints/step-*")) else ["--overwrite"] * out.exists()
        code, said, seconds = interrupted(
            [*command, str(out), *again], lambda until=until: steps(out) >= until, killing(rank, out)
        )
        assert code == 10 and said.count("error:") == 1 and f"error: rank {rank} on" in said, said
        assert not ranks_of(out)
        print(f"kill {kill + 1} of rank {rank} after step {steps(out)}: ended in {seconds:.1f} s")
    for output, again in ((out, ["--resume"]), (whole, [])):
        assert run([*command, str(output), *again]).returncode == 0
    assert [line["step"] for line in metrics(out)] == list(range(251))
    assert losses(out) == losses(whole) and adapter(out) == adapter(whole)
