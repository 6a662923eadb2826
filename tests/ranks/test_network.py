"""Two hosts, of which one is cut off in the middle of a step: the run ends on both, says which it was, and resumes."""

import re
import time
from pathlib import Path

import pytest
from rank_runs import SETTINGS, given, metrics, ranks_of, steps
from ranks.hosts import cluster, unavailable

TIMEOUT = 8


@pytest.mark.long
def test_a_host_that_is_cut_off_ends_the_run_before_the_timeout_and_it_resumes(tmp_path: Path):
    if why := unavailable():
        pytest.skip(why)
    out = tmp_path / "run"
    words = [
        *given("train", tmp_path),
        *SETTINGS,
        "--max-steps",
        "40",
        "--rank-timeout",
        str(TIMEOUT),
        "--output",
        str(out),
    ]
    with cluster() as hosts:
        both = [hosts.start(host, 2, *words) for host in (0, 1)]
        while steps(out) < 5:
            assert not any(torchrun.poll() for torchrun in both), [torchrun.communicate() for torchrun in both]
            time.sleep(0.02)
        hosts.plug("down")
        cut = time.monotonic()
        while ranks_of(out):
            time.sleep(0.1)
        assert time.monotonic() - cut < TIMEOUT
        here, there = (torchrun.communicate()[0] for torchrun in both)
        assert here.count("error: ") == 1 and re.search(r"error: rank [23] on beta gave no sign for 4 s \(", here), here
        assert there.count("error: ") == 1 and "error: beta cannot reach torchrun on alpha (" in there, there
        hosts.plug("up")
        both = [hosts.start(host, 2, *words, "--resume") for host in (0, 1)]
        here, there = (torchrun.communicate()[0] for torchrun in both)
        assert [torchrun.returncode for torchrun in both] == [0, 0], (here, there)
        assert "resume  from" in here and "4 on 2 machines" in here and not there.count("step")
    assert [line["step"] for line in metrics(out) if "loss" in line] == list(range(1, 41))
