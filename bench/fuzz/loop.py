"""The plain loop: inputs made from seeds and from what came out new, judged one by one. The same seed gives the same inputs."""

import base64
import json
import re
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from random import Random
from types import ModuleType
from typing import NamedTuple

from .judge import Fault, judged
from .mutator import mutate

HERE = Path(__file__).parent
TARGETS = tuple(sorted(p.stem for p in (HERE / "targets").glob("*.py")))


class Case(NamedTuple):
    """An input of the corpus, what it is, and what becomes of it: "value" or the code of an error."""

    name: str
    verdict: str
    data: bytes


def load(name: str) -> ModuleType:
    """The module of a target, with what it needs to be there."""
    module = import_module(f"bench.fuzz.targets.{name}")
    getattr(module, "prepare", lambda: None)()
    return module


def corpus(name: str) -> list[Case]:
    """The inputs of a target that are kept, with their verdicts."""
    path = HERE / "corpus" / f"{name}.json"
    lines = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return [Case(title, verdict, _bytes(held)) for title, verdict, held in lines]


def keep(name: str, cases: Iterable[Case]) -> None:
    """Write the corpus of a target: a line for each input, as text where it is one."""
    lines = [json.dumps([c.name, c.verdict, _held(c.data)], ensure_ascii=True) for c in cases]
    (HERE / "corpus" / f"{name}.json").write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def _held(data: bytes) -> str | list[str]:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return [base64.b64encode(data).decode()]


def _bytes(held: str | list[str]) -> bytes:
    return held.encode("utf-8") if isinstance(held, str) else base64.b64decode(held[0])


def seeds(target: ModuleType, cases: Iterable[Case]) -> list[bytes]:
    return [*target.SEEDS, *(case.data for case in cases)]


def mutants(target: ModuleType, pool: list[bytes], random: Random) -> Iterator[bytes]:
    """Inputs without end, each from one of the pool, which may grow meanwhile."""
    words = getattr(target, "WORDS", ())
    own = getattr(target, "mutate", None)
    while True:
        # half of them from good ones: what was kept for its error is mostly refused again
        data, other = random.choice(target.SEEDS if random.random() < 0.5 else pool), random.choice(pool)
        yield own(data, random, other) if own else mutate(data, random, words, other)


class Outcome(NamedTuple):
    """What became of an input; `shape` is the same for errors that differ in names and numbers alone."""

    data: bytes
    verdict: str
    shape: str
    fault: Fault | None


def outcome(target: ModuleType, data: bytes) -> Outcome:
    try:
        verdict, told = judged(target, data)
    except Fault as fault:
        return Outcome(data, "fault", fault.kind, fault)
    return Outcome(data, verdict, shape_of(told), None)


def shape_of(told: str) -> str:
    return re.sub(r"'[^']*'|\"[^\"]*\"|0x\w+|\d[\d,.e+-]*|/\S+", "_", told)[:120]


def search(target: ModuleType, pool: list[bytes], random: Random, runs: int) -> Iterator[Outcome]:
    """Outcomes of `runs` mutants; an input whose outcome is new joins the pool."""
    known = {outcome(target, data)[1:3] for data in pool}
    source = mutants(target, pool, random)
    for _ in range(runs):
        found = outcome(target, next(source))
        if found[1:3] not in known:
            known.add(found[1:3])
            if found.fault is None and len(found.data) < 4096:
                pool.append(found.data)
        yield found
