"""Fuzz one target for some seconds in this process, and write what was found to a file: a child of `python -m bench.fuzz`.

With atheris, minilora is instrumented and libFuzzer keeps the inputs that reach new code; without it, the plain loop keeps those whose
outcome is new. Inputs are made by the same mutator in both.
"""

import base64
import importlib
import importlib.util
import json
import os
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

from .loop import Outcome, corpus, load, mutants, outcome, seeds

LARGEST = 4096  # bytes of an input that may be kept for the corpus


class Found:
    """What was found so far: an input of each outcome, the shortest one, and faults by their kind."""

    def __init__(self, path: Path, fuzzer: str, seconds: float):
        self.path, self.fuzzer, self.seconds = path, fuzzer, seconds
        self.began, self.executions = (time.process_time(), time.monotonic()), 0
        self.shortest: dict[tuple[str, str], bytes] = {}
        self.faults: dict[str, tuple[int, str, bytes]] = {}

    def add(self, one: Outcome) -> bool:
        """Count an outcome; returns whether it is a new one."""
        self.executions += 1
        if one.fault is not None:
            count, told, data = self.faults.get(one.fault.kind, (0, str(one.fault), one.data))
            if len(one.data) <= len(data):
                told, data = str(one.fault), one.data
            self.faults[one.fault.kind] = count + 1, told, data
        new = one[1:3] not in self.shortest
        if new or len(one.data) < len(self.shortest[one[1:3]]):
            self.shortest[one[1:3]] = one.data
        if self.executions % 500 == 0:
            self.write()
        return new

    @property
    def over(self) -> bool:
        """So many seconds of CPU; a target that waits for another process has twice as many by the clock."""
        return time.process_time() - self.began[0] > self.seconds or time.monotonic() - self.began[1] > 2 * self.seconds

    def write(self) -> None:
        told: dict[str, Any] = {
            "fuzzer": self.fuzzer,
            "executions": self.executions,
            "cpu_seconds": round(time.process_time() - self.began[0], 1),
            "seconds": round(time.monotonic() - self.began[1], 1),
            "outcomes": len(self.shortest),
            "faults": {kind: [n, told[:300], _base64(data)] for kind, (n, told, data) in self.faults.items()},
            "shortest": [[v, s, _base64(d)] for (v, s), d in self.shortest.items() if len(d) <= LARGEST],
        }
        self.path.write_text(json.dumps(told))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def plain(target: ModuleType, pool: list[bytes], found: Found, seed: int) -> None:
    for data in mutants(target, pool, Random(seed)):
        one = outcome(target, data)
        if found.add(one) and one.fault is None:
            pool.append(data)
        if found.over:
            found.write()
            return


def guided(target: ModuleType, pool: list[bytes], found: Found, seed: int) -> None:
    atheris: Any = importlib.import_module("atheris")
    folder = Path(tempfile.mkdtemp(prefix="minilora-corpus-"))
    for number, data in enumerate(pool):
        (folder / str(number)).write_bytes(data)
    random = Random(seed)

    def one_input(data: bytes) -> None:
        found.add(outcome(target, data))
        if found.over:
            found.write()
            os._exit(0)  # libFuzzer would not return either

    def own_mutator(data: bytes, most: int, number: int) -> bytes:
        return next(mutants(target, [data, random.choice(pool)], Random(number)))[:most]

    flags = [
        "-timeout=0",
        "-rss_limit_mb=0",
        "-max_len=65536",
        "-len_control=0",
        f"-seed={seed}",
        f"-artifact_prefix={found.path}-",
    ]
    atheris.Setup([sys.argv[0], *flags, str(folder)], one_input, custom_mutator=own_mutator)
    atheris.Fuzz()


def main(name: str, seconds: float, seed: int, path: Path) -> None:
    instrumented: Any = nullcontext()
    guide = importlib.util.find_spec("atheris") is not None
    if guide:
        atheris: Any = importlib.import_module("atheris")
        instrumented = atheris.instrument_imports(include=["minilora"], enable_loader_override=False)
    with instrumented:
        target = load(name)
        pool = seeds(target, corpus(name))
        for data in pool:  # which imports what is imported when it is needed
            outcome(target, data)
    found = Found(path, "atheris" if guide else "plain", seconds)
    (guided if guide else plain)(target, pool, found, seed)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
