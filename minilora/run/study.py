"""`train --study on`: every few steps, how each adapter learns, for metrics.jsonl and the report.

For each linear: norms of A and B, of their gradients before clipping, of what the step changed in them, and how far the adapter
moves what the linear gives on a fixed few rows, ||s B A x|| / ||W x||.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from ..data import Batch, Example, Examples, make_batch
from ..lora import LoRALinear, adapters, replace_module, trained_parameters
from .folder import Run
from .step import StepResult

TOKENS = 256  # of the fixed rows, about
SHARE = 0.01  # of the arithmetic of a run that the fixed rows may take; twice as much is promised


@dataclass(frozen=True)
class LinearStep:
    """One linear at one step; norms are Frobenius norms, before the step."""

    a: float
    b: float
    grad_a: float
    grad_b: float
    step_a: float
    step_b: float
    moved: float  # ||s B A x|| / ||W x||, after the step


class Study:
    """Looks at a run every few steps: call `before` and `after` around each."""

    def __init__(self, run: Run, say: Callable[[str], object]):
        self.model, self.every = run.model, 0  # steps from one look to the next; 0 is off
        self._before: dict[str, Tensor] = {}
        if run.config.study:
            self.batch = make_batch(shortest(run.plan.val or run.plan.train)).to(run.model.head.device)
            self.every = steps_between(
                len(self.batch.ids), run.plan.train.column("length").sum() / run.plan.steps_per_epoch
            )
            say(
                f"study   every {self.every} steps, each linear on {len(self.batch.ids):,} tokens of {len(self.batch.where)} rows"
            )

    def before(self, step: int) -> None:
        """Remember the adapters before step 0, 1, ..., if that is one to look at."""
        due = self.every and step % self.every == 0
        self._before = {name: p.detach().clone() for name, p in trained_parameters(self.model).items()} if due else {}

    def after(self, result: StepResult) -> dict[str, dict[str, dict[str, float]]]:
        """What is to be written of the step; nothing if it was not one to look at. Raises Diverged."""
        if not self._before:
            return {}
        names, old = list(self._before), list(self._before.values())
        new = [p.detach() for p in trained_parameters(self.model).values()]
        steps = torch._foreach_norm(torch._foreach_sub(new, old))
        sizes, steps = (
            dict(zip(names, torch.stack(norms).tolist(), strict=True)) for norms in (torch._foreach_norm(old), steps)
        )
        grads, moved = result.grad_norms(), feature_change(self.model, self.batch)
        self._before = {}
        found = {}
        for path in moved:
            a, b = f"{path}.lora_A", f"{path}.lora_B"
            numbers = LinearStep(
                sizes[a], sizes[b], grads.get(a, 0.0), grads.get(b, 0.0), steps[a], steps[b], moved[path]
            )
            found[path] = {key: float(f"{value:.4g}") for key, value in asdict(numbers).items()}
        return {"study": found}


def shortest(examples: Examples) -> list[Example]:
    """The shortest rows, up to TOKENS tokens together, and one at least."""
    lengths = examples.column("length")
    order = lengths.argsort(kind="stable")
    count = max(int((lengths[order].cumsum() <= TOKENS).sum()), 1)
    return [examples[int(i)] for i in order[:count]]


def steps_between(tokens: int, tokens_per_step: float) -> int:
    """How many steps lie between two looks at `tokens` tokens, of whose step's arithmetic a forward pass is a third."""
    return max(-(-tokens // max(int(3 * SHARE * tokens_per_step), 1)), 1)


class _Probe(nn.Module):
    """In the place of a LoRALinear: computes what it does, and keeps ||s B A x|| / ||W x||. Blocks do not fuse it with others."""

    def __init__(self, linear: LoRALinear):
        super().__init__()
        self.linear, self.moved = linear, torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        linear = self.linear
        wide = torch.promote_types(x.dtype, torch.float32)
        a, b = (t.to(wide) for t in linear.factors())
        change = x.to(wide) @ a.T @ b.T * linear.scale
        given = linear.base(x)
        plain = given if linear.base.bias is None else given - linear.base.bias.to(x.dtype)
        self.moved = change.norm() / plain.to(wide).norm()
        return (given.to(wide) + change).to(x.dtype)


@torch.no_grad()
def feature_change(model: nn.Module, batch: Batch) -> dict[str, float]:
    """||s B A x|| / ||W x|| of every adapted linear, over the tokens of a batch, without dropout."""
    with probed(model) as probes:
        model(batch.ids, batch.documents, batch.target_index)
    return dict(zip(probes, torch.stack([p.moved for p in probes.values()]).tolist(), strict=True))


@contextmanager
def probed(model: nn.Module) -> Iterator[dict[str, _Probe]]:
    """A context in which each LoRALinear is behind a _Probe, by path."""
    wrapped = list(adapters(model))
    probes = {path: _Probe(linear) for path, linear in wrapped}
    for path, probe in probes.items():
        replace_module(model, path, probe)
    try:
        yield probes
    finally:
        for path, linear in wrapped:
            replace_module(model, path, linear)
