"""Fuzz what minilora opens: `python -m bench.fuzz [TARGET ...] [--seconds 100] [--seed 1] [--keep] [--output FILE]`.

A target is a file in bench/fuzz/targets: `target(data)` reads one input as minilora does, SEEDS are inputs to begin with, WORDS what the
format is made of. For every input it gives a value or raises a MiniloraError of code 2, 3 or 4 (CODES names others). Another exception, more
than 2 s of CPU, more memory than ten times the input and 64 MiB, a file, a process or a connection outside is a fault (judge.py).

Each target runs in a process of its own, coverage-guided where atheris is installed, else by a plain loop. Executions, seconds, faults and
edges that were reached are written to bench/results/fuzz.json; the exit code is 1 if there was a fault. --keep adds the shortest input of every
outcome to the corpus (bench/fuzz/corpus), which tests/test_fuzz.py runs in every test run. A fault is kept by hand, with a name that tells it.
"""

import argparse
import base64
import json
import platform
import re
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from .loop import TARGETS, Case, corpus, keep, load, outcome

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "fuzz.json"
MOST_KEPT = 40  # inputs of a target that --keep adds


def fuzz(name: str, seconds: float, seed: int) -> dict[str, Any]:
    """What was found of one target."""
    with tempfile.TemporaryDirectory(prefix="minilora-fuzz-") as folder:
        path = Path(folder) / "found.json"
        command = [sys.executable, "-m", "bench.fuzz.child", name, str(seconds), str(seed), str(path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
        found = json.loads(path.read_text()) if path.exists() else {"executions": 0, "faults": {}, "shortest": []}
        crashes = {p.name: p.read_bytes() for p in Path(folder).glob("found.json-*")}
    if done.returncode:
        data = next(iter(crashes.values()), b"")
        uncaught = done.stderr.rfind("Uncaught")
        told = f"ended with {done.returncode}: {done.stderr[uncaught:][-1500:]}"
        found["faults"][f"{name} died"] = [1, told, base64.b64encode(data).decode()]
    edges = re.findall(r"cov: (\d+)", done.stderr)
    return found | {"edges": int(edges[-1]) if edges else None}


def keep_new(name: str, shortest: list[list[str]]) -> int:
    """Add inputs of outcomes that the corpus lacks, small ones first; returns how many."""
    target, cases = load(name), corpus(name)
    known = {outcome(target, case.data)[1:3] for case in cases}
    new: list[Case] = []
    for _, _, held in sorted(shortest, key=lambda found: len(found[2])):
        found = outcome(target, base64.b64decode(held))
        if found[1:3] not in known and found.fault is None and len(new) < MOST_KEPT:
            known.add(found[1:3])
            new.append(Case(found.shape or "read", found.verdict, found.data))
    keep(name, [*cases, *new])
    return len(new)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=float, default=100, help="of CPU for each target [100]")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="add the shortest input of every new outcome to the corpus")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    wrong = next((name for name in given.targets if name not in TARGETS), None)
    if wrong is not None:
        parser.error(f"there is no target {wrong!r}; there are {', '.join(TARGETS)}")
    results: dict[str, Any] = json.loads(given.output.read_text()) if given.output.exists() else {"targets": {}}
    faults = 0
    for name in given.targets or TARGETS:
        found = fuzz(name, given.seconds, given.seed)
        kept = f", {keep_new(name, found['shortest'])} kept" if given.keep else ""
        print(
            f"{name:20} {found['executions']:>9,} in {found.get('cpu_seconds', 0):,.0f} s of CPU, {len(found['faults'])} faults{kept}",
            flush=True,
        )
        for kind, (count, told, data) in found["faults"].items():
            print(f"    {count} x {kind}: {told}\n    {data}", flush=True)
        faults += len(found["faults"])
        told = {key: found.get(key) for key in ("fuzzer", "executions", "cpu_seconds", "seconds", "outcomes", "edges")}
        results["targets"][name] = told | {"date": str(date.today()), "faults": sorted(found["faults"])}
        results["machine"] = f"{platform.machine()}, Python {platform.python_version()}"
        given.output.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")  # what stops now keeps the others
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
