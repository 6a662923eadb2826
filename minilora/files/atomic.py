"""Files that appear whole or not at all, and folders that one run owns.

A folder is written under a hidden name beside its place, every file is flushed to the disk, a manifest of sizes and hashes
goes in last, and one rename puts it where it belongs. A crash leaves `.tmp-*` or `.trash-*` names, which the next write
removes; it never leaves a half folder under a good name. One process at a time fills a folder of one name: the others are refused.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from ..errors import DiskError, ModelError, OutputInUse, UsageError, quote
from .regular import SMALL, open_file, read_file
from .run_folder import require_outside_runs
from .strict_json import parse_json

MANIFEST = "MANIFEST.json"


@contextmanager
def atomic_folder(target: Path, manifest: bool = False, new: bool = False) -> Iterator[Path]:
    """A new folder to fill; when the block ends well it becomes `target`, replacing what stands there, or with `new` nothing.

    Raises OutputInUse if another process is filling one for the same place.
    """
    make_folder(target.parent)
    stage, trash = target.parent / f".tmp-{target.name}", target.parent / f".trash-{target.name}"
    handle = _claim(target)
    try:
        yield stage
        if manifest:
            _write_manifest(stage)
        for path in [*stage.rglob("*"), stage]:
            sync(path)
        with _alone_in(target.parent):
            if new:
                require_empty(target)  # an empty folder is replaced by the rename, and never one that is not
            elif os.path.lexists(target):
                os.rename(target, trash)
            os.rename(stage, target)
            sync(target.parent)
    except BaseException as error:
        # it had its name already: what failed leaves nothing behind
        if target.exists() and os.path.samestat(target.stat(), os.fstat(handle)):
            os.rename(target, stage)
        _sweep(target)
        if isinstance(error, OSError):
            error.filename = error.filename or str(target)
        raise
    else:  # beyond the handler, which would put back what is deleted here
        with _alone_in(target.parent), suppress(OSError):
            remove(trash)
    finally:
        os.close(handle)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """The same for a name that must be free: OutputInUse also for a folder that appears while it is filled, such as a run's."""
    with atomic_folder(target, new=True) as stage:
        require_empty(target)
        yield stage


def _claim(target: Path) -> int:
    """Make the stage, empty, and return its handle: it is locked as long as that is open. OutputInUse if another process fills it."""
    stage = target.parent / f".tmp-{target.name}"
    with _alone_in(target.parent):
        try:
            os.close(_lock(stage, fcntl.LOCK_NB))
        except BlockingIOError:
            hint = "Wait for it, or give another name."
            raise OutputInUse(f"{target} is being written by another process", hint) from None
        except OSError:  # there is none, or it is no folder
            pass
        _sweep(target)
        stage.mkdir()
        return _lock(stage, fcntl.LOCK_NB)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """No other process makes or replaces a name in the folder while the block runs. It is short: others wait."""
    handle = _lock(folder)
    try:
        yield
    finally:
        os.close(handle)


def _lock(folder: Path, wait: int = 0) -> int:
    """A handle of a folder, which is locked as long as it is open, if the file system knows locks; BlockingIOError if it is taken."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | wait)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:
        pass
    return handle


def sync(path: Path) -> None:
    """Have what was written to a file, or the names in a folder, on the disk before anything else is done."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, each with its name on the disk: a file in it is lost with its folder otherwise."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


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


def discard(path: Path) -> None:
    """Take what has this name away in one step: a folder is never there in part, not even after a power cut."""
    stage = path.parent / f".tmp-{path.name}"
    remove(stage)
    if os.path.lexists(path):
        os.rename(path, stage)
        sync(path.parent)
    remove(stage)


