"""How a run ends: its last lines, its report, and a hint if it ran out of memory."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..checkpoint.adapter import save_adapter
from ..checkpoint.save import WIDE, save_model
from ..config import TrainConfig
from ..console import Console
from ..errors import Diverged, OutOfMemory, RankLost, Stopped
from ..evaluate import evaluate
from ..experts import seen_note
from ..files.atomic import locked, write_file
from ..files.run_folder import require_outside_runs
from ..machine.compute import name_of
from ..objective import objective_of
from ..ranks.ranks import Ranks
from ..report.plot import plot_loss
from ..report.record import read_json_file
from ..report.run_page import report_quietly
from ..terminal import shell
from .folder import Run, check_cache, check_not_read, check_output, check_unlocked, load_kept_step, save
from .monitor import Monitor
from .signals import StopSignal
from .snapshot import LAST

RESUME = "Go on with the same command and --resume."  # after a rank was lost


@contextmanager
def final_report(folder: Path) -> Iterator[None]:
    """Write the report again if the run ends early: the page on disk says that it still goes on."""
    try:
        yield
    except (Stopped, Diverged, OutOfMemory, RankLost):
        if (folder / "report.html").is_file():
            report_quietly(folder)
        raise


@contextmanager
def owned(config: TrainConfig, ranks: Ranks, resume: bool, overwrite: bool) -> Iterator[None]:
    """The run folder, empty or to be resumed or overwritten, locked for this run; its first rank holds it. Raises OutputInUse."""
    if not ranks.first:
        yield
        return
    folder = Path(config.output)
    check_cache(config)
    if overwrite:
        check_not_read(config)
    if not resume:
        require_outside_runs(folder)
        check_unlocked(folder, overwrite)
    with final_report(folder), locked(folder):
        check_output(folder, resume, overwrite)
        yield


@contextmanager
def memory_hint() -> Iterator[None]:
    """Say what would need less memory if there is not enough."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and "can't allocate memory" not in str(error):
            raise
        reason = str(error).partition("\n")[0][:200] or "the system gives no more"
        hint = "Try --checkpointing, a smaller --micro-tokens (with a smaller --max-length), a smaller --lora-r, or with several GPUs --shard on."
        raise OutOfMemory(f"out of memory: {reason}", hint) from None


@contextmanager
def state_saved(run: Run, monitor: Monitor, stop: StopSignal) -> Iterator[None]:
    """Save the state if the loop is stopped or fails. A run that diverged keeps its last snapshot."""
    at = run.progress
    try:
        yield
    except Stopped:
        if at.saved != at.step:
            save(run)
        what = f"stopped by {stop.name or 'a signal to another rank'} at step {at.step} of {run.plan.steps}; the state is saved in {run.checkpoints}"
        raise Stopped(what, f"Go on with: {shell('train', '--output', run.folder, '--resume')}") from None
    except (MemoryError, RuntimeError, RankLost):
        # a forward or backward pass failed: the parameters are still those of the last step
        run.optimizer.zero_grad(set_to_none=True)
        if at.step and at.saved != at.step:
            save(run)
        raise
    except Diverged as error:
        good = f"checkpoints/step-{at.saved} is the last good state" if at.saved else "no checkpoint was written yet"
        losses = ", ".join(f"{loss:.3f}" for loss in monitor.losses) or "none"
        raise Diverged(error.what, f"{error.hint} Last losses: {losses}; {good}.") from None


def finish(run: Run, console: Console) -> Path:
    """Write what was trained and the last lines: the time it took, the files, and the step they hold; returns its folder."""
    result = run.folder / ("model" if run.plan.full else "adapter")
    if not run.ranks.first:
        return result
    kept = load_kept_step(run)
    rounded = None
    if run.plan.full:
        rounded = _round(run)
        save_model(run.model, result, run.config.model)
    else:
        save_adapter(run.model, result, run.config.model)
    lines = [
        "",
        f"done    {run.progress.step} steps in {run.progress.seconds:,.0f} s",
        f"{result.name:<7} {result}",
        f"        is {kept}",
        *(f"        {note}" for note in [rounded] if note),
        *(f"experts {note}" for note in [seen_note(run.model)] if note),
        f"loss    {plot_loss(run.folder)}",
        f"report  {report_quietly(run.folder)}",
    ]
    console.say("\n".join(lines))
    return result


@torch.no_grad()
def _round(run: Run) -> str | None:
    """Round a model that was trained in fp32 to the dtype of its config.json; a line with what that does, if it does anything."""
    own = run.model.config.dtype
    wide = [p for name, p in run.model.named_parameters() if p.dtype != own and not WIDE.fullmatch(name)]
    if not wide:
        return None
    for p in wide:
        p.copy_(p.to(own))
        if not p.isfinite().all():
            what = f"weights are beyond what {name_of(own)}, the dtype of config.json, can hold"
            raise Diverged(what, f"Train with a smaller --lr; {run.checkpoints}/{LAST} has them in float32.")
    told = f"rounded to {name_of(own)}, as in config.json; the snapshots in {run.checkpoints} are not"
    if not run.plan.val:
        return told
    loss = evaluate(run.model, run.plan.val, run.plan.micro_tokens, objective=objective_of(run.config)).loss
    record = run.folder / "data.json"
    write_file(record, json.dumps(read_json_file(record) | {"rounded_loss": loss}) + "\n")  # for the pages
    return f"{told}: validation loss {loss:.4f} now"
