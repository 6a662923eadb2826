"""The small tier of bench.fuzz: every input of the corpus has its verdict, and a few hundred new ones of each target show no fault."""

import mmap
from pathlib import Path
from random import Random
from typing import Any

import pytest

from bench.fuzz.judge import Fault, judged
from bench.fuzz.loop import TARGETS, corpus, load, mutants, seeds

MUTANTS = 150  # of each target; the big tier is `python -m bench.fuzz`
FEWER = {"chat_template": 60, "folder": 60, "xlsx": 80}  # a process or a model for each


def loaded(name: str):
    if name == "http":
        pytest.importorskip("starlette")
    return load(name)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.filterwarnings("ignore")
def test_the_corpus_has_its_verdicts(name):
    target, cases = loaded(name), corpus(name)
    assert cases and len({case.data for case in cases}) == len(cases)
    found = [case._replace(verdict=judged(target, case.data)[0]) for case in cases]
    assert found == cases


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.filterwarnings("ignore")
def test_new_inputs_show_no_fault(name):
    target = loaded(name)
    assert "value" in {judged(target, data)[0] for data in target.SEEDS}
    new = mutants(target, seeds(target, corpus(name)), Random(0))
    assert {judged(target, next(new))[0] for _ in range(FEWER.get(name, MUTANTS))} - {"value"}


class Careless:
    """A target that does what none may."""

    __name__ = "bench.fuzz.targets.careless"

    def __init__(self, outside: Path):
        self.outside = outside

    def target(self, data: bytes) -> None:
        if data == b"raises":
            raise KeyError(data)
        if data == b"writes":
            self.outside.touch()
        if data == b"asserts":
            raise AssertionError
        if data == b"late":
            while True:
                pass
        if data == b"large":
            mmap.mmap(-1, 200 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)


@pytest.mark.parametrize("data", [b"raises", b"writes", b"asserts", b"late", b"large"])
def test_a_fault_is_seen(data, monkeypatch, tmp_path):
    monkeypatch.setattr("bench.fuzz.judge.SECONDS", 0.2)
    careless: Any = Careless(tmp_path / "outside")
    assert judged(careless, b"good") == ("value", "")
    with pytest.raises(Fault):
        judged(careless, data)
    assert not careless.outside.exists()