def require_empty(folder: Path) -> None:
    """OutputInUse for a folder that holds something or lies in a run's own, for a file, and for what no rename can replace, or only with a surprise."""
    require_place(folder)
    if folder.is_symlink():
        raise OutputInUse(f"{folder} is a link to {os.readlink(folder)}", "Give the folder itself, or a new one in it.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputInUse(f"{folder} is not empty", "Give another folder.")
    if folder.exists() and (os.path.ismount(folder) or folder.samefile(".")):
        what = "a mount point" if os.path.ismount(folder) else "the current folder"
        raise OutputInUse(f"{folder} is {what}, and a new folder takes its place in one step", "Give a new one in it.")


def require_place(path: Path) -> None:
    """What would keep an output from being written, told before the work that would be lost with it.

    OutputInUse in a run's own folder, UsageError below a file, DiskError where nothing can be written; folders that are missing can be made.
    """
    require_outside_runs(path)
    above = next(p for p in path.absolute().parents if os.path.lexists(p))
    if not above.is_dir():
        raise UsageError(f"{above} is no folder, and {path} would lie in it", "Give another place.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise DiskError(f"nothing can be written in {above}", "Give another place, or mend its permissions.")
    if len(os.fsencode(f".trash-{path.name}")) > os.pathconf(above, "PC_NAME_MAX"):
        raise UsageError(f"{path} is too long a name", "Give a shorter one.")


def require_own(folder: Path, names: Callable[[str], object]) -> None:
    """OutputInUse for a folder that holds what `names` is not true of: it would be lost with the folder that is replaced."""
    foreign = sorted(p.name for p in folder.iterdir() if not names(p.name)) if folder.is_dir() else []
    if foreign or (folder.exists() and not folder.is_dir()):
        what = f"{folder} holds {quote(foreign[0])}, which would be lost" if foreign else f"{folder} is a file"
        raise OutputInUse(what, "Take it out, or give another folder.")


def write_file(path: Path, content: bytes | str) -> None:
    """Write a small file in one piece: the old content or the new one is there, never a part."""
    stage = path.parent / f".tmp-{path.name}"
    with _alone_in(path.parent):
        stage.unlink(missing_ok=True)
        try:
            with open(stage, "xb") as file:  # through no link that lies there
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(stage, path)
            sync(path.parent)
        finally:
            stage.unlink(missing_ok=True)


def write_output(path: Path, content: bytes | str) -> None:
    """Write a small file where a user wants it, as write_file does; folders that are missing are made."""
    make_folder(path.parent)
    write_file(path, content)


def write_link(link: Path, target: str) -> None:
    """Point a relative symbolic link at `target`, in one step; nothing but another link is replaced."""
    require_link(link)
    stage = link.parent / f".tmp-{link.name}"
    stage.unlink(missing_ok=True)
    os.symlink(target, stage)
    os.replace(stage, link)
    sync(link.parent)


def require_link(link: Path) -> None:
    """OutputInUse for a folder or a file where a link belongs."""
    if os.path.lexists(link) and not link.is_symlink():
        what = f"{link} is no link, as in a copy that was made with its links followed"
        raise OutputInUse(what, "Take it away, or copy again with cp -a.")


def _write_manifest(folder: Path) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    sums = {str(p.relative_to(folder)): {"size": p.stat().st_size, "sha256": sha256(p)} for p in files}
    (folder / MANIFEST).write_text(json.dumps(sums, indent=1) + "\n")


def sha256(path: Path) -> str:
    """The hash of a file, in hex; ModelError for what is no regular file."""
    with open_file(path, ModelError) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def added(folder: Path, usual: str) -> list[Path]:
    """What lies in a folder and is not listed in its manifest: its user's, as is all where there is none. If it is damaged, names that match `usual` are its own."""
    try:
        sums = parse_json(read_file(folder / MANIFEST, ModelError, SMALL))
        listed = {MANIFEST, *(Path(name).parts[0] for name in sums)}
    except FileNotFoundError:
        listed = set()
    except (OSError, ValueError, TypeError, IndexError, ModelError):
        listed = {MANIFEST, *(p.name for p in folder.iterdir() if re.fullmatch(usual, p.name))}
    return [p for p in sorted(folder.iterdir()) if p.name not in listed and not p.name.startswith(".")]


def verify_manifest(folder: Path) -> str | None:
    """What is wrong with a folder that was written with a manifest; None if every byte is as it was written."""
    try:
        sums = parse_json(read_file(folder / MANIFEST, ModelError, SMALL))
        if not sums:
            return f"{MANIFEST} is empty"
        for name, entry in sums.items():
            path = folder / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                return f"{MANIFEST} names {quote(name)}"
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
    make_folder(folder)
    with _lock_file(folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = file.read().strip() or "another process"
            raise OutputInUse(
                f"{folder} is in use by {owner}", "Wait for it, stop it, or give another --output."
            ) from None
        file.truncate()  # at its beginning
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
