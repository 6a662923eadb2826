"""The runs of a folder: which there are, their curves as they grow, and the pages that were written about them."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..errors import DataError
from ..files.atomic import in_use
from ..files.regular import open_file, read_file
from ..files.strict_json import parse_json
from .app import SSE, event
from .bodies import Refused

KEYS = ("step", "epoch", "loss", "val_loss", "lr", "grad_norm", "tokens_per_second", "memory_gb", "time")
DEPTH, MOST_RUNS, MOST_POINTS = 2, 500, 2000
TAIL = 64 << 10  # bytes at the end of metrics.jsonl, in which its last steps are
MOST_READ = 4 << 20  # bytes of metrics.jsonl at one look, and of data.json
EVERY = 0.5  # seconds between two looks at a file
# a page of a run runs no script but its own, and knows no key and no cookie of this server
REPORT = {
    "Content-Security-Policy": "sandbox allow-scripts allow-downloads; default-src 'none'; style-src 'unsafe-inline'; "
    "img-src data:; script-src 'unsafe-inline'", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}  # fmt: skip


def run_routes(root: Path | None) -> list[Route]:
    """Routes under /runs and /pages of a folder of runs, or of one run; None: there are none."""

    def folder(name: str) -> Path:
        found = dict(find_runs(root)) if root else {}
        if name not in found:
            raise Refused(404, "there is no such run")
        return found[name]

    async def runs(http: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(_overview, root))

    async def events(http: Request) -> Response:
        place = folder(http.path_params["name"])
        return StreamingResponse(_follow(place, http), media_type="text/event-stream", headers=SSE)

    async def page(http: Request) -> Response:
        path = http.path_params["path"]
        found = dict(find_pages(root)) if root else {}
        if path not in found:
            raise Refused(404, "there is no such page")
        return FileResponse(found[path], media_type="text/html; charset=utf-8", headers=REPORT)

    return [Route("/runs", runs), Route("/runs/{name:path}/events", events), Route("/pages/{path:path}", page)]


def find_runs(root: Path) -> Iterator[tuple[str, Path]]:
    """The runs in a folder by their paths in it; the folder itself, if it is one, by its name."""
    for folder in _folders(root):
        if all(os.path.isfile(folder / name) for name in ("config.yaml", "metrics.jsonl")):
            yield _name(folder.relative_to(root) if folder != root else Path(root.resolve().name)), folder


def find_pages(root: Path) -> Iterator[tuple[str, Path]]:
    """The pages in a folder by their paths in it; none that a link leads out of it."""
    inside = root.resolve()
    for folder in _folders(root):
        for page in sorted(folder.glob("*.html")):
            if os.path.isfile(page) and page.resolve().is_relative_to(inside):
                yield _name(page.relative_to(root)), page


def _name(path: Path) -> str:
    r"""A path as text that JSON can hold: bytes that are no UTF-8 are escaped, as in \xc4."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _folders(root: Path) -> Iterator[Path]:
    """A folder and those in it, the newest first on each level, down to DEPTH."""
    level, count = [root] if root.is_dir() else [], 0
    for _ in range(DEPTH + 1):
        level = level[: MOST_RUNS - count]
        count += len(level)
        yield from level
        inner = [found for folder in level for found in _inside(folder)]
        level = [p for _, p in sorted(inner, reverse=True)]


def _inside(folder: Path) -> list[tuple[float, Path]]:
    """The folders in a folder with the times of their last change; none if it cannot be read, or is gone by now."""
    try:
        inner = [p for p in folder.iterdir() if not p.name.startswith(".") and not p.is_symlink() and p.is_dir()]
        return [(p.stat().st_mtime, p) for p in inner]
    except OSError:
        return []


def _overview(root: Path | None) -> dict[str, Any]:
    runs = [] if root is None else [{"name": name, **_state(folder)} for name, folder in find_runs(root)]
    return {"runs": runs, "pages": [] if root is None else [name for name, _ in find_pages(root)]}


def _state(folder: Path) -> dict[str, Any]:
    """How far a run is, by the end of its metrics."""
    path, last = folder / "metrics.jsonl", {}
    try:
        with open_file(path, DataError) as file:
            file.seek(max(path.stat().st_size - TAIL, 0))
            for line in file.read().split(b"\n"):
                last |= _point(line) or {}
    except (OSError, DataError):  # one run takes the page from no other
        return {"state": "unreadable", "steps": None}
    steps = _steps(folder)
    done = steps is not None and last.get("step", 0) >= steps
    return {"state": "finished" if done else "training" if in_use(folder) else "stopped", "steps": steps, **last}


def _steps(folder: Path) -> int | None:
    try:
        return _steps_in(folder / "data.json", (folder / "data.json").stat().st_mtime_ns)
    except (OSError, DataError, ValueError, KeyError, TypeError):
        return None


@lru_cache(MOST_RUNS)
def _steps_in(path: Path, changed: int) -> int | None:
    """The steps that a data.json tells, read once for each time at which it was changed."""
    steps = parse_json(read_file(path, DataError, MOST_READ))["steps"]
    return steps if isinstance(steps, int) and _finite(steps) else None


def _point(line: bytes) -> dict[str, float] | None:
    """The numbers of a line of metrics; None for a line that is broken or not complete."""
    try:
        value = parse_json(line)
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    return {k: v for k in KEYS if isinstance(v := value.get(k), (int, float)) and _finite(v)}


def _finite(number: float) -> bool:
    """Whether a float can hold a number of JSON, which may be an integer of any size."""
    return abs(number) <= sys.float_info.max


@dataclass
class Tail:
    """The lines that are added to a file, which may also be written anew."""

    path: Path
    _inode: int = -1
    _position: int = 0
    _rest: bytes = field(default=b"", repr=False)

    def read(self) -> tuple[bool, list[bytes]]:
        """Whether the file is another one than at the last call, and its new complete lines."""
        try:
            with open_file(self.path, DataError) as file:
                about = self.path.stat()
                anew = about.st_ino != self._inode or about.st_size < self._position
                if anew:
                    self._inode, self._position, self._rest = about.st_ino, 0, b""
                file.seek(self._position)
                new = file.read(MOST_READ)
        except (OSError, DataError):  # it is not there yet, or cannot be read
            return False, []
        self._position += len(new)
        *lines, rest = (self._rest + new).split(b"\n")
        self._rest = rest[-MOST_READ:]  # a hole in a file may be one line of any size
        return anew, lines


async def _follow(folder: Path, http: Request) -> AsyncIterator[str]:
    """Events of a run until the client goes: {"anew", "points", "state"}; a long past comes thinned."""
    tail, before = Tail(folder / "metrics.jsonl"), None
    quiet = 0.0
    while not http.scope["closing"]():
        anew, lines = await asyncio.to_thread(tail.read)
        points = [point for line in lines if (point := _point(line))]
        state = await asyncio.to_thread(_state, folder) if lines or quiet % 5 == 0 else before
        quiet += EVERY
        if anew or points or state != before:
            quiet, before = EVERY, state
            yield event({"anew": anew, "points": thinned(points), "state": state})
        elif quiet % 15 == 0:
            yield ": still here\n\n"
        await asyncio.sleep(EVERY)


def thinned(points: list[dict[str, float]]) -> list[dict[str, float]]:
    """At most about MOST_POINTS of the steps, evenly; every validation stays."""
    every = -(-len(points) // MOST_POINTS)
    return [p for n, p in enumerate(points) if every == 1 or n % every == 0 or "val_loss" in p or n == len(points) - 1]
