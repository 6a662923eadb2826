"""Notices what reading a stranger's file must never do: write elsewhere, start a process, open a connection, read a secret.

An audit hook (PEP 578) cannot be taken out again, so there is one for the process, which looks only while it is armed. What it
sees is refused and kept: the code that is tried may swallow the refusal, the list stays.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# events whose arguments begin with the paths that they change
CHANGES = {
    "os.remove": 1, "os.rename": 2, "os.rmdir": 1, "os.mkdir": 1, "os.symlink": 2, "os.link": 2, "os.chmod": 1, "os.chown": 1,
    "os.truncate": 1, "os.utime": 1, "os.mkfifo": 1, "os.mknod": 1, "shutil.rmtree": 1,
}  # fmt: skip
PROCESSES = {
    "subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn",
}  # fmt: skip
CONNECTIONS = {
    "socket.connect",
    "socket.bind",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "socket.sendto",
    "socket.sendmsg",
}


class Tripwire:
    """What is allowed while it is armed, and what was seen that is not."""

    def __init__(self) -> None:
        self.armed = False
        self.writable: tuple[str, ...] = ()
        self.secrets: tuple[str, ...] = ()
        self.links = True  # whether a secret is one behind a link too
        self.children: tuple[str, ...] = ()  # what the command line of a process that may be started ends with
        self.seen: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        found = self._found(event, arguments)
        if found:
            self.seen.append(found)
            raise PermissionError(found)

    def _found(self, event: str, arguments: tuple[Any, ...]) -> str | None:
        if event == "open":
            path, mode, flags = arguments
            if isinstance(path, int) or path is None:
                return None
            writes = bool(flags & WRITES) if isinstance(flags, int) else any(c in str(mode) for c in "wax+")
            if self.secrets and self._within(os.path.realpath(path) if self.links else path, self.secrets):
                return f"opened {path!r}"
            return f"opened {path!r} to write" if writes and not self._within(path, self.writable) else None
        if event in CHANGES:
            paths = [path for path in arguments[: CHANGES[event]] if not isinstance(path, int) and path is not None]
            if event == "os.symlink":
                paths = paths[1:]  # the first is what it points to
            at = (
                arguments[-1] if isinstance(arguments[-1], int) and arguments[-1] >= 0 else None
            )  # a folder's descriptor
            if at is not None and event in ("os.remove", "os.rmdir", "os.mkdir"):
                paths = [os.path.join(os.readlink(f"/proc/self/fd/{at}"), os.fsdecode(path)) for path in paths]
            changed = next((path for path in paths if not self._within(path, self.writable)), None)
            return f"{event} {changed!r}" if changed is not None else None
        if event == "subprocess.Popen" and any(str(arguments[1][-1]).endswith(c) for c in self.children):
            return None
        return f"{event} {arguments!r:.200}" if event in PROCESSES or event in CONNECTIONS else None

    @staticmethod
    def _within(path: Any, folders: Sequence[str]) -> bool:
        full = os.path.abspath(os.fsdecode(path))
        return any(full == folder or full.startswith(folder + "/") for folder in folders)


TRIPWIRE = Tripwire()
_installed = False


@contextmanager
def armed(
    writable: Sequence[Path] = (), secrets: Sequence[Path] = (), children: Sequence[str] = (), links: bool = True
) -> Iterator[list[str]]:
    """Watch until the end of the block; the list is of what was seen, whether or not anyone heard the refusal.

    Files may be written within `writable`, none of `secrets` may be opened, and processes whose command line ends with one of
    `children` may be started. Without `links`, a secret may be opened by a link that lies elsewhere.
    """
    global _installed
    if not _installed:
        sys.addaudithook(TRIPWIRE)
        _installed = True
    wire = TRIPWIRE
    wire.writable = (*(str(path) for path in writable), "/dev/null")
    wire.links = links
    wire.secrets, wire.children, wire.seen = tuple(map(str, secrets)), tuple(children), []
    wire.armed = True
    try:
        yield wire.seen
    finally:
        wire.armed = False
