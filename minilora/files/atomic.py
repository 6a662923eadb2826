"""Files that appear whole or not at all, and folders that one run owns.

A folder is written under a hidden name beside its place, every file is flushed to the disk, a manifest of sizes and hashes
goes in last, and one rename puts it where it belongs. A crash leaves `.tmp-*` or `.trash-*` names, which the next write
removes; it never leaves a half folder under a good name.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from ..errors import ModelError, OutputInUse, quote
from .regular import SMALL, open_file, read_file
from .strict_json import parse_json

MANIFEST = "MANIFEST.json"


@contextmanager
def atomic_folder(target: Path, manifest: bool = False) -> Iterator[Path]:
    """A new folder to fill; when the block ends well it becomes `target`, replacing what stood there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    stage = target.parent / f".tmp-{target.name}"
    stage.mkdir()
    try:
        yield stage
        if manifest:
            _write_manifest(stage)
        for path in [*stage.rglob("*"), stage]:
            _sync(path)
        if os.path.lexists(target):
            os.rename(target, target.parent / f".trash-{target.name}")
        os.rename(stage, target)
        _sync(target.parent)
    except BaseException as error:
        if target.exists() and not stage.exists():  # it had its name already: what failed leaves nothing behind
            os.rename(target, stage)
        if isinstance(error, OSError):
            error.filename = error.filename or str(target)
        raise
    finally:
        _sweep(target)


def _sweep(target: Path) -> None:
    """Take leftovers away; an old folder that was moved aside for one that never came is put back."""
    trash = target.parent / f".trash-{target.name}"
    if os.path.lexists(trash) and not target.exists():
        os.rename(trash, target)
    for path in (target.parent / f".tmp-{target.name}", trash):
        with suppress(OSError):
            remove(path)


def remove(path: Path) -> None:
    """Take a folder with all that is in it, or whatever else has this name, away; no link is followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def require_empty(folder: Path) -> None:
    """OutputInUse for a folder that holds something, for a file, and for what no rename can replace, or only with a surprise."""
    if folder.is_symlink():
        raise OutputInUse(f"{folder} is a link to {os.readlink(folder)}", "Give the folder itself, or a new one in it.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputInUse(f"{folder} is not empty", "Give another folder.")
    if folder.exists() and (os.path.ismount(folder) or folder.samefile(".")):
        what = "a mount point" if os.path.ismount(folder) else "the current folder"
        raise OutputInUse(f"{folder} is {what}, and a new folder takes its place in one step", "Give a new one in it.")


def require_own(folder: Path, names: Callable[[str], object]) -> None:
    """OutputInUse for a folder that holds what `names` is not true of: it would be lost with the folder that is replaced."""
    foreign = sorted(p.name for p in folder.iterdir() if not names(p.name)) if folder.is_dir() else []
    if foreign or (folder.exists() and not folder.is_dir()):
        what = f"{folder} holds {quote(foreign[0])}, which would be lost" if foreign else f"{folder} is a file"
        raise OutputInUse(what, "Take it out, or give another folder.")


def write_file(path: Path, content: bytes | str) -> None:
    """Write a small file in one piece: the old content or the new one is there, never a part."""
    stage = path.parent / f".tmp-{path.name}"
    stage.unlink(missing_ok=True)
    try:
        with open(stage, "xb") as file:  # through no link that lies there
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(stage, path)
        _sync(path.parent)
    finally:
        stage.unlink(missing_ok=True)


def write_link(link: Path, target: str) -> None:
    """Point a relative symbolic link at `target`, in one step."""
    stage = link.parent / f".tmp-{link.name}"
    stage.unlink(missing_ok=True)
    os.symlink(target, stage)
    os.replace(stage, link)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_manifest(folder: Path) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    sums = {str(p.relative_to(folder)): {"size": p.stat().st_size, "sha256": sha256(p)} for p in files}
    (folder / MANIFEST).write_text(json.dumps(sums, indent=1) + "\n")


def sha256(path: Path) -> str:
    """The hash of a file, in hex; ModelError for what is no regular file."""
    with open_file(path, ModelError) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_manifest(folder: Path) -> str | None:
    """What is wrong with a folder that was written with a manifest; None if every byte is as it was written."""
    try:
        sums = parse_json(read_file(folder / MANIFEST, ModelError, SMALL))
        if not sums:
            return f"{MANIFEST} is empty"
        for name, entry in sums.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["size"]:
                return f"{name} has {path.stat().st_size:,} of {entry['size']:,} bytes"
            if sha256(path) != entry["sha256"]:
                return f"{name} was changed"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, TypeError, KeyError, AttributeError, ModelError):
        return f"{MANIFEST} is damaged"
    return None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Own a folder while the block runs; OutputInUse if another process does. The lock ends with the process.

    A folder that is new and stays empty is taken away again.
    """
    new = not folder.exists()
    if os.path.lexists(folder) and not folder.is_dir():
        raise OutputInUse(
            f"{folder} is {'a file' if folder.exists() else 'a link to nothing'}", "Give another --output."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with _lock_file(folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise OutputInUse(
                f"{folder} is in use by {owner}", "Wait for it, stop it, or give another --output."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()}\n")
        file.flush()
        try:
            yield
        finally:
            if new and [p.name for p in folder.iterdir()] == [".lock"]:
                (folder / ".lock").unlink()
                folder.rmdir()


def _lock_file(folder: Path) -> TextIO:
    """The lock of a folder, made if it is not there; nothing is written through a link or into a pipe."""
    path = folder / ".lock"
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise OutputInUse(f"{path} is not a regular file", "Delete it, or give another --output.")
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666), "r+")


def in_use(folder: Path) -> bool:
    """Whether a process owns a folder (locked), this one included."""
    try:
        with open_file(folder / ".lock", OutputInUse) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (OSError, OutputInUse):  # no lock was ever there, or the file system knows none
        pass
    return False
