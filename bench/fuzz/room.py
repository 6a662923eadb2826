"""A folder for the files of a target, and a tiny model in it to lay them over."""

import atexit
import base64
import json
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

# in memory where there is such a place: a target writes thousands of files a second
ROOM = Path(tempfile.mkdtemp(prefix="minilora-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
SECRET = ROOM / "secret.safetensors"  # beside the folders that are opened
atexit.register(shutil.rmtree, ROOM, ignore_errors=True)


@cache
def tiny() -> Path:
    """The folder of the tiny model of the tests."""
    from tests.tiny import make_model

    folder = make_model(ROOM / "tiny")
    shutil.copyfile(folder / "model.safetensors", SECRET)
    return folder


def fresh(name: str) -> Path:
    """An empty folder of that name."""
    shutil.rmtree(ROOM / name, ignore_errors=True)
    (ROOM / name).mkdir()
    return ROOM / name


def plain(name: str) -> str:
    """A name that a file in a folder can have."""
    name = _sound(name).replace("/", "_")[:80]
    return name if name.strip(".") else "x"


def _sound(text: str) -> str:
    return text.encode("utf-8", "replace").decode().replace("\0", "_")


def lay(folder: Path, files: dict[str, Any]) -> None:
    """Put files into a folder: a text, {"base64": ...}, {"link": where}, {"pipe": 1}, or null for what shall not be there."""
    for name, held in files.items():
        path = folder / plain(name)
        if path.is_dir():
            continue
        path.unlink(missing_ok=True)
        if isinstance(held, str):
            path.write_bytes(held.encode("utf-8", "surrogatepass"))
        elif isinstance(held, dict) and isinstance(held.get("base64"), str):
            path.write_bytes(base64.b64decode(held["base64"].encode("ascii", "replace")))
        elif isinstance(held, dict) and "link" in held:
            path.symlink_to(_sound(str(held["link"]))[:200] or ".")
        elif isinstance(held, dict) and "pipe" in held:
            os.mkfifo(path)
        elif held is not None:
            path.write_text(json.dumps(held))
