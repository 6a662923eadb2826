"""The result of a run, read from its losses: a sentence, and what its curves show."""

import math
from collections.abc import Sequence

import numpy as np

from .record import Record

FEW = 10  # steps: with fewer, a curve is not read


def verdict(run: Record) -> str:
    """The run in a sentence or two; a run that has not ended gets no conclusion."""
    if not run.step:
        return "The run is going on; no step is done yet." if run.going_on else "No step was taken yet."
    broken = broken_at(run)
    if broken is not None:
        return f"The run diverged: the loss is not finite from step {broken:,} on."
    if not run.finished:
        how = "The run is going on" if run.going_on else "The run was stopped"
        best = f" The lowest validation loss so far is {run.best[1]:.4g}, at step {run.best[0]:,}." if run.best else ""
        return f"{how}: step {run.step:,} of {run.steps:,}, training loss {run.smooth[-1][1]:.3g} (smoothed).{best}"
    if run.best is None or len(run.val) < 2:
        first, last = run.loss[0][1], run.smooth[-1][1]
        how = "fell" if last < first else "did not fall: it went"
        return (
            f"The training loss {how} from {first:.3g} to {last:.3g}; without validation rows it cannot be seen "
            "what was learnt beyond the training rows (--val 0.05)."
        )
    (step, best), first, last = run.best, run.val[0], run.val[-1]
    if step == 0 and not made_worse(run):
        return f"Training did not lower the validation loss: {best:.4g} before it, {last[1]:.4g} at the end."
    if step == 0:
        return f"Training made it worse: the validation loss was lowest before training ({best:.4g}, and {last[1]:.4g} at the end)."
    fell = f"from {first[1]:.4g} to {best:.4g} at step {step:,} of {run.steps:,}"
    if over_fitted(run):
        return f"Training helped up to step {step:,}, then it over-fitted: the validation loss fell {fell}, and is {last[1]:.4g} at the end."
    return f"Training helped: the validation loss fell {fell}."


def made_worse(run: Record) -> bool:
    """Whether every validation of a finished run was worse than the one before training."""
    step, lowest = run.best or (None, math.nan)
    return run.finished and step == 0 and len(run.val) > 1 and not any(loss <= lowest for _, loss in run.val[1:])


def over_fitted(run: Record) -> bool:
    """Whether the validation loss turned and ends clearly above its lowest."""
    return run.best is not None and run.val[-1][0] > run.best[0] and not run.val[-1][1] <= 1.02 * run.best[1]


def broken_at(run: Record) -> int | None:
    """The first step whose loss is not finite."""
    return next((int(step) for step, y in run.loss if not math.isfinite(y)), None)


def reading(run: Record) -> list[str]:
    """What the curves show: whether the loss fell, still falls or diverged, and whether validation turned.

    Of a run that is going on, only spikes are reported.
    """
    losses, spikes = run.loss.y, _spikes(run)
    if run.going_on:
        return spikes
    if len(losses) < FEW:
        return [f"Only {len(losses)} steps: too few to read a curve from."]
    broken = broken_at(run)
    if broken is not None:
        return [
            f"The loss is not finite from step {broken:,} on: the run diverged. A lower lr or a longer warmup may help."
        ]
    lines = [] if run.finished else [f"The run stopped at step {run.step:,} of {run.steps:,}."]
    lines.append(_trend(losses, run.finished))
    end, low = run.smooth[-1][1], min(run.smooth.y)
    if end > 1.5 * low and end > low + 0.3:
        lines.append(
            f"The smoothed training loss ends at {end:.3g}, well above its lowest value of {low:.3g}: it may be diverging. "
            "A lower lr is the first thing to try."
        )
    return [*lines, *spikes, _validation(run)]


def _spikes(run: Record) -> list[str]:
    before = zip(run.loss[10:], run.smooth[9:], strict=False)  # each loss, and the mean before it
    found = [step for (step, y), (_, mean) in before if y > 3 * mean and y > 1]
    told = f"{len(found):,} steps have over three times the loss around them"
    return [f"{told} (first: step {found[0]:,})."] if found else []


def _trend(losses: Sequence[float], finished: bool) -> str:
    """Whether the last quarter still falls: the slope of a line through it, against the scatter around the line."""
    tail = np.array(losses[-max(len(losses) // 4, 8) :])
    x = np.arange(len(tail)) - (len(tail) - 1) / 2
    slope = float((x * tail).sum() / (x * x).sum())
    scatter = math.sqrt(
        float(((tail - tail.mean() - slope * x) ** 2).sum()) / max(len(tail) - 2, 1) / float((x * x).sum())
    )
    moved = slope * len(tail)
    fell = f"The training loss went from {np.mean(losses[:3]):.3g} to {np.mean(tail[-3:]):.3g}."
    if not finished:
        return fell
    if abs(slope) <= 2 * scatter or abs(moved) < 0.02 * abs(float(tail.mean())):
        return f"{fell} In the last quarter it is level within its scatter: more steps with this schedule would change little."
    if slope < 0:
        return f"{fell} In the last quarter it still falls (by {-moved:.2g}): it has not converged."
    return f"{fell} In the last quarter it rises (by {moved:.2g})."


def _validation(run: Record) -> str:
    if len(run.val) < 2 or run.best is None:
        return "There are no validation losses over time: whether the run over-fits cannot be seen (--val 0.05)."
    (best_step, best), last = run.best, run.val[-1][1]
    if best_step == 0:
        return (
            f"Validation was never better than before training ({best:.4g}, then {last:.4g}): these rows do not teach what is validated, "
            "or the lr is too high."
        )
    if over_fitted(run):
        kept = "model/" if run.config.get("method") == "full" else "adapter/"
        place = kept if run.config.get("keep") == "best" and run.finished else "checkpoints/best"
        return (
            f"Validation was best at step {best_step:,} ({best:.4g}) and is {last:.4g} at the end while training went on: "
            f"that is how over-fitting looks. {place} holds the best step; fewer epochs would do."
        )
    gap = last - run.smooth[-1][1]
    more = f" It ends {gap:.2g} above the training loss." if gap > 0.5 * max(run.smooth[-1][1], 0.1) else ""
    return f"Validation loss is {last:.4g} at the end, the best is {best:.4g} at step {best_step:,}: no over-fitting is seen.{more}"
