"""How fast a folder's file system writes and reads."""

import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

SIZE = 1 << 26  # bytes of the file


class FileSpeed(NamedTuple):
    """Bytes a second of a file that is written and flushed to the disk, and that is read again; bytes that are free."""

    write: float
    read: float
    free: int


def file_speed(folder: Path) -> FileSpeed:
    """Of a file without a name, so that nothing is left. Raises OSError."""
    block = os.urandom(SIZE)
    with tempfile.TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter()
        if hasattr(os, "posix_fadvise"):  # from the disk, not from the system's memory, where the file system can
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        reading = time.perf_counter()
        os.pread(file.fileno(), SIZE, 0)
        seconds = time.perf_counter() - reading
        disk = os.fstatvfs(file.fileno())
    return FileSpeed(SIZE / (written - start), SIZE / seconds, disk.f_bavail * disk.f_frsize)
