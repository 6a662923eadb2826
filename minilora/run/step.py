"""What an optimizer step gave: launched now, read when the device has computed it.

A GPU that is asked for the loss of a step stands still until the next step is launched. So a step is launched whole, optimizer
and all, and its numbers are read while the device works on the next one. Until then the device itself sees to it that a loss
or a gradient that is not finite changes nothing (`skip_unless_finite`).
"""

import math
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..data import Batch
from ..errors import Diverged
from ..lora import trained_parameters
from ..machine.flops import flops_per_token, peak_flops, step_flops
from .folder import Run
from .monitor import Monitor, step_metrics


def skip_unless_finite(optimizer: torch.optim.Optimizer, numbers: Tensor) -> None:
    """Let a fused optimizer change nothing from now on if one of the numbers is not finite, without asking the device."""
    of = vars(optimizer)
    if "found_inf" not in of:  # torch's name
        of["found_inf"] = torch.zeros((), device=numbers.device)
    of["found_inf"].masked_fill_(~numbers.isfinite().all(), 1.0)


class StepResult:
    """Loss and gradient norm of a step, as the device will have them."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: list[Batch],
        step: int,
        numbers: Tensor,
        logged: Sequence[str] = (),
    ):
        """numbers: loss, norm of all gradients, ranks that are to stop, one of each name that is logged, and the norm of each gradient,
        in the order of the optimizer.
        """
        self.model, self.optimizer, self.batches, self.step = model, optimizer, batches, step
        self.logged = dict.fromkeys(logged, 0.0)  # once they are read
        self.stops = False  # whether a signal came to a rank, once it is read
        self._numbers, self._computed = numbers.to("cpu", non_blocking=True), None
        if numbers.is_cuda:
            self._computed = torch.cuda.Event()
            self._computed.record()

    def grad_norms(self) -> dict[str, float]:
        """The norm of each gradient before clipping, by parameter. Raises Diverged."""
        self.read()
        return dict(zip(self._moved(), self._numbers.tolist()[3 + len(self.logged) :], strict=True))

    def _moved(self) -> list[str]:
        """The parameters that have a gradient, in the order of the optimizer, which is that of their norms."""
        names = {p: name for name, p in trained_parameters(self.model).items()}
        ordered = (p for group in self.optimizer.param_groups for p in group["params"])
        return [names[p] for p in ordered if p in self.optimizer.state]

    @property
    def ready(self) -> bool:
        """Whether reading would not wait."""
        return self._computed is None or self._computed.query()

    def read(self) -> tuple[float, float]:
        """The loss and the gradient norm before clipping. Raises Diverged if one is not finite; then the step changed nothing."""
        if self._computed is not None:
            self._computed.synchronize()
        loss, grad_norm, stops, *norms = self._numbers.tolist()
        self.stops = stops > 0
        self.logged = {name: norms.pop(0) for name in self.logged}
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return loss, grad_norm
        vars(self.optimizer)["found_inf"].zero_()
        bad = next((name for name, norm in zip(self._moved(), norms, strict=True) if not math.isfinite(norm)), "none")
        rows = ", ".join([w for b in self.batches for w in b.where][:4])
        what = f"loss {loss}, gradient norm {grad_norm} (first bad gradient: {bad}; rows: {rows} ...)"
        raise Diverged(f"step {self.step + 1}: {what}", "Lower --lr or raise --warmup; nothing of this step was kept.")


class StepLog:
    """Writes the metrics of the steps of a run, each at the latest when the next one is launched, or when the run ends early."""

    def __init__(self, run: Run, monitor: Monitor):
        self.run, self.monitor = run, monitor
        model = run.model
        self._peak, self._per_token = (
            peak_flops(model.head.device, model.compute_dtype) * run.ranks.count,
            flops_per_token(model, run.plan.full),
        )
        self._unread: tuple[StepResult, float, float, dict[str, Any]] | None = None
        self._metrics: dict[str, Any] | None = None
        self._read_at = -math.inf
        self.stopping = self._stops = False
        self._began = time.perf_counter() - run.progress.seconds
        if run.ranks.first:
            monitor.loggers.open(run.config, run.progress.step)

    def add(self, result: StepResult, lr: float, start: float, **more: Any) -> None:
        """A step was launched that began at `start`: the one before is written, and this one, with more, when it is there."""
        self.write()
        self.stopping = self._stops  # of a step that all ranks have read by now, so that all stop behind the same one
        self._unread = result, lr, start, more
        self.run.progress.step = result.step + 1
        if result.ready:
            self.read()

    def read(self) -> None:
        """Wait for the numbers of the last step. Raises Diverged."""
        if self._unread is None:
            return
        (result, lr, start, more), self._unread = self._unread, None
        loss, grad_norm = result.read()
        self._stops |= result.stops
        now, at = time.perf_counter(), self.run.progress
        seconds = now - max(start, self._read_at)  # a step that was launched behind another one begins after that
        self._read_at, at.seconds = now, now - self._began
        flops = step_flops(self.run.model.config, result.batches, self._per_token) / seconds
        self._peak = max(self._peak, flops)  # the measured peak is too low if the machine was busy then
        self._metrics = (
            step_metrics(self.run, result.step + 1, result.batches, loss, lr, grad_norm, seconds, flops / self._peak)
            | result.logged
            | more
        )

    def write(self, **more: float) -> None:
        """Write the metrics of the last step, and what else is known of it, unless they were. Raises Diverged."""
        self.read()
        if self._metrics is not None:
            self.monitor.step(self._metrics | more)
        self._metrics = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Diverged):  # the steps after that one changed nothing
            self.write()
