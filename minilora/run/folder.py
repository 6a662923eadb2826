"""The folder of a run: check that it is free, save the state of the run into it, resume from it."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from minilora.models.decoder import Decoder

from ..checkpoint.save import OF_A_MODEL, own_code
from ..config import TrainConfig, defaults, must_match, to_yaml
from ..console import Console
from ..errors import CheckpointMismatch, DiskError, OutputInUse, UsageError
from ..files.atomic import added, discard, in_use, remove, require_link, sync, verify_manifest, write_file
from ..files.model_folder import ModelFolder, trained_in
from ..files.run_folder import is_run
from ..lora import check_trained, trained_parameters
from ..machine.compute import name_of
from ..machine.gemm import GEMM, forms_text, write_choice
from ..ranks.ranks import ALONE, Ranks
from ..report.record import TRAINED_ROWS, read_json_file
from ..rows.dataset import Data, trained_rows, write_split
from ..rows.sources import parse_sources
from ..settings import read_yaml
from .loggers import PLACES
from .schedule import Plan, data_record
from .snapshot import (
    FILES,
    LINKS,
    load_snapshot,
    newest_snapshot,
    read_state,
    rotate,
    save_snapshot,
    snapshots,
    step_of,
)

# what a run writes, beside config.yaml and metrics.jsonl, which mark the folder as a run's
OWN = (
    "checkpoints", "adapter", "model", "predict", "samples.jsonl", "data", TRAINED_ROWS, "data.json", GEMM, "loss.png", "report.html",
)  # fmt: skip
NOTHING = "(?!)"  # a pattern that matches no name
# what is in its folders, whose names are common ones; one of method full has a model in place of an adapter
OF_A_RUN = {
    "checkpoints": r"step-\d+|last|best", "data": r"(val|test)\.jsonl|split\.json", "adapter": r"adapter_(config\.json|model\.safetensors)",
    "predict": r"generated_predictions\.jsonl|predict_results\.json|part\.jsonl", "model": NOTHING,
}  # fmt: skip


@dataclass
class Progress:
    """How far a run is: what a snapshot stores beside the tensors."""

    step: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    saved: int | None = None  # the step of the newest snapshot


@dataclass
class Run:
    """A training run: its folder, its plan, what it trains, and how far it is."""

    folder: Path
    config: TrainConfig
    plan: Plan
    model: Decoder
    optimizer: torch.optim.AdamW
    progress: Progress
    ranks: Ranks = ALONE

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


def check_output(folder: Path, resume: bool, overwrite: bool) -> None:
    """OutputInUse unless the run folder is empty, or is resumed, or holds a run that the user lets us delete."""
    for name in (*OWN, "config.yaml", "metrics.jsonl", *PLACES) if resume or overwrite else ():
        if (folder / name).is_symlink():
            what = f"{folder / name} is a link to {os.readlink(folder / name)}, and a run writes through none"
            raise OutputInUse(what, "Put there what it leads to, or take it away.")
    for name in LINKS if resume else ():
        require_link(folder / "checkpoints" / name)
    held = [p for p in folder.iterdir() if not p.name.startswith(".") and not _is_empty_metrics(p)]
    if overwrite and held and not is_run(folder):
        raise OutputInUse(f"{folder} holds no run that --overwrite could delete", "Give another --output.")
    foreign = next(_foreign(folder), None) if overwrite else None
    if foreign is not None:
        raise OutputInUse(
            f"{foreign} was written by no run, and --overwrite would delete it",
            "Take it out, or give another --output.",
        )
    if overwrite and in_use(folder / "predict"):
        raise OutputInUse(f"{folder / 'predict'} is being written, and --overwrite would delete it", "Wait for it.")
    if held and not resume and not overwrite:
        hint = "Go on with --resume, start again with --overwrite, or give another --output."
        raise OutputInUse(f"{folder} is not empty", hint)


def _foreign(folder: Path) -> Iterator[Path]:
    """What lies in the folders of a run and was not written by it."""
    was, names = _settings(folder), dict(OF_A_RUN)
    if was.get("method") == "full":
        code = own_code(ModelFolder(str(was.get("model"))).path)
        names |= {"model": "|".join((OF_A_MODEL.pattern, *map(re.escape, code))), "adapter": NOTHING}
    for name, own in names.items():
        inside = folder / name
        yield from (
            p for p in (inside.iterdir() if inside.is_dir() else ()) if not re.fullmatch(rf"{own}|\..*", p.name)
        )
    for snapshot in (folder / "checkpoints").glob("[!.]*/"):
        yield from added(snapshot, FILES)


def _settings(folder: Path) -> dict[str, Any]:
    """The settings of the run that a folder holds, as far as they can be read."""
    try:
        return read_yaml(folder / "config.yaml")
    except UsageError:
        return {}


def check_cache(config: TrainConfig) -> None:
    """OutputInUse for a cache of tokens where the run writes files of its own."""
    there = Path(os.path.realpath(config.cache))
    own = next(
        (name for name in OWN if (Path(os.path.realpath(config.output)) / name) in (there, *there.parents)), None
    )
    if config.cache and own:
        raise OutputInUse(f"--cache {config.cache} lies in the run's own {own}", "Give another folder.")


def check_not_read(config: TrainConfig) -> None:
    """OutputInUse if --overwrite would delete what the new run reads: a model or rows in its own folder, or behind a link into it."""
    files = [s.path for text in (config.data, config.val, config.mix_general) if text for s in parse_sources(text)]
    own = {os.path.realpath(Path(config.output) / name) for name in OWN}
    read = [Path(path) for path in (trained_in(Path(config.model)), config.cache, *files) if path]
    for path in [*read, *(inner for folder in read if folder.is_dir() for inner in folder.iterdir())]:
        there = Path(os.path.realpath(path))
        if not own.isdisjoint(map(str, (there, *there.parents))):
            raise OutputInUse(f"--overwrite would delete {path}, which this run reads", "Give another --output.")


def after_restart(folder: Path, launch: str | None, resume: bool, overwrite: bool) -> tuple[bool, bool]:
    """Whether a run that torchrun starts again resumes, and whether it may overwrite.

    What this launch began goes on, from its first step if nothing was saved; all else is as was asked, as when it started first.
    """
    record = folder / "data.json"
    if launch is None or not record.is_file() or read_json_file(record).get("launch") != launch:
        return resume, overwrite
    saved = bool(snapshots(folder / "checkpoints"))
    return saved, not saved


def _is_empty_metrics(path: Path) -> bool:
    """Whether this is what a run writes first: one that was killed before it wrote more has nothing that could be lost."""
    return path.name == "metrics.jsonl" and path.is_file() and path.stat().st_size == 0


def check_unlocked(folder: Path, overwrite: bool) -> None:
    """The same for a folder that no run has locked yet, so that not even a lock file is written where none belongs."""
    if folder.is_dir() and not (folder / ".lock").exists():
        check_output(folder, resume=False, overwrite=overwrite)


def clear(folder: Path) -> None:
    """Delete an old run and nothing else; OutputInUse as by check_output, for what came while the new run was loading.

    Call it once everything that the new run needs has been read.

    Its config.yaml and an empty metrics.jsonl stay until the new run's take their place: whenever this is cut short, the folder is
    still a run's, which --overwrite may delete.
    """
    check_output(folder, resume=False, overwrite=True)
    write_file(folder / "metrics.jsonl", "")
    for name in OWN:
        discard(folder / name)
        remove(folder / f".trash-{name}")


def check_disk(folder: Path, model: Decoder, keep: int) -> None:
    """DiskError now rather than at a later save: each snapshot still to come takes 12 bytes a trained parameter.

    There are `keep` of them, the best, and the one being written; a resumed run has some already.
    """
    to_come = max(keep + 2 - len(snapshots(folder / "checkpoints")), 1)
    need = 12 * to_come * sum(p.numel() for p in trained_parameters(model).values()) + (1 << 20)
    free = shutil.disk_usage(folder).free
    if free < need:
        what = f"{folder}: checkpoints need {need / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free"
        raise DiskError(what, "Free some space, or give another --output.")


def write_beginning(run: Run, data: Data, overwrite: bool) -> None:
    """Write what a run knows before its first step: its settings, a record of its rows, and which rows it trains on.

    Deletes an older run first if that is to be overwritten. Raises DiskError if there is too little room for the checkpoints.
    """
    if overwrite:
        clear(run.folder)
    check_disk(run.folder, run.model, run.config.keep_checkpoints)
    if not (run.folder / "metrics.jsonl").exists():
        write_file(run.folder / "metrics.jsonl", "")
    if overwrite or _settings(run.folder) != asdict(run.config):  # one that says the same may have its user's comments
        write_file(run.folder / "config.yaml", to_yaml(run.config))
    write_choice(run.folder / GEMM, run.model.head.device)
    trained = sum(p.numel() for p in trained_parameters(run.model).values())
    record = data_record(data, run.plan) | {"trained_parameters": trained, "launch": run.ranks.launch}
    write_file(run.folder / "data.json", json.dumps(record) + "\n")
    write_file(run.folder / TRAINED_ROWS, trained_rows(run.plan.train).astype("<u8").tobytes())
    if not (run.folder / "data").exists():  # a resumed run has the same, and perhaps files of its user beside them
        write_split(run.folder / "data", data)


def save(run: Run) -> None:
    """Write a snapshot of the current step, then delete older ones; all ranks have the same state, and the first writes it.

    Raises Diverged, and writes nothing, if a weight is not finite.
    """
    at = run.progress
    check_trained(run.model, at.step)
    at.saved = at.step
    if not run.ranks.first:
        return
    state: dict[str, Any] = {
        "step": at.step,
        "seconds": at.seconds,
        "best_loss": at.best_loss,
        "best_step": at.best_step,
    }
    state |= {"identity": _identity(run), "machine": _machine(run)}
    sync(run.folder / "metrics.jsonl")  # a run that goes on from the snapshot does not make its lines again
    folder = run.checkpoints / f"step-{at.step}"
    save_snapshot(folder, run.model, run.optimizer, state, Path(run.config.model), run.plan.full)
    rotate(run.checkpoints, run.config.keep_checkpoints, at.step, at.best_step)


def restore(run: Run, console: Console) -> None:
    """Load the newest undamaged snapshot into the model and the optimizer; CheckpointMismatch if its settings differ.

    The first rank chooses it: on a shared file system the others may not see all yet, or see it late.
    """
    found, skipped = newest_snapshot(run.checkpoints) if run.ranks.first else (None, [])
    for line in skipped:
        console.say(line)
    name = run.ranks.share(found and found.name)
    if name is None:
        raise CheckpointMismatch(f"{run.folder} has no checkpoint to go on from", "Start again with --overwrite.")
    folder = run.checkpoints / name
    state = read_state(folder)
    changed = _changed(state["identity"], _identity(run))
    if changed:
        what = f"{folder} is of a run with other settings ({'; '.join(changed)})"
        raise CheckpointMismatch(what, "Resume with the settings of that run, or start another --output.")
    load_snapshot(folder, run.model, run.optimizer, run.plan.full)
    if run.ranks.first:  # what a crash left between the snapshot and its links
        rotate(run.checkpoints, run.config.keep_checkpoints, step_of(folder), state["best_step"])
    was, is_ = state["machine"], _machine(run)
    differs = [f"{k} was {was[k]}, is {v}" for k, v in is_.items() if k in was and was[k] != v]
    note = f" (not bit for bit: {', '.join(differs)})" if differs else ""
    console.say(f"resume  from {folder}{note}")
    step = step_of(folder)
    run.progress = Progress(step, state["seconds"], state["best_loss"], state["best_step"], saved=step)


def load_kept_step(run: Run) -> str:
    """Load the weights of the step that a finished run keeps into its model; returns which step it is, and why.

    If no step has a lower validation loss than the base model, it is the last: the best of the others has usually just learnt
    the least.
    """
    at = run.progress
    last = f"step {at.step} of {run.plan.steps}, the last"
    if at.best_loss is None:
        return last
    lowest = f"the lowest validation loss ({at.best_loss:.4f})"
    if at.best_step == 0:
        return f"{last}: {lowest} was before training, so no step is better than the base model on these rows"
    if at.best_step == at.step:
        return f"{last}, with {lowest}"
    best = run.checkpoints / f"step-{at.best_step}"
    if run.config.keep == "last":
        return f"{last}, by --keep last; {lowest} is that of {best}"
    problem = verify_manifest(best)
    if problem is not None:
        return f"{last}: step {at.best_step} had {lowest}, but {best} is damaged ({problem})"
    load_snapshot(best, run.model, run.optimizer, run.plan.full)
    return f"step {at.best_step} of {run.plan.steps}, {lowest}"


def _identity(run: Run) -> dict[str, Any]:
    """Everything that decides the losses of a run: its settings, its rows, its base model."""
    plan = run.plan
    own = {"data": plan.data_hash, "base": plan.base, "architecture": plan.architecture, "steps": plan.steps}
    return {**must_match(run.config), **own}


def _changed(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is another in an identity than it was, but for what the run's version did not say yet."""
    older = defaults() | {"architecture": now["architecture"]}
    pairs = {key: (then.get(key, older.get(key)), value) for key, value in now.items()}
    was, is_ = pairs.pop("architecture")
    if isinstance(was, dict):
        pairs |= {f"{key} of the model": (was.get(key, value), value) for key, value in is_.items()}
    return [f"{key}: {a} then, {b} now" for key, (a, b) in pairs.items() if a != b]


def _machine(run: Run) -> dict[str, str | int]:
    """What else the last bits of a loss depend on."""
    device = run.model.head.device
    return {
        "torch": torch.__version__,
        "compute": name_of(run.model.compute_dtype),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        "micro_tokens": run.plan.micro_tokens,
        "graphs": "on" if run.plan.graphs.on else "off",
        "gemm": forms_text(),
    }
