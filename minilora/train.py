"""Training: config in, run folder out.

    rows -> examples -> the streams of a step -> summed loss / targets of the step -> clip -> AdamW -> adapter

The loss of a step is the sum over all its target tokens divided by their number, however the rows are spread over
micro-batches. Order, learning rate and dropout are functions of the step, so a resumed run computes the same bits as one
that was never stopped.
"""

import operator
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.kernels.dispatch import to_device
from minilora.models.decoder import Decoder

from .checkpoint.open_model import computing
from .config import TrainConfig
from .console import Console
from .data import Batch, pack, step_examples
from .errors import Stopped, UsageError
from .files.model_folder import ModelFolder
from .lora import set_dropout_keys
from .objective import SFT, Objective, objective_of
from .ranks.ranks import ALONE, Ranks, join
from .report.run_page import REFRESH, report_quietly
from .rows.dataset import load_data
from .run.ending import RESUME, finish, memory_hint, owned, state_saved
from .run.folder import Progress, Run, after_restart, restore, save, write_beginning
from .run.graphs import Graphs
from .run.monitor import Monitor, RunConsole, working
from .run.schedule import learning_rate, make_plan, set_learning_rate
from .run.setup import kernels, load, optimizer_of
from .run.signals import StopSignal
from .run.step import StepLog, StepResult, skip_unless_finite
from .run.study import Study
from .run.validation import validate


def train(config: TrainConfig, resume: bool = False, overwrite: bool = False, console: Console | None = None) -> Path:
    """Run a training; returns the folder of what was trained (RUN/adapter, or RUN/model with method full).

    Raises UsageError, DataError, ModelError, OutputInUse, CheckpointMismatch, Diverged, OutOfMemory, DiskError, Stopped.
    """
    console = console or RunConsole()
    for key in ("model", "data", "output"):
        if not getattr(config, key):
            raise UsageError(f"--{key} is missing", "minilora train --model DIR --data FILE --output RUN")
    folder, ranks = Path(config.output), join(config.rank_timeout)
    if ranks.restarted:  # from the newest checkpoint, if the run had come to one
        resume, overwrite = ranks.share(after_restart(folder, ranks.launch, resume, overwrite))
    with ranks.ending_as_one(RESUME), owned(config, ranks, resume, overwrite), memory_hint(), kernels(config):
        with working(console, "reading the rows"):
            base = ModelFolder(config.model)
            data = load_data(config, base)
        with working(console, "loading the weights"):
            asked = config.compute
            model, config = load(config, base, resume, ranks)
            plan = make_plan(config, base, data, model, computing(model, asked), ranks)
        console.print(plan.header, soft_wrap=not console.is_terminal)
        run = Run(folder, config, plan, model, optimizer_of(model, config), Progress(), ranks)
        if resume:
            restore(run, console)
        if ranks.first:
            write_beginning(run, data, overwrite)
        with (
            Monitor(
                folder / "metrics.jsonl" if ranks.first else None, plan.steps, run.progress.step, console
            ) as monitor,
            StopSignal() as stop,
            state_saved(run, monitor, stop),
            StepLog(run, monitor) as log,
        ):
            _loop(run, monitor, stop, log)
        ranks.leave()
        return finish(run, console)


