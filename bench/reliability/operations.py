"""Every change that a process makes below a folder, numbered and recorded in order: the operations that a kill can come between.

The functions of `os` that change a disk are replaced, and the writing half of `open`. A fault strikes at one number: before the
operation, in the middle of it (half of a write), or after it.
"""

import builtins
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self
from unittest import mock

BEFORE, MIDDLE, AFTER = "before", "middle", "after"


class Operation(NamedTuple):
    """kind: create, write, truncate, fsync, mkdir, rmdir, unlink, symlink, rename; or promise, which is no operation of the disk.

    `inode` is that of what is created, written or flushed; `other` is the new name, or the target of a link.
    """

    kind: str
    path: str
    other: str = ""
    inode: int = 0
    offset: int = 0
    data: bytes = b""

    @property
    def parts(self) -> tuple[str, ...]:
        return (BEFORE, MIDDLE) if len(self.data) > 1 else (BEFORE,)


@dataclass
class Fault:
    """Call `strike` at a part of the operation of this number."""

    number: int
    part: str
    strike: Callable[[], Any]


class Operations:
    """A context in which the operations below `root` are recorded, in `log`."""

    def __init__(self, root: Path, fault: Fault | None = None):
        self.root, self.fault = os.path.realpath(root), fault
        self.log: list[Operation] = []

    def __enter__(self) -> Self:
        describe: dict[str, Callable[..., Operation | None]] = {
            "mkdir": lambda path, *_, dir_fd=None, **__: self._at("mkdir", path, dir_fd),
            "rmdir": lambda path, dir_fd=None: self._at("rmdir", path, dir_fd),
            "unlink": lambda path, dir_fd=None: self._at("unlink", path, dir_fd),
            "remove": lambda path, dir_fd=None: self._at("unlink", path, dir_fd),
            "rename": lambda old, new, **_: self._at("rename", old, other=self.path(new)),
            "replace": lambda old, new, **_: self._at("rename", old, other=self.path(new)),
            "symlink": lambda target, link, **_: self._at("symlink", link, other=os.fspath(target)),
            "truncate": lambda file, size: self._at("truncate", file, offset=size),
            "ftruncate": lambda file, size: self._at("truncate", file, offset=size),
            "fsync": lambda file: self._at("fsync", file if isinstance(file, int) else file.fileno()),
            "open": self._creates,
        }
        self._patches = [
            mock.patch.object(os, name, self._numbered(getattr(os, name), d)) for name, d in describe.items()
        ]
        self._patches.append(mock.patch.object(os, "sendfile", self._sendfile(os.sendfile)))
        opened = self._open(io.open)
        self._patches += [mock.patch.object(builtins, "open", opened), mock.patch.object(io, "open", opened)]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_) -> None:
        for patch in reversed(self._patches):
            patch.stop()

    def promise(self, what: str) -> None:
        """Note that the program acts from here on as if this were safe."""
        self.log.append(Operation("promise", what))

    def path(self, name: Any, dir_fd: int | None = None) -> str | None:
        """The absolute path of what a call names, a link in its last part not followed; None outside of the root."""
        if isinstance(name, int):
            found = os.readlink(f"/proc/self/fd/{name}").removesuffix(" (deleted)")
        else:
            base = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
            folder, last = os.path.split(os.path.join(base, os.fspath(name)))
            found = os.path.join(os.path.realpath(folder), last)
        return found if (found + os.sep).startswith(self.root + os.sep) else None

    def perform(self, operation: Operation, act: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        """Do an operation and record it, with the fault that strikes there. A write that stops in the middle is a short one."""
        fault = self.fault if self.fault and self.fault.number == len(self.log) else None
        if fault and fault.part == MIDDLE and half:
            act, operation = half, operation._replace(data=operation.data[: len(operation.data) // 2])
            self.fault = Fault(fault.number + 1, BEFORE, fault.strike)
        elif fault and fault.part == BEFORE:
            self.fault = None
            fault.strike()
        done = act()
        if operation.kind in ("create", "mkdir", "symlink"):
            operation = operation._replace(inode=os.lstat(operation.path).st_ino)
        self.log.append(operation)
        if fault and fault.part == AFTER:
            fault.strike()
        return done

    def _at(self, kind: str, name: Any, dir_fd: int | None = None, **more: Any) -> Operation | None:
        """The operation on a path or an open file; None outside of the root, and where nothing would change."""
        path = self.path(name, dir_fd)
        if path is None or os.path.lexists(path) == (kind in ("mkdir", "create", "symlink")):
            return None
        return Operation(kind, path, inode=os.stat(name).st_ino if kind in ("fsync", "truncate") else 0, **more)

    def _creates(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> Operation | None:
        return self._at("create", path, dir_fd) if flags & os.O_CREAT else None

    def _numbered(self, call: Callable, describe: Callable[..., Operation | None]) -> Callable:
        def stand_in(*args, **kwargs):
            operation = describe(*args, **kwargs)
            if operation is None:
                return call(*args, **kwargs)
            return self.perform(operation, lambda: call(*args, **kwargs))

        return stand_in

    def _sendfile(self, call: Callable) -> Callable:
        def stand_in(out, source, offset, count):
            data = os.pread(source, count, offset)
            found = self._at("write", out)
            if found is None or not data:
                return call(out, source, offset, count)
            found = found._replace(inode=os.fstat(out).st_ino, offset=os.lseek(out, 0, os.SEEK_CUR), data=data)
            send, half = lambda: call(out, source, offset, count), lambda: call(out, source, offset, len(data) // 2)
            return self.perform(found, send, half)

        return stand_in

    def _open(self, call: Callable) -> Callable:
        def stand_in(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
            path = self.path(file) if set(mode) & set("wax+") else None
            if path is None:
                return call(file, mode, buffering, encoding, errors, newline, closefd, opener)
            raw = self._begun(path, mode, lambda: _Written(self, file, mode.replace("b", ""), closefd, opener))
            buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffer if "b" in mode else io.TextIOWrapper(buffer, encoding, errors, newline, buffering == 1)

        return stand_in

    def _begun(self, path: str, mode: str, act: Callable[[], Any]) -> Any:
        """Open a file for writing, which may create it or cut what was in it."""
        if not os.path.lexists(path):
            return self.perform(Operation("create", path), act)
        if "w" in mode:
            return self.perform(Operation("truncate", path, inode=os.stat(path).st_ino), act)
        return act()


class _Written(io.FileIO):
    """A file whose writes are operations."""

    def __init__(self, operations: Operations, file: Any, mode: str, closefd: bool, opener: Any):
        super().__init__(file, mode, closefd, opener)
        self._operations, self._appends = operations, "a" in mode

    def write(self, data: Any) -> int:
        raw, write, now = bytes(data), super().write, os.fstat(self.fileno())
        offset = now.st_size if self._appends else self.tell()
        path = self._operations.path(self.fileno()) or ""
        operation = Operation("write", path, inode=now.st_ino, offset=offset, data=raw)
        return self._operations.perform(operation, lambda: write(raw), lambda: write(raw[: len(raw) // 2]))

    def truncate(self, size: int | None = None) -> int:
        size = self.tell() if size is None else size
        os.ftruncate(self.fileno(), size)
        return size
