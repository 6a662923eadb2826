"""What a run prints and logs: lines that stay, a live line below them on a terminal, and metrics.jsonl."""

import json
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.live import Live
from rich.text import Text

from ..console import Console
from ..files.atomic import write_file
from ..files.strict_json import read_json_lines
from ..terminal import clock
from .loggers import Loggers

if TYPE_CHECKING:
    import torch

    from ..data import Batch
    from .folder import Run

LINES = 20  # about how many steps of a run print a line that stays
PLAIN_EVERY = 30.0  # without a terminal: seconds until another line is due
PATIENCE = 2.0  # seconds until a step that still runs is shown
RECENT = 20  # steps whose mean duration gives the remaining time


@contextmanager
def working(console: Console, what: str) -> Iterator[None]:
    """Show what is being done: an animated line on a terminal, a plain line elsewhere."""
    if console.is_terminal:
        with console.status(f" {what}"):
            yield
    else:
        console.say(f"({what})")
        yield


class Monitor:
    """Follows a run of `total` steps from `start`; drops the metrics that an older file has of steps beyond `start`.

    Without a path, for a rank that writes nothing, metrics are kept nowhere.
    """

    def __init__(self, path: Path | None, total: int, start: int, console: Console):
        self.total, self.start, self.console = total, start, console
        self._done = start  # the last step whose metrics came
        self._durations: deque[float] = deque(maxlen=RECENT)
        self._last: dict[str, Any] = {}
        self._doing, self._since = "measuring the speed of this machine", time.monotonic()
        self.average, self._weight = 0.0, 0.0
        self.losses: list[float] = []
        kept = [line for line in read_json_lines(path) if _is_step(line) and line["step"] <= start] if path else []
        if path and path.exists():
            write_file(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(path or os.devnull, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 closed by __exit__
        self.loggers = Loggers(self.say)
        self._every = max(-(-(total - start) // LINES), 1)
        self._live = None
        if console.is_terminal:
            self._live = Live(console=console, refresh_per_second=4, transient=True, get_renderable=self._now)
        self._printed = time.monotonic()
        for line in kept:
            if isinstance(line.get("loss"), float):
                self._average(line["loss"])

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self._live:
            self._live.stop()
        self._file.close()
        self.loggers.close()

    def _average(self, loss: float) -> None:
        self.losses = [*self.losses[-9:], loss]
        # exponential, bias-corrected
        self._weight = 0.9 * self._weight + 0.1
        self.average += (loss - self.average) * 0.1 / self._weight

    def begin(self, step: int, tokens: int) -> None:
        """An optimizer step of `tokens` tokens begins, or is launched while the device computes the one before."""
        if step == self._done + 1:
            self._since = time.monotonic()
        self._step = step, tokens
        self.reached(0)
        if step == self.start + 1 and not self._live:
            self.say(f" step {step}: {tokens:,} tokens")

    def reached(self, tokens: int) -> None:
        """`tokens` tokens of the step have gone through forward and backward."""
        step, of = self._step
        self._doing = f"step {step}: {tokens:,} of {of:,} tokens"
        if tokens < of and not self._live and time.monotonic() - self._printed > PLAIN_EVERY:
            self._printed = time.monotonic()
            self.say(f" {self._doing}")

    def _now(self) -> Text:
        """What the terminal shows: the last step, and if the next one takes long, how far that is."""
        waited = time.monotonic() - self._since
        last = self._line(self._last, self.console.width, bar=True) if self._last else None
        if waited < PATIENCE and last:
            return last
        doing = Text(f" {self._doing}, {clock(waited)}", no_wrap=True, overflow="ellipsis")
        return Text("\n").join([last, doing]) if last else doing

    def step(self, metrics: dict[str, Any]) -> None:
        """One optimizer step is done."""
        self._file.write(json.dumps(metrics) + "\n")
        self.loggers.log(metrics)
        if "loss" not in metrics:
            return
        self._average(metrics["loss"])
        if metrics["step"] == self.start + 2:
            self._durations.clear()  # the first step warmed up
        self._durations.append(time.monotonic() - self._since)
        self._last, self._since = metrics, time.monotonic()
        step = self._done = metrics["step"]
        due = step in (self.start + 1, self.total) or (step - self.start) % self._every == 0
        if due or (not self._live and time.monotonic() - self._printed > PLAIN_EVERY):
            self._printed = time.monotonic()
            self.console.print(self._line(metrics, self.console.width if self._live else None), soft_wrap=True)

    def validating(self) -> None:
        """The validation rows are being evaluated."""
        self._doing = "validation rows"

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.console.say(text)

    def _line(self, m: dict[str, Any], width: int | None, bar: bool = False) -> Text:
        """The numbers of a step in at most `width` columns; the part with the highest number is left out first."""
        left = sum(self._durations) / len(self._durations) * (self.total - m["step"])
        filled = 10 * m["step"] // self.total
        parts = [
            (0, f"{m['step']:>{len(str(self.total))}}/{self.total}"),
            *([(6, "━" * filled + "─" * (10 - filled))] if bar else []),
            (0, f"loss {m['loss']:.4f}"),
            (4, f"avg {self.average:.4f}"),
            (2, f"lr {m['lr']:.1e}"),
            (3, f"grad {m['grad_norm']:.2f}"),
            (1, f"ETA {clock(left)}"),
            (5, f"{m['tokens_per_second']:,.0f} tok/s"),
            (7, f"{m['memory_gb']:.1f} GB"),
            (8, f"MFU {100 * m['mfu']:.0f} %"),
        ]
        while width is not None and len(parts) > 2 and len("  ".join(text for _, text in parts)) + 2 > width:
            parts.remove(max(parts))
        return Text(" " + "  ".join(text for _, text in parts), no_wrap=True, overflow="ellipsis")


def _is_step(line: Any) -> bool:
    """Whether a line of metrics.jsonl is what a run writes: an object with the number of its step."""
    return isinstance(line, dict) and isinstance(line.get("step"), int)


def step_metrics(
    run: "Run", step: int, batches: "list[Batch]", loss: float, lr: float, grad_norm: float, seconds: float, mfu: float
) -> dict[str, Any]:
    """The object of metrics.jsonl for a step, counted from 1."""
    tokens, ratio = sum(len(b.ids) for b in batches), run.config.loraplus_lr_ratio
    return {
        "step": step,
        "epoch": round(step / run.plan.steps_per_epoch, 4),
        "loss": loss,
        "lr": lr,
        **({"lr_b": lr * ratio} if ratio != 1 else {}),
        "grad_norm": grad_norm,
        "tokens": tokens,
        "target_tokens": sum(len(b.targets) for b in batches),
        "tokens_per_second": round(tokens / seconds, 1),
        "mfu": round(mfu, 4),
        "memory_gb": round(peak_memory_gb(run.model.head.device), 3),
        "time": round(run.progress.seconds, 3),
    }


def peak_memory_gb(device: "torch.device") -> float:
    """Peak memory in GB (10^9 bytes): of the GPU, or without one of the process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
