"""python -m bench.reliability.system_calls: the same from outside, by strace, which knows nothing of Python.

First, every call that changes something below the folder must be one that operations.py has numbered, in the same order: what went
past it would be a place where nobody has tried a kill. Then strace itself kills the process, or fails the call, at one call after another.
"""

import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

from bench.reliability import forked, scoreboard
from bench.reliability.commands import Command, commands
from bench.reliability.forked import Ended
from bench.reliability.invariants import Invariants
from bench.reliability.operations import Operations

NAMES = (
    "fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,mkdirat,symlink,symlinkat,truncate,ftruncate"
)
WRITES = "write,pwrite64,writev,pwritev,sendfile,copy_file_range,open,openat,creat,link,linkat"
FAULTS = ("signal=KILL", f"error={errno.errorcode[errno.ENOSPC]}", "signal=KILL", f"error={errno.errorcode[errno.EIO]}")
KINDS = {"fdatasync": "fsync", "renameat": "rename", "renameat2": "rename", "unlinkat": "unlink", "mkdirat": "mkdir", "symlinkat": "symlink",
         "ftruncate": "truncate"} | dict.fromkeys(WRITES.split(","), "write")  # fmt: skip
CALL = re.compile(r"\d+ +(\w+)\((.*)\) += (\d+)")  # one that did not fail; -1 of one that did is no digit
FIRST = re.compile(
    r'(?:(?:\d+|AT_FDCWD)<([^>]*)>(?:\(deleted\))?)?(?:, )?(?:"([^"]*)")?'
)  # an open file or folder, a name


def works() -> bool:
    """Whether strace is there and may trace."""
    if shutil.which("strace") is None:
        return False
    return not subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, check=False).returncode


def traced(call, *options: str) -> tuple[Ended, list[str]]:
    """A fork under strace, which is there before the call begins; what it saw."""
    ready, go = os.pipe()

    def wait_and_call() -> int:
        os.close(go)
        os.read(ready, 1)
        return call()

    with tempfile.NamedTemporaryFile("r") as log:
        child = forked.start(wait_and_call)
        os.close(ready)
        command = ["strace", "-f", "-y", "-s", "0", "-o", log.name, "-p", str(child.pid), *options]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
            assert strace.stderr is not None
            attached = strace.stderr.readline()
            os.close(go)
            ended = child.wait()
        assert "attached" in attached, attached
        return ended, log.read().splitlines()


def seen(lines: list[str], root: Path) -> list[tuple[str, str]]:
    """(kind, path) of each call that changed something below a folder."""
    found = []
    for line in lines:
        match = CALL.match(line)
        if match is None:
            continue
        name, arguments, returned = match.groups()
        opens = name in ("open", "openat", "creat")
        if opens and not re.search("O_WRONLY|O_RDWR|O_TRUNC|O_CREAT", arguments):
            continue
        kind = "open" if opens else KINDS.get(name, name)
        if name in ("symlink", "symlinkat"):
            arguments = arguments.partition(", ")[2]
        kind = "rmdir" if "AT_REMOVEDIR" in arguments else kind
        first = FIRST.match(arguments)
        assert first is not None
        folder, last = first.groups("")
        path = os.path.join(folder, last) if last else folder
        if f"{path}/".startswith(f"{root}/") and (kind, returned) != ("write", "0"):
            found.append((kind, path))
    return found


def bypasses(command: Command) -> Iterator[str]:
    """What strace saw and operations.py did not, or in another order."""
    command.set_up()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "log"

        def record() -> int:
            with Operations(command.place) as operations:
                code = command()
            report.write_text("".join(f"{o.kind}\t{o.path}\n" for o in operations.log))
            return code

        ended, lines = traced(record, "-e", f"trace={NAMES},{WRITES}")
        assert ended.code == 0, ended
        numbered = [tuple(line.split("\t")) for line in report.read_text().splitlines()]
    outside = seen(lines, command.place)
    inside = [each for each in numbered if each[0] != "create"]
    told = [each for each in outside if each[0] != "open"]
    known = {path for _, path in numbered} | {str(command.output / ".lock")}
    yield from (f"{path} is opened for writing" for kind, path in outside if kind == "open" and path not in known)
    if inside != told:
        first = next(
            (i for i, (a, b) in enumerate(zip(inside, told, strict=False)) if a != b), min(len(inside), len(told))
        )
        yield f"call {first}: {inside[first : first + 3]} are numbered, {told[first : first + 3]} were made"


def trials(invariants: Invariants, every: int) -> Iterator[list[str]]:
    """What is wrong after each fault; the first trial is the comparison."""
    command = invariants.command
    yield [f"{command.name}: {line}" for line in bypasses(command)]
    command.set_up()
    _, lines = traced(command, "-e", f"trace={NAMES}")
    calls = sum(line.split()[1][0].isalpha() for line in lines)  # the others tell of signals and ends
    for number, fault in zip(range(1, calls + 1, every), cycle(FAULTS)):
        command.set_up()
        ended, _ = traced(command, "-e", f"trace={NAMES}", "-e", f"inject={NAMES}:{fault}:when={number}")
        told = [] if ended.code == forked.KILLED else invariants.told(ended)
        where = f"{command.name}, {fault} at call {number}"
        yield [f"{where}: {line}" for line in (*told, *invariants.found(), *invariants.recover())]


def all_trials(work: Path, every: int) -> Iterator[list[str]]:
    if not works():
        raise SystemExit("strace is not installed, or may not trace")
    for command in commands(work):
        yield from trials(Invariants(command), every)


if __name__ == "__main__":
    sys.exit(scoreboard.run("faults from outside, by strace", "calls", all_trials))
