"""`minilora convert`: a folder of pickle weights in, of a model or of an adapter, the same folder with safetensors out.

ChatGLM-6B and ChatGLM2-6B are published as pickle alone, and so are adapters of PEFT's first year. A pickle can run code when
it is read, so nothing here reads one: each shard is read in a process of its own (unpickle.py), which takes tensors and nothing
else and has bounded memory, time and output. What it wrote is then read back by the strict reader. The new folder appears whole
or not at all.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DiskError, ModelError, UsageError
from ..files.atomic import new_folder, require_empty
from ..files.hub_cache import check_namesake, lies_in
from ..files.mlx_adapter import WEIGHTS as MLX_WEIGHTS
from ..files.model_folder import (
    ADAPTER_CONFIG,
    ADAPTER_PICKLE,
    ADAPTER_WEIGHTS,
    check_folder,
    is_adapter,
    is_prefix_folder,
    read_json,
)  # fmt: skip
from ..files.safetensors import SafetensorsFile
from ..files.tensors import INDEX
from ..isolated import environment
from .load import read_config
from .save import copy_companions

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class Converted(NamedTuple):
    tensors: int
    bytes: int


def convert(folder: str | Path, output: str | Path, say: Callable[[str], Any] = lambda line: None) -> Converted:
    """Write the folder `output`; `say` gets a line for each shard. Memory is bounded by one shard.

    Raises ModelError for a pickle that holds more than tensors, and for a model that is not supported anyhow.
    """
    folder, output = Path(folder), Path(output)
    adapter = is_adapter(folder)
    if not adapter:
        check_folder(folder)
    if not adapter and not is_prefix_folder(folder):
        read_config(folder)  # a folder that could not be loaded afterwards is refused before the work
    if adapter:
        check_namesake(folder, folder / ADAPTER_CONFIG)
    require_empty(output)
    shards = _shards(folder)
    away = next((name for name in shards if (folder / name).is_file() and not lies_in(folder, folder / name)), None)
    if away is not None:
        raise ModelError(f"{folder / away} is a link out of the folder", "Copy the file here, if you trust it.")
    need = sum((folder / shard).stat().st_size for shard in shards)
    free = shutil.disk_usage(next(p for p in (output, *output.absolute().parents) if p.exists())).free
    if free < need:
        raise DiskError(f"{output} needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free", "Free some space.")
    whole = ADAPTER_WEIGHTS if adapter else "model.safetensors"
    with new_folder(output) as stage:
        places: dict[str, str] = {}
        size = 0
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else whole
            _unpickle(folder / shard, stage / name)
            for tensor, entry in SafetensorsFile(stage / name).entries.items():
                if tensor in places:
                    raise ModelError(
                        f"{folder / shard}: {tensor!r} lies in an earlier shard too",
                        "The folder mixes two checkpoints.",
                    )
                places[tensor] = name
                size += entry.end - entry.start
            say(f"shard {number} of {len(shards)}: {shard} -> {name}")
        if (folder / BIN_INDEX).exists():
            _check_index(folder, places)
        if len(shards) > 1:
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
            (stage / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        copy_companions(folder, stage)
        if adapter:
            shutil.copyfile(folder / ADAPTER_CONFIG, stage / ADAPTER_CONFIG)
    return Converted(len(places), size)


def _shards(folder: Path) -> list[str]:
    """The names of a folder's pickle files, in order."""
    if any((folder / name).exists() for name in ("model.safetensors", INDEX, ADAPTER_WEIGHTS, MLX_WEIGHTS)):
        raise UsageError(f"{folder} holds safetensors already", "Use it as it is.")
    if is_adapter(folder):
        if not (folder / ADAPTER_PICKLE).is_file():
            raise ModelError(
                f"{folder} has no {ADAPTER_PICKLE}", f"Give a folder with {ADAPTER_CONFIG} and its weights."
            )
        return [ADAPTER_PICKLE]
    if not (folder / BIN_INDEX).exists():
        if not (folder / BIN).is_file():
            raise ModelError(f"{folder} has neither {BIN} nor {BIN_INDEX}", "Give a folder with pickle weights.")
        return [BIN]
    shards = sorted({str(place) for place in _weight_map(folder).values()})
    for shard in shards:
        if shard != Path(shard).name or not shard.isprintable() or not shard.endswith(".bin"):
            raise ModelError(
                f"{folder / BIN_INDEX}: {shard[:80]!r} is not a file name here", "Do not trust this folder."
            )
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if absent:
        raise ModelError(
            f"{folder}: {', '.join(absent)} missing ({len(absent)} of {len(shards)} shards)",
            "Download the missing files.",
        )
    return shards


def _weight_map(folder: Path) -> dict[str, Any]:
    places = read_json(folder / BIN_INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ModelError(f"{folder / BIN_INDEX}: weight_map is missing or empty", "Download or copy the file again.")
    return places


def _check_index(folder: Path, found: dict[str, str]) -> None:
    """ModelError if the shards do not hold the tensors that the index lists."""
    wrong = sorted(set(_weight_map(folder)) ^ set(found))
    if wrong:
        raise ModelError(
            f"{folder}: {wrong[0]!r} and {len(wrong) - 1:,} more are not as {BIN_INDEX} lists them",
            "The index and the shards are of two checkpoints.",
        )


def _unpickle(pickle: Path, target: Path) -> None:
    """Have a shard written as safetensors by a process of its own; ModelError with what it says if it cannot."""
    command = [sys.executable, "-m", "minilora.checkpoint.unpickle", str(pickle.absolute()), str(target.absolute())]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, env=environment(), check=False)
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        said = lines[-1][:300] if lines else ""
        if done.returncode == 6:
            raise DiskError(f"{target.name}: {said}", "Free some space, or give another folder. Nothing was written.")
        why = said if done.returncode == 4 else f"the process that read it ended with {done.returncode}"
        raise ModelError(f"{pickle}: {why}", "Nothing was written. Do not trust this file, or download it again.")
    SafetensorsFile(target)
