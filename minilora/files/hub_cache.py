"""Finds a model by its hub name, such as Qwen/Qwen2.5-0.5B-Instruct, in the local cache of Hugging Face or ModelScope.

    HF_HUB_CACHE/models--Org--Name/refs/main                  the commit, the name of a folder in snapshots/
    HF_HUB_CACHE/models--Org--Name/snapshots/COMMIT/          links into models--Org--Name/blobs/
    MODELSCOPE_CACHE/models/Org--Name/snapshots/master/       and the layouts of older versions, with ___ for a dot

Nothing is downloaded, and a link that leads out of a cache is refused. Layouts: huggingface_hub 2.4, modelscope 1.40.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import ModelError
from .regular import read_file

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def cached(given: str | Path) -> Path:
    """The cached folder of a hub name; a path, or a name that no cache has, comes back unchanged."""
    path = Path(given)
    if not HUB_ID.fullmatch(str(given)) or path.exists():
        return path
    return next((p for p in (*_hugging_face(str(given)), *_modelscope(str(given))) if _inside(p)), path)


def not_cached(given: Path) -> ModelError | None:
    """The error for a hub name that no cache has; None for anything else, such as a mistyped path."""
    if not HUB_ID.fullmatch(str(given)) or given.parent.is_dir():
        return None
    what = f"{given} is not a folder, and not in the caches {hugging_face_cache()} and {modelscope_cache()}"
    hint = f"Nothing is downloaded here: hf download {given}, or modelscope download --model {given}, fetches it."
    return ModelError(what, hint)


def hugging_face_cache() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    home = Path(os.environ.get("HF_HOME") or home)
    return Path(os.path.expanduser(os.path.expandvars(os.environ.get("HF_HUB_CACHE") or home / "hub")))


def modelscope_cache() -> Path:
    return Path(os.path.expanduser(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope"))


def _hugging_face(name: str) -> Iterator[Path]:
    folder = hugging_face_cache() / f"models--{name.replace('/', '--')}"
    reference = folder / "refs" / "main"
    commit = read_file(reference, ModelError, 64).decode("ascii", "replace").strip() if reference.is_file() else ""
    if re.fullmatch("[0-9a-f]{40}", commit):
        yield folder / "snapshots" / commit


def _modelscope(name: str) -> Iterator[Path]:
    cache, (owner, model) = modelscope_cache(), name.split("/")
    yield from (cache / "models" / f"{owner}--{model}" / "snapshots" / branch for branch in ("master", "main"))
    for older in (cache / "models", cache / "hub" / "models", cache / "hub", cache):
        yield from (older / owner / model.replace(".", "___"), older / owner / model)


def _inside(folder: Path) -> bool:
    """Whether a folder is there; ModelError if one of its files is a link out of it, but for one into the blobs of its snapshot."""
    if not folder.is_dir():
        return False
    away = next((p for p in sorted(folder.iterdir()) if p.is_symlink() and not lies_in(folder, p)), None)
    if away is not None:
        raise ModelError(f"{away} is a link out of the cache", "Do not trust this folder: fetch it again.")
    return True


def lies_in(folder: Path, path: Path) -> bool:
    """Whether a file lies in a folder itself, or a link leads to the blobs of the folder's own Hugging Face cache."""
    here = Path(os.path.realpath(folder))
    homes = {here, here.parents[1] / "blobs"} if here.parent.name == "snapshots" else {here}
    return Path(os.path.realpath(path)).parent in homes


def check_namesake(folder: Path, path: Path) -> None:
    """ModelError for a link to a file of another name outside its folder: what is copied from it could be anybody's, such as a key."""
    target = Path(os.path.realpath(path))
    in_cache = target.parent.name == "blobs" and target.parents[1].name.startswith("models--")
    if not (lies_in(folder, path) or target.name == path.name or in_cache):
        raise ModelError(f"{path} is a link to {target}", "Copy the file here, if it is the one that belongs here.")
