"""How a run ends: its last lines, a page that says where it stopped, and what would need less memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..checkpoint.adapter import save_adapter
from ..checkpoint.load import save_model
from ..console import Console
from ..errors import Diverged, OutOfMemory, Stopped
from ..report.plot import plot_loss
from ..report.run_page import report_quietly
from .folder import Run, save, take_kept
from .monitor import Monitor, shell
from .signals import StopSignal


@contextmanager
def page_of_the_end(folder: Path) -> Iterator[None]:
    """Write a page anew that says that the run goes on, when the run has ended early and left its folder."""
    try:
        yield
    except (Stopped, Diverged, OutOfMemory):
        if (folder / "report.html").is_file():
            report_quietly(folder)
        raise


@contextmanager
def memory_hint() -> Iterator[None]:
    """Say what would need less memory when there is not enough."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        told = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not told and "can't allocate memory" not in str(error):
            raise
        reason = str(error).partition("\n")[0][:200] or "the system gives no more"
        hint = "Try --checkpointing, a smaller --micro-tokens (with a smaller --max-length), or a smaller --lora-r."
        raise OutOfMemory(f"out of memory: {reason}", hint) from None


@contextmanager
def state_saved(run: Run, monitor: Monitor, stop: StopSignal) -> Iterator[None]:
    """Leave the state saved whichever way the loop ends: stopped, failed, or diverged, before which a snapshot was good."""
    at = run.progress
    try:
        yield
    except Stopped:
        if at.saved != at.step:
            save(run)
        what = f"stopped by {stop.name} at step {at.step} of {run.plan.steps}; the state is saved in {run.checkpoints}"
        raise Stopped(what, f"Go on with: {shell('train', '--output', run.folder, '--resume')}") from None
    except (MemoryError, RuntimeError):
        # whatever failed in a forward or backward pass, the parameters are those of the last step
        run.optimizer.zero_grad(set_to_none=True)
        if at.step and at.saved != at.step:
            save(run)
        raise
    except Diverged as error:
        good = f"checkpoints/step-{at.saved} is the last good state" if at.saved else "no checkpoint was written yet"
        losses = ", ".join(f"{loss:.3f}" for loss in monitor.losses) or "none"
        raise Diverged(error.what, f"{error.hint} Last losses: {losses}; {good}.") from None


def finish(run: Run, console: Console) -> Path:
    """Write what was trained, say how long it took, where things are, and which step they are of; returns its folder."""
    result, kept = run.folder / ("model" if run.plan.full else "adapter"), take_kept(run)
    if run.plan.full:
        save_model(run.model, result, run.config.model)
    else:
        save_adapter(run.model, result, run.config.model)
    lines = [
        "",
        f"done    {run.progress.step} steps in {run.progress.seconds:,.0f} s",
        f"{result.name:<7} {result}",
        f"        is {kept}",
        f"loss    {plot_loss(run.folder)}",
        f"report  {report_quietly(run.folder)}",
    ]
    console.say("\n".join(lines))
    return result
