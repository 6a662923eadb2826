"""How the process keeps memory on a CPU: freed blocks for the next step, compiled matrix kernels for a few shapes.

glibc hands large blocks back to the system at every free and takes page faults at every allocation. A training step allocates
the same blocks again and again, so the thresholds are raised once, at the start of a command. oneDNN keeps the machine code of
its last 1024 matrix products; streams of tokens have a new length every step, so most of it is never used again.
"""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_heap() -> None:
    """Raise glibc's mmap and trim thresholds where there is glibc; call it before the first matrix product."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, 1 << 30)
    mallopt(M_TRIM_THRESHOLD, 1 << 30)
