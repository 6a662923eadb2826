"""Renders templates one after the other, each in a fork of the child process that minilora starts for one, with a tripwire inside.

Run as a script, isolated. In: a line of JSON for each order of jinja_child. Out: its exit status, and what it wrote.
"""

import io
import json
import os
import runpy
import sys
from typing import Any

sys.path.insert(0, sys.argv[1])  # of tripwire
child: dict[str, Any] = runpy.run_path(sys.argv[2])
child["main"].__globals__["SECONDS"] = 1  # of CPU, so that an endless one costs less
import tripwire

TOUCHED, HELD = 77, 1 << 20


def render(order: str, write: int) -> None:
    os.dup2(write, 1)
    os.close(2)
    sys.stdin, sys.stdout = io.StringIO(order), os.fdopen(1, "w")
    with tripwire.armed() as seen:
        try:
            child["main"]()
            sys.stdout.flush()
        except MemoryError:
            os._exit(3)
        except BaseException:  # noqa: BLE001 whatever it was, its code tells the parent
            os._exit(TOUCHED if seen else 4)
    os._exit(TOUCHED if seen else 0)


out = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(read)
        render(line, write)
    os.close(write)
    said = b""
    while piece := os.read(read, 1 << 16):
        said = said + piece if len(said) < 32 << 20 else said
    os.close(read)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(json.dumps([status, said.decode("utf-8", "replace")]), file=out, flush=True)
