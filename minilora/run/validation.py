"""Validation of a run, and which step is its best."""

from ..evaluate import evaluate
from ..objective import objective_of
from .folder import Run
from .monitor import Monitor


def validate(run: Run, monitor: Monitor) -> tuple[float, str]:
    """Evaluate and remember the best; returns the loss, and a line that says so."""
    at = run.progress
    monitor.validating()
    score = evaluate(run.model, run.plan.val, run.plan.micro_tokens, run.ranks, objective_of(run.config))
    better = at.best_loss is None or score.loss < at.best_loss
    note = (
        "(best)" if better else f"(best {at.best_loss:.4f} at step {at.best_step})" if at.best_loss is not None else ""
    )
    if better:
        at.best_loss, at.best_step = score.loss, at.step
    beside = (
        "  ".join(f"{name} {value:.3g}" for name, value in score.logged.items()) or f"perplexity {score.perplexity:.2f}"
    )
    return score.loss, f" eval {at.step:>5}  validation loss {score.loss:.4f}  {beside} {note}"
