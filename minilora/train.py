"""Training: config in, run folder out.

    rows -> examples -> the streams of a step -> loss summed over target tokens, divided once -> clip -> AdamW -> adapter

The loss of a step is the sum over all its target tokens divided by their number, however the rows are spread over
micro-batches. Order, learning rate and dropout are functions of the step, so a run that goes on from a checkpoint computes
the same bits as one that was never stopped.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minilora.kernels.dispatch import kernels_enabled
from minilora.models.config import Config
from minilora.models.decoder import Decoder

from .checkpoint.adapter import save_adapter
from .checkpoint.load import find_device, load_model, read_config, save_model
from .checkpoint.open_model import computing
from .config import TrainConfig, to_yaml
from .console import Console
from .data import Batch, pack, step_examples
from .errors import Diverged, OutOfMemory, Stopped, UsageError
from .evaluate import evaluate
from .files.atomic import locked, write_file
from .lora import add_lora, set_dropout_keys
from .machine.compute import choose, choose_threads, name_of
from .machine.cpu import usable_cpus
from .machine.flops import peak_flops, step_flops
from .report.plot import plot_loss
from .report.record import TRAINED_ROWS
from .report.report import REFRESH, report_quietly
from .rows.dataset import load_data, trained_rows, write_split
from .run.folder import Progress, Run, check_before, check_claim, check_disk, clear, restore, save, take_kept
from .run.monitor import Monitor, RunConsole, peak_memory_gb, shell, working
from .run.schedule import data_record, make_plan
from .run.signals import StopSignal
from .run.snapshot import trained_parameters


def train(config: TrainConfig, resume: bool = False, overwrite: bool = False, console: Console | None = None) -> Path:
    """Run a training; returns the folder of what was trained (RUN/adapter, or RUN/model with method full).

    Raises OutputInUse, CheckpointMismatch, Diverged, DiskError, Stopped, and what the data and the model give.
    """
    console = console or RunConsole()
    for key in ("model", "data", "output"):
        if not getattr(config, key):
            raise UsageError(f"--{key} is missing", "minilora train --model DIR --data FILE --output RUN")
    folder = Path(config.output)
    if not resume:
        check_before(folder, overwrite)
    with _page_of_the_end(folder), _memory_hint(), locked(folder), _kernels(config):
        check_claim(folder, resume, overwrite)
        with working(console, "reading the rows"):
            data = load_data(config)
        with working(console, "loading the weights"):
            asked = config.compute
            model, config = _load(config)
            plan = make_plan(config, data, model, computing(model, asked))
        console.print(plan.header, highlight=False, markup=False, soft_wrap=not console.is_terminal)
        run = Run(folder, config, plan, model, optimizer_of(model, config), Progress())
        if resume:
            restore(run, console)
        elif overwrite:
            clear(folder)
        check_disk(folder, model, config.keep_checkpoints)
        write_file(folder / "config.yaml", to_yaml(config))
        write_file(folder / "data.json", json.dumps(data_record(data, plan)) + "\n")
        write_file(folder / TRAINED_ROWS, trained_rows(plan.train).astype("<u8").tobytes())
        write_split(folder / "data", data)
        metrics = folder / "metrics.jsonl"
        with Monitor(metrics, plan.steps, run.progress.step, console) as monitor, StopSignal() as stop:
            _loop(run, monitor, stop)
        result, kept = folder / ("model" if plan.full else "adapter"), take_kept(run)
        if plan.full:
            save_model(model, result, config.model)
        else:
            save_adapter(model, result, config.model)
        _say_done(run, result, kept, console)
        return result


def _kernels(config: TrainConfig) -> AbstractContextManager[None]:
    """The kernels that the config asks for, while the run lasts."""
    return kernels_enabled(False) if config.kernels == "off" else nullcontext()


def _load(config: TrainConfig) -> tuple[Decoder, TrainConfig]:
    """The model as the run trains it, and the config with the dtype and the threads that it computes with."""
    c, device = read_config(Path(config.model)), find_device(None if config.device == "auto" else config.device)
    stored, compute = dtypes(config, c, device)
    model = prepare(load_model(config.model, stored, device, name_of(compute)), config)
    if device.type == "cpu":
        torch.set_num_threads(min(config.threads, usable_cpus()) if config.threads else choose_threads(c))
    settled = name_of(compute) if compute != torch.float64 else "auto"
    return model, replace(config, compute=settled, threads=torch.get_num_threads())


def dtypes(config: TrainConfig, c: Config, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """What a run keeps the base's weights in, and what it computes in."""
    if config.method == "full":
        if config.compute == "bfloat16":
            raise UsageError("--method full computes in float32", "Leave --compute out.")
        return torch.float32, torch.float32
    stored = {"auto": c.dtype, "float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
    compute = choose(c, stored, device, config.compute).dtype
    if compute == torch.float16:  # in which gradients would underflow
        stored = compute = torch.bfloat16
    return stored, compute


def prepare(model: Decoder, config: TrainConfig) -> Decoder:
    """Make a loaded model what the run trains: adapters in place, or every weight freed."""
    if config.method == "full":
        model.requires_grad_(True)
    else:
        size = {"r": config.lora_r, "alpha": config.lora_alpha, "rslora": config.rslora}
        add_lora(model, config.lora_targets, **size, dropout=config.lora_dropout, seed=config.seed)
    model.checkpointing, model.keep_attention = config.checkpointing, config.keep_attention
    return model.train()


def optimizer_of(model: Decoder, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW on what is trained."""
    parameters = list(trained_parameters(model).values())
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(parameters, lr=config.lr, betas=betas, weight_decay=config.weight_decay, fused=True)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The rate of step 0, 1, ... of `steps`: linear warmup to config.lr, then the schedule towards 0."""
    warmup = round(config.warmup * steps) if config.warmup < 1 else min(int(config.warmup), steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return config.lr * shape[config.schedule]


def train_step(
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    config: TrainConfig,
    step: int,
    stop: StopSignal | None = None,
    reached: Callable[[int], object] = lambda tokens: None,
) -> tuple[float, float]:
    """One optimizer step on the batches of a step; returns (loss, gradient norm before clipping).

    The learning rate is the one the optimizer has; `reached` hears how many tokens are through. Raises Diverged before anything is changed if either is not finite,
    and Stopped between two micro-batches if a signal came; the parameters are then those of the step before.
    """
    trained = trained_parameters(model)
    targets = sum(len(b.targets) for b in batches)
    losses = []
    for micro, batch in enumerate(batches):
        if stop is not None and stop.requested:
            optimizer.zero_grad(set_to_none=True)
            raise Stopped("")
        set_dropout_keys(model, config.seed, step, micro)
        loss = model.loss(batch.to(model.head.device)) / targets
        loss.backward()
        losses.append(loss.detach())
        reached(sum(len(b.ids) for b in batches[: micro + 1]))
    gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
    norm = torch.nn.utils.get_total_norm(list(gradients.values()))
    loss, grad_norm = torch.stack([torch.stack(losses).sum(), norm.to(losses[0].dtype)]).tolist()
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        bad = next((name for name, g in gradients.items() if not g.isfinite().all()), "none")
        rows = ", ".join([w for b in batches for w in b.where][:4])
        what = f"loss {loss}, gradient norm {grad_norm} (first bad gradient: {bad}; rows: {rows} ...)"
        raise Diverged(f"step {step + 1}: {what}", "Lower --lr or raise --warmup; nothing of this step was kept.")
    if config.clip:
        torch.nn.utils.clip_grads_with_norm_(list(trained.values()), config.clip, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm


def _loop(run: Run, monitor: Monitor, stop: StopSignal) -> None:
    """Steps from where the run stands to its end, with evaluations and snapshots; every way out leaves the state saved."""
    plan, at, config = run.plan, run.progress, run.config
    peak = peak_flops(run.model.head.device, run.model.compute_dtype)
    began = time.perf_counter() - at.seconds
    told = time.perf_counter()
    try:
        if plan.val and at.step == 0 and at.best_loss is None:
            loss, line = _validate(run, monitor)
            monitor.step({"step": 0, "val_loss": loss})
            monitor.say(line)
        for step in range(at.step, plan.steps):
            start = time.perf_counter()
            for group in run.optimizer.param_groups:
                group["lr"] = learning_rate(config, step, plan.steps)
            examples = step_examples(plan.train, plan.rows_per_step, config.seed, step)
            batches = pack(examples, plan.micro_tokens)
            monitor.begin(step + 1, sum(len(b.ids) for b in batches))
            loss, grad_norm = train_step(run.model, run.optimizer, batches, config, step, stop, monitor.reached)
            now = time.perf_counter()
            at.step, at.seconds = step + 1, now - began
            flops = step_flops(run.model, batches, run.plan.full) / (now - start)
            peak = max(peak, flops)  # a roof that was measured beside other work may have been too low
            metrics = _metrics(run, batches, loss, grad_norm, now - start, flops / peak)
            last, best, line = at.step == plan.steps, at.best_step, ""
            if plan.val and (at.step % plan.eval_every == 0 or last):
                metrics["val_loss"], line = _validate(run, monitor)
            monitor.step(metrics)
            if line:
                monitor.say(line)
            if at.step % plan.save_every == 0 or last or at.best_step != best:
                save(run)
                if not last and now - told > REFRESH:
                    told = now
                    report_quietly(run.folder)
    except Stopped:
        if at.saved != at.step:
            save(run)
        what = f"stopped by {stop.name} at step {at.step} of {plan.steps}; the state is saved in {run.checkpoints}"
        raise Stopped(what, f"Go on with: {shell('train', '--output', run.folder, '--resume')}") from None
    except (MemoryError, RuntimeError):
        # whatever failed in a forward or backward pass, the parameters are those of the last step
        run.optimizer.zero_grad(set_to_none=True)
        if at.step and at.saved != at.step:
            save(run)
        raise
    except Diverged as error:
        last_good = (
            f"checkpoints/step-{at.saved} is the last good state" if at.saved else "no checkpoint was written yet"
        )
        losses = ", ".join(f"{loss:.3f}" for loss in monitor.losses) or "none"
        raise Diverged(error.what, f"{error.hint} Last losses: {losses}; {last_good}.") from None


def _metrics(
    run: Run, batches: list[Batch], loss: float, grad_norm: float, seconds: float, mfu: float
) -> dict[str, Any]:
    """The line of metrics.jsonl for the step just taken."""
    tokens = sum(len(b.ids) for b in batches)
    return {
        "step": run.progress.step,
        "epoch": round(run.progress.step / run.plan.steps_per_epoch, 4),
        "loss": loss,
        "lr": run.optimizer.param_groups[0]["lr"],
        "grad_norm": grad_norm,
        "tokens": tokens,
        "target_tokens": sum(len(b.targets) for b in batches),
        "tokens_per_second": round(tokens / seconds, 1),
        "mfu": round(mfu, 4),
        "memory_gb": round(peak_memory_gb(run.model.head.device), 3),
        "time": round(run.progress.seconds, 3),
    }


def _validate(run: Run, monitor: Monitor) -> tuple[float, str]:
    """Evaluate and remember the best; returns the loss, and a line that says so."""
    at = run.progress
    monitor.validating()
    score = evaluate(run.model, run.plan.val, run.plan.micro_tokens)
    better = math.isfinite(score.loss) and (at.best_loss is None or score.loss < at.best_loss)
    note = "(best)" if better else f"(best {at.best_loss:.4f} at step {at.best_step})" if at.best_loss else ""
    if better:
        at.best_loss, at.best_step = score.loss, at.step
    return score.loss, f" eval {at.step:>5}  validation loss {score.loss:.4f}  perplexity {score.perplexity:.2f} {note}"


@contextmanager
def _page_of_the_end(folder: Path) -> Iterator[None]:
    """Write a page anew that says that the run goes on, when the run has ended early and left its folder."""
    try:
        yield
    except (Stopped, Diverged, OutOfMemory):
        if (folder / "report.html").is_file():
            report_quietly(folder)
        raise


@contextmanager
def _memory_hint() -> Iterator[None]:
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


def _say_done(run: Run, result: Path, kept: str, console: Console) -> None:
    """The last lines: how long it took, where things are, and which step they are of."""
    at = run.progress
    lines = [
        "",
        f"done    {at.step} steps in {at.seconds:,.0f} s",
        f"{result.name:<7} {result}",
        f"        is {kept}",
        f"loss    {plot_loss(run.folder)}",
        f"report  {report_quietly(run.folder)}",
    ]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
