"""Python processes that minilora starts: they import it, and nothing that lies in the current folder.

`python -m` looks into the current folder first: there a file torch.py of a stranger's folder would be run.
"""

import os
import resource
from pathlib import Path

PARENT = Path(__file__).absolute().parents[1]
STATM = Path("/proc/self/statm")  # Linux: what a process has, in pages


def environment() -> dict[str, str]:
    """The environment for such a process, which begins with `sys.executable -m minilora...`."""
    paths = filter(None, [str(PARENT), os.environ.get("PYTHONPATH")])
    return os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(paths)}


def bound(memory: int, seconds: int, written: int) -> None:
    """Limit what this process may take from now on: bytes of memory beside what it has, seconds of CPU, bytes of each file."""
    limits = {resource.RLIMIT_CPU: seconds, resource.RLIMIT_FSIZE: written, resource.RLIMIT_CORE: 0}
    if STATM.exists():
        has = int(STATM.read_text().split()[0]) * resource.getpagesize()
        limits[resource.RLIMIT_AS] = has + memory
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
