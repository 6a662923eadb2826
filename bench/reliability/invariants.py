"""What must hold after a command was cut short, and after its user typed the next one.

I1  every snapshot and every result under a good name is, byte for byte, that of a command that nobody disturbed
I2  the next command succeeds without cleaning by hand, and ends with the bytes of the undisturbed one
I3  no more than --save-every steps are lost
I4  nothing that passes its manifest holds anything else than what was to be written
I5  leftovers are .tmp-* and .trash-*, and the next command takes them away
I6  a failure is told in one line and has its exit code; there is no traceback
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.reliability import forked
from bench.reliability.commands import Command
from bench.reliability.forked import Ended
from minilora.files.atomic import verify_manifest
from minilora.files.strict_json import read_json_lines
from minilora.run.snapshot import newest_snapshot, snapshots, step_of

TIMES = {"time", "seconds", "tokens_per_second", "mfu", "memory_gb", "machine", "predict_runtime", "step_seconds"}
OF_TIMES = {"MANIFEST.json", "report.html", ".lock"}  # hold the hash of times, the hour, the number of a process
UNTRAINED = "step-0"  # saved by a run that was asked to stop before its first step was done


class Invariants:
    """Of one command: `found()` says what is wrong after it was cut short, `recover()` after the next command too."""

    def __init__(self, command: Command):
        self.command = command
        command.set_up()
        forked.prepare(command.words)  # in this process: its forks need not import anything again
        self.result = contents(command.output)
        self.snapshots = {}
        for run in command.runs:
            for folder in snapshots(run / "checkpoints"):
                self.snapshots.setdefault(folder.name, []).append(contents(folder))
        self.names = set().union(self.result, *map(contents, command.runs))

    def found(self) -> Iterator[str]:
        output = self.command.output
        strange = [p.name for p in self.command.place.iterdir() if p != output and not is_leftover(p.name)]
        if strange:
            yield f"I5 {strange} lies beside the output"
        if not self.command.runs:
            whole = not output.exists() or self.command.name == "predict" or contents(output) == self.result
            if not whole:
                yield f"I1 the output is there and is not whole: {difference(contents(output), self.result)}"
            return
        if not output.exists():
            return
        strange = [n for n in contents(output) if n not in self.names and not n.startswith(f"checkpoints/{UNTRAINED}/")]
        if strange:
            yield f"I5 {strange} is no leftover's name"
        for folder in snapshots(output / "checkpoints"):
            if folder.name == UNTRAINED:
                continue
            if verify_manifest(folder) is None and contents(folder) not in self.snapshots[folder.name]:
                yield f"I4 {folder.name} passes its manifest and is another"
        newest, skipped = newest_snapshot(output / "checkpoints")
        yield from (f"I1 {line}" for line in skipped)
        reached = _reached(output)
        if reached > 1 + (step_of(newest) if newest else 0):
            yield f"I3 step {reached} was made, {newest} is saved"

    def kept(self, promise: str) -> Iterator[str]:
        """After a power cut: what the command had said was safe is there."""
        if promise == "the end" and (now := contents(self.command.output)) != self.result:
            yield f"I1 lost after the end: {difference(now, self.result)}"
        elif promise.startswith("step "):
            newest, _ = newest_snapshot(self.command.output / "checkpoints")
            step, reached = int(promise.removeprefix("step ")), _reached(self.command.output)
            if newest is None or step_of(newest) < step:
                yield f"I1 {promise} was saved, {newest} is there"
            elif reached < step:
                yield f"I1 {promise} was saved, metrics.jsonl ends at step {reached}"

    def recover(self) -> Iterator[str]:
        words = self.command.again()
        if words is not None:
            ended = forked.run(lambda: forked.command(words))
            if ended.code:
                yield f"I2 {' '.join(words)} ended with {ended.code}: {ended.said[-800:]}"
                return
        yield from self.ended()

    def ended(self) -> Iterator[str]:
        """After a command that came to its end."""
        now = contents(self.command.output)
        if now != self.result:
            yield f"I2 the result differs: {difference(now, self.result)}"
        yield from (f"I4 {line}" for line in newest_snapshot(self.command.output / "checkpoints")[1])
        left = [str(p) for p in self.command.place.rglob(".*") if is_leftover(p.name)]
        if left:
            yield f"I5 {left} is still there"

    def told(self, ended: Ended) -> Iterator[str]:
        """Of a command whose disk failed."""
        if "Traceback" in ended.said or ended.code not in (0, 6):
            yield f"I6 exit code {ended.code}: {ended.said[-800:]}"
        if ended.code == 6 and "error: " not in ended.said:
            yield f"I6 no word of the error: {ended.said[-800:]}"
        if ended.code == 0 and contents(self.command.output) != self.result:
            yield f"I6 exit code 0 and {difference(contents(self.command.output), self.result)}"


def contents(folder: Path) -> dict[str, str]:
    """A hash of every file by its name below the folder, of links their target; without leftovers, and without the times that files tell."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if any(map(is_leftover, path.relative_to(folder).parts)):
            continue
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file() and path.name not in OF_TIMES:
            found[name] = hashlib.sha256(_timeless(path)).hexdigest()
    return found


def difference(now: dict[str, str], then: dict[str, str]) -> list[str]:
    return sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))


def _reached(run: Path) -> int:
    """The last step whose metrics are there."""
    return max((line["step"] for line in read_json_lines(run / "metrics.jsonl")), default=0)


def _timeless(path: Path) -> bytes:
    raw = path.read_bytes()
    try:
        parts = raw.splitlines() if path.suffix == ".jsonl" else [raw] if path.suffix == ".json" else []
        return json.dumps([_without_times(json.loads(part)) for part in parts]).encode() if parts else raw
    except ValueError:  # a half one
        return raw


def _without_times(value: Any) -> Any:
    return {k: v for k, v in value.items() if k not in TIMES} if isinstance(value, dict) else value


def is_leftover(name: str) -> bool:
    return name.startswith((".tmp-", ".trash-"))
