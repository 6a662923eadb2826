"""Opens files for reading, and refuses everything that is not a regular file.

A pipe would block for ever, /dev/zero never ends, and a socket or a link to itself cannot be read. The kind of the file and
the caller's size limit are checked before anything is read.
"""

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

from ..errors import MiniloraError

SMALL = 64 << 20  # bytes that files of settings and numbers have at most


def open_file(path: Path, error: type[MiniloraError], most: int | None = None) -> BufferedReader:
    """A regular file of at most `most` bytes, open to read. Raises `error` for anything else, and OSError where nothing is there or a disk fails."""
    try:
        file = open(path, "rb", opener=_opener)  # noqa: SIM115 the caller closes it
    except OSError as why:
        if why.errno in (errno.ENOENT, errno.EIO):
            raise
        known = {
            errno.ELOOP: "is a link that leads to itself",
            errno.ENXIO: "is not a regular file",
            errno.EISDIR: "is a folder",
        }
        raise error(
            f"{path} {known.get(why.errno or 0, f'cannot be opened: {why.strerror}')}", "Check the path."
        ) from None
    try:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise error(f"{path} is not a regular file", "Check the path.")
        if most is not None and about.st_size > most:
            raise error(f"{path} is larger than {most:,} bytes", "It is not the file it should be.")
        return file
    except BaseException:
        file.close()
        raise


def _opener(path: str, flags: int) -> int:
    """The file has an owner from the start: a Ctrl-C in between could close the number of one that is closed already."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)  # a pipe without a writer would block


def read_file(path: Path, error: type[MiniloraError], most: int | None = None) -> bytes:
    """All bytes of a regular file; raises as open_file does."""
    with open_file(path, error, most) as file:
        return file.read()