def _loop(run: Run, monitor: Monitor, stop: StopSignal, log: StepLog) -> None:
    """Steps from where the run stands to its end, with evaluations and snapshots."""
    plan, at, config = run.plan, run.progress, run.config
    reported, call = time.perf_counter(), Graphs(run.model) if plan.graphs.on else operator.call
    if plan.val and at.step == 0 and at.best_loss is None:  # the base model's loss, to compare with
        loss, line = validate(run, monitor)
        monitor.step({"step": 0, "val_loss": loss})
        monitor.say(line)
    study = Study(run, monitor.say)
    for step in range(at.step, plan.steps):
        start, lr = time.perf_counter(), learning_rate(config, step, plan.steps)
        set_learning_rate(run.optimizer, lr)
        # which rows, and in which order, follows from (seed, step): nothing of it is stored
        batches = pack(step_examples(plan.train, plan.rows_per_step, config.seed, step), plan.micro_tokens)
        monitor.begin(step + 1, sum(len(b.ids) for b in batches))
        study.before(step)
        result = train_step(run.model, run.optimizer, batches, config, step, stop, monitor.reached, call, run.ranks)
        log.add(result, lr, start, **study.after(result))
        if log.stopping:
            raise Stopped("")
        last, best = at.step == plan.steps, at.best_step
        if plan.val and (at.step % plan.eval_every == 0 or last):
            log.read()
            loss, line = validate(run, monitor)
            log.write(val_loss=loss)
            monitor.say(line)
        if at.step % plan.save_every == 0 or last or at.best_step != best:
            log.write()  # before the snapshot: a resume drops what metrics.jsonl has beyond it
            save(run)
            if not last and time.perf_counter() - reported > REFRESH:
                reported = time.perf_counter()
                report_quietly(run.folder)


def train_step(
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    config: TrainConfig,
    step: int,
    stop: StopSignal | None = None,
    reached: Callable[[int], object] = lambda tokens: None,
    call: Callable[..., Any] = operator.call,
    ranks: Ranks = ALONE,
) -> StepResult:
    """One optimizer step on the streams of a step, launched; its loss and gradient norm are read from what it returns.

    The optimizer is a fused one, and the learning rate is its own; `reached(tokens)` is called after each stream. If the loss
    or the norm is not finite, nothing is changed, and reading raises Diverged. Raises Stopped between two streams if a signal
    came: the parameters are then those of the step before. Ranks share the streams, and a signal ends them after the step.
    """
    objective = objective_of(config)
    each = micro_batch if objective == SFT else partial(micro_batch, objective=objective)
    units = torch.tensor(float(sum(map(objective.units, batches))))  # of all ranks: the loss is one sum, divided once
    losses, own = [], ranks.own([len(b.ids) for b in batches])
    for micro in own:
        if stop is not None and stop.requested and ranks.count == 1:
            optimizer.zero_grad(set_to_none=True)
            raise Stopped("")
        ranks.begin(f"step {step + 1}, stream {micro + 1} of {len(batches)}")
        if config.lora_dropout:  # masks follow from the place, so a resumed run draws the same
            set_dropout_keys(model, config.seed, step, micro)
        losses.append(call(each, model, batches[micro], units))
        reached(sum(len(batches[i].ids) for i in own if i <= micro))
    empty = torch.zeros(1 + len(objective.logged), device=model.head.device)
    loss = torch.stack(losses).sum(0) if losses else empty
    stops = ranks.sum_step(optimizer, loss, stop is not None and stop.requested)
    numbers = call(update, optimizer, loss, stops, config.clip)
    optimizer.zero_grad(set_to_none=True)
    return StepResult(model, optimizer, batches, step, numbers, objective.logged)


def micro_batch(model: Decoder, batch: Batch, units: Tensor, objective: Objective = SFT) -> Tensor:
    """Forward and backward of one stream of a step that has so many targets, or pairs; returns its part of the loss, [1 + logged]."""
    device = model.head.device
    numbers = (objective.numbers(model, batch.to(device)) / to_device(units, device)).reshape(-1)
    numbers.sum().backward()  # what is logged has no gradient; adds to the gradients of A and B; W has none
    return numbers.detach()


def update(optimizer: torch.optim.Optimizer, loss: Tensor, stops: Tensor, clip: float) -> Tensor:
    """Clip the gradients and step; returns loss, gradient norm before clipping, stops, what is logged beside the loss, and each norm."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norms = torch.stack(torch._foreach_norm([p.grad for p in trained if p.grad is not None]))
    norm = torch.linalg.vector_norm(norms)
    numbers = torch.cat((loss[:1], torch.stack((norm.to(loss.dtype), stops.to(loss.dtype))), loss[1:]))
    skip_unless_finite(optimizer, numbers)
    if clip:
        torch.nn.utils.clip_grads_with_norm_(trained, clip, norm)
    optimizer.step()
    return torch.cat((numbers, norms))
