"""The state of a training run on disk: the trained weights, the optimizer's moments by parameter name, and how far the run is.

Order and dropout are functions of (seed, step), so there is no other state. A snapshot is the folder `checkpoints/step-N`,
which appears whole and has a manifest of hashes. It is also a PEFT adapter folder, or with method full a Hugging Face folder;
where the adapter's file does not hold what is trained as it is (PiSSA, a projected prefix), that lies beside it.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapted import adapted
from ..checkpoint.adapter import factors_of, fill_adapter_folder
from ..checkpoint.method_folder import file_keys, state_beside
from ..checkpoint.save import OF_A_MODEL, write_checkpoint
from ..errors import CheckpointMismatch
from ..files.atomic import added, atomic_folder, discard, remove, verify_manifest, write_link
from ..files.model_folder import ADAPTER_WEIGHTS, ModelFolder
from ..files.regular import SMALL, read_file
from ..files.safetensors import SafetensorsFile, write_tensors
from ..files.strict_json import parse_json
from ..lora import LoRALinear, trained_parameters

OPTIMIZER, BESIDE, STATE = "optimizer.safetensors", "trained.safetensors", "state.json"
MODEL = "model.safetensors"
LINKS = LAST, BEST = "last", "best"  # of a run's checkpoints
# the names of what is written into a snapshot; .py is a model's own code
FILES = rf"(adapter_model|optimizer|trained)\.safetensors|(adapter_config|state)\.json|.*\.py|{OF_A_MODEL.pattern}"


def save_snapshot(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], base: Path, full: bool
) -> None:
    """Write `folder`, replacing an older one of that name; `state` must be JSON."""
    with atomic_folder(folder, manifest=True) as stage:
        fill_trained_folder(stage, model, base, full)
        moments = {}
        for name, p in trained_parameters(model).items():
            for key, value in optimizer.state[p].items():
                moments[f"{key}.{name}"] = value
        write_tensors(stage / OPTIMIZER, moments)
        if not full and (beside := state_beside(model)):
            write_tensors(stage / BESIDE, beside)
        (stage / STATE).write_text(json.dumps(state, indent=1) + "\n")


def fill_trained_folder(folder: Path, model: nn.Module, base: Path, full: bool) -> None:
    """Write what was trained into an empty folder: an adapter, or with `full` a checkpoint in fp32."""
    if not full:
        fill_adapter_folder(model, folder, str(base))
        return
    parameters = dict(model.named_parameters())
    shapes = {name: (p.dtype, tuple(p.shape)) for name, p in parameters.items()}
    write_checkpoint(folder, shapes, parameters.__getitem__, base, shard_bytes=1 << 62)
    j = ModelFolder(folder).config  # of another dtype: who opens the folder would round the weights
    for part in (j, *(v for v in j.values() if isinstance(v, dict))):
        part |= {key: "float32" for key in ("dtype", "torch_dtype") if key in part}
    (folder / "config.json").write_text(json.dumps(j, indent=2) + "\n")


def load_snapshot(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, full: bool) -> None:
    """Copy the tensors of a snapshot back, bit for bit; CheckpointMismatch if this model has other tensors."""
    parameters = trained_parameters(model)
    file, moments = SafetensorsFile(folder / (MODEL if full else ADAPTER_WEIGHTS)), SafetensorsFile(folder / OPTIMIZER)
    places = parameters if full else parameters | state_beside(model)
    if full:
        trained = {name: file.tensor(name) for name in file.entries}
    elif all(type(part) is LoRALinear for _, part in adapted(model)):
        trained = factors_of(model, folder)
    elif state_beside(model):  # a method's file has all of its parameters as they are, or none
        beside = SafetensorsFile(folder / BESIDE)
        trained = {name: beside.tensor(name) for name in beside.entries}
    else:
        trained = {name: file.tensor(key) for name, key in file_keys(model).items() if key in file.entries}
    _same_names(folder, set(places), set(trained))
    state_keys = ("step", "exp_avg", "exp_avg_sq")
    wanted = {f"{k}.{name}" for k in state_keys for name in parameters} if moments.entries else set()
    _same_names(folder, wanted, set(moments.entries))
    with torch.no_grad():
        for name, p in places.items():
            value = trained[name]
            if value.shape != p.shape:
                what = f"{folder}: {name} is {list(value.shape)}, this run has {list(p.shape)}"
                raise CheckpointMismatch(what, "Resume with the settings of that run.")
            p.copy_(value)
        for name, p in parameters.items():
            if moments.entries:
                optimizer.state[p] = {k: moments.tensor(f"{k}.{name}").to(p.device, copy=True) for k in state_keys}


def _same_names(folder: Path, wanted: set[str], found: set[str]) -> None:
    if wanted != found:
        example = min(wanted ^ found)
        raise CheckpointMismatch(
            f"{folder} has other tensors than this run, such as {example}", "Resume with the settings of that run."
        )


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON state of a verified snapshot."""
    return parse_json(read_file(folder / STATE, CheckpointMismatch, SMALL))


def newest_snapshot(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest snapshot that passes its manifest, and what is wrong with each newer one."""
    skipped = []
    for folder in sorted(snapshots(checkpoints), key=step_of, reverse=True):
        problem = verify_manifest(folder) or _state_problem(folder)
        if problem is None:
            return folder, skipped
        skipped.append(f"skipped {folder.name}: {problem}")
    return None, skipped


def _state_problem(folder: Path) -> str | None:
    """What is wrong with a snapshot's state: it is of another step, a folder that was renamed, or of another shape."""
    try:
        state = read_state(folder)
        number = int | float
        kinds = {
            "step": int,
            "seconds": number,
            "best_loss": number | None,
            "best_step": int | None,
            "identity": dict,
            "machine": dict,
        }
        wrong = [key for key, kind in kinds.items() if not isinstance(state[key], kind)]
    except (OSError, ValueError, TypeError, KeyError, CheckpointMismatch):
        return f"{STATE} is damaged"
    if wrong:
        return f"{STATE} has another {wrong[0]} than a run writes"
    return None if state["step"] == step_of(folder) else f"{STATE} is of step {state['step']}"


def snapshots(checkpoints: Path) -> list[Path]:
    return [p for p in checkpoints.glob("step-*") if p.is_dir() and re.fullmatch(r"step-(0|[1-9][0-9]{0,17})", p.name)]


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def rotate(checkpoints: Path, keep: int, step: int, best: int | None) -> None:
    """Point the links `last` and `best` at the snapshots of these steps, then delete all but the best and the newest `keep`.

    Snapshots of later steps are damaged (a resumed run has skipped them): they do not count. One to which its user has added
    something stays.
    """
    ordered = sorted((p for p in snapshots(checkpoints) if step_of(p) <= step), key=step_of)
    write_link(checkpoints / LAST, ordered[-1].name)
    if best is not None and (checkpoints / f"step-{best}").is_dir():
        write_link(checkpoints / BEST, f"step-{best}")
    for folder in ordered[:-keep]:
        if step_of(folder) != best and not added(folder, FILES):
            discard(folder)
    for leftover in checkpoints.glob(".tmp-step-*"):
        remove(leftover)
