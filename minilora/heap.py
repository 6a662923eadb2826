"""Keep freed memory in the process.

glibc hands large blocks back to the system at every free and takes page faults at every allocation. A training step allocates
the same blocks again and again, so the thresholds are raised once, at the start of a command.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_heap() -> None:
    """Raise glibc's mmap and trim thresholds; does nothing where there is no glibc."""
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, 1 << 30)
    mallopt(M_TRIM_THRESHOLD, 1 << 30)
