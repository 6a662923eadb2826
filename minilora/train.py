"""Training: config in, run folder out.

    rows -> examples -> the streams of a step -> loss summed over target tokens, divided once -> clip -> AdamW -> adapter

The loss of a step is the sum over all its target tokens divided by their number, however the rows are spread over
micro-batches. Order, learning rate and dropout are functions of the step, so a run that goes on from a checkpoint computes
the same bits as one that was never stopped.
"""

import math
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from minilora.models.layers import Decoder

from .adapter import save_adapter
from .checkpoint import load_model, save_model
from .config import TrainConfig, must_match, to_yaml
from .data import Batch, pack, step_examples
from .durable import locked, write_file
from .errors import CheckpointMismatch, DiskError, Diverged, OutOfMemory, OutputInUse, Stopped, UsageError
from .evaluate import batch_loss, evaluate
from .flops import peak_flops, step_flops
from .lora import add_lora, key_dropout
from .monitor import Monitor, peak_memory_gb
from .plan import Plan, load_data, make_plan
from .plot import plot_loss
from .signals import StopSignal
from .snapshot import (
    load_snapshot,
    newest_snapshot,
    read_state,
    rotate,
    save_snapshot,
    step_of,
    trained_parameters,
)


@dataclass
class Progress:
    """Where a run stands: what a snapshot stores beside tensors."""

    step: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None


def train(
    config: TrainConfig, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> Path:
    """Run a training; returns the folder of what was trained (RUN/adapter, or RUN/model with method full).

    Raises OutputInUse, CheckpointMismatch, Diverged, DiskError, Stopped, and what the data and the model give.
    """
    console = console or Console()
    for key in ("model", "data", "output"):
        if not getattr(config, key):
            raise UsageError(f"--{key} is missing", "minilora train --model DIR --data FILE --output RUN")
    run = Path(config.output)
    with _memory_hint(), locked(run):
        _check_claim(run, resume, overwrite)
        data = load_data(config)
        model = _load(config)
        plan = make_plan(config, data, model)
        console.print(plan.header, highlight=False, markup=False, soft_wrap=True)
        optimizer = _optimizer(model, config)
        progress = _restore(run, model, optimizer, config, plan, console) if resume else Progress()
        if overwrite:
            _clear(run)
        _check_disk(run, model)
        write_file(run / "config.yaml", to_yaml(config))
        with (
            Monitor(run / "metrics.jsonl", plan.steps, progress.step, console) as monitor,
            StopSignal() as stop,
        ):
            _loop(run, model, optimizer, config, plan, progress, monitor, stop)
        result = run / ("model" if plan.full else "adapter")
        if plan.full:
            save_model(model, result, config.model)
        else:
            save_adapter(model, result, config.model)
        _say_done(console, run, result, config, progress)
        return result


def _check_claim(run: Path, resume: bool, overwrite: bool) -> None:
    """OutputInUse unless the run folder is empty, or it is resumed, or the user said that its old run may go."""
    if overwrite and _held(run) and not (run / "config.yaml").is_file():
        raise OutputInUse(f"{run} holds no run that --overwrite could delete", "Give another --output.")
    if not resume and not overwrite and _held(run):
        raise OutputInUse(
            f"{run} is not empty",
            "Go on with --resume, start again with --overwrite, or give another --output.",
        )


def _clear(run: Path) -> None:
    """Delete an old run; it is called when everything that the new one needs has been read."""
    for path in _held(run):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _held(run: Path) -> list[Path]:
    return [p for p in run.iterdir() if not p.name.startswith(".")]


def _load(config: TrainConfig) -> Decoder:
    full = config.method == "full"
    dtype = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
    device = None if config.device == "auto" else config.device
    model = load_model(config.model, torch.float32 if full else dtype, device)
    if model.head.dtype == torch.float16:
        model.to(torch.bfloat16)  # gradients would underflow in fp16
    if full:
        model.requires_grad_(True)
    else:
        add_lora(
            model,
            config.lora_targets,
            config.lora_r,
            config.lora_alpha,
            config.lora_dropout,
            config.rslora,
            config.seed,
        )
    model.checkpointing = config.checkpointing
    return model.train()


def _optimizer(model: Decoder, config: TrainConfig) -> torch.optim.AdamW:
    parameters = list(trained_parameters(model).values())
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=betas, weight_decay=config.weight_decay, fused=True
    )


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The rate of step 0, 1, ... of `steps`: linear warmup to config.lr, then the schedule towards 0."""
    warmup = round(config.warmup * steps) if config.warmup < 1 else min(int(config.warmup), steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return config.lr * shape[config.schedule]


def train_step(
    model: Decoder, optimizer: torch.optim.Optimizer, batches: list[Batch], config: TrainConfig, step: int,
    stop: StopSignal | None = None,
) -> tuple[float, float]:  # fmt: skip
    """One optimizer step on the batches of a step; returns (loss, gradient norm before clipping).

    The learning rate is the one the optimizer has. Raises Diverged before anything is changed if either is not finite,
    and Stopped between two micro-batches if a signal came; the parameters are then those of the step before.
    """
    device = model.head.device
    targets = sum(len(b.rows) for b in batches)
    losses = []
    for micro, batch in enumerate(batches):
        if stop is not None and stop.requested:
            optimizer.zero_grad(set_to_none=True)
            raise Stopped("")
        key_dropout(model, config.seed, step, micro)
        loss = batch_loss(model, batch.to(device)) / targets
        loss.backward()
        losses.append(loss.detach())
    norm = torch.nn.utils.get_total_norm(
        [p.grad for p in trained_parameters(model).values() if p.grad is not None]
    )
    loss, grad_norm = torch.stack([torch.stack(losses).sum(), norm.to(losses[0].dtype)]).tolist()
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        bad = next(
            (
                n
                for n, p in trained_parameters(model).items()
                if p.grad is not None and not p.grad.isfinite().all()
            ),
            "none",
        )
        rows = ", ".join([w for b in batches for w in b.where][:4])
        raise Diverged(f"step {step + 1}: loss {loss}, gradient norm {grad_norm} (first bad gradient: {bad}; rows: {rows} ...)",
                       "Lower --lr or raise --warmup; nothing of this step was kept.")  # fmt: skip
    if config.clip:
        torch.nn.utils.clip_grads_with_norm_(list(trained_parameters(model).values()), config.clip, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm


def _loop(
    run: Path, model: Decoder, optimizer: torch.optim.AdamW, config: TrainConfig, plan: Plan, progress: Progress,
    monitor: Monitor, stop: StopSignal,
) -> None:  # fmt: skip
    device = model.head.device
    peak = peak_flops(device, model.head.dtype)
    began = time.perf_counter() - progress.seconds
    saved = progress.step if progress.step else None
    if plan.val and progress.step == 0:
        _validate(model, plan, progress, monitor)
    try:
        for step in range(progress.step, plan.steps):
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step, plan.steps)
            batches = pack(
                step_examples(plan.train, plan.rows_per_step, config.seed, step), plan.micro_tokens
            )
            loss, grad_norm = train_step(model, optimizer, batches, config, step, stop)
            seconds = time.perf_counter() - start
            progress.step, progress.seconds = step + 1, time.perf_counter() - began
            tokens = sum(len(b.ids) for b in batches)
            metrics = {
                "step": step + 1,
                "epoch": round((step + 1) / plan.steps_per_epoch, 4),
                "loss": loss,
                "lr": optimizer.param_groups[0]["lr"],
                "grad_norm": grad_norm,
                "tokens": tokens,
                "target_tokens": sum(len(b.rows) for b in batches),
                "tokens_per_second": round(tokens / seconds, 1),
                "mfu": round(step_flops(model, batches, plan.full) / seconds / peak, 4),
                "memory_gb": round(peak_memory_gb(device), 3),
                "time": round(progress.seconds, 3),
            }
            last = step + 1 == plan.steps
            if plan.val and ((step + 1) % plan.eval_every == 0 or last):
                metrics["val_loss"] = _validate(model, plan, progress, monitor)
            monitor.step(metrics)
            if (step + 1) % plan.save_every == 0 or last:
                _save(run, model, optimizer, config, plan, progress)
                saved = step + 1
    except Stopped:
        if saved != progress.step:
            _save(run, model, optimizer, config, plan, progress)
        raise Stopped(f"stopped by {stop.name} at step {progress.step} of {plan.steps}; the state is saved in {run / 'checkpoints'}",
                      f"Go on with: minilora train --output {run} --resume") from None  # fmt: skip
    except Diverged as error:
        where = (
            f"checkpoints/step-{saved} is the last good state" if saved else "no checkpoint was written yet"
        )
        losses = ", ".join(f"{loss:.3f}" for loss in monitor.losses)
        raise Diverged(error.what, f"{error.hint} Last losses: {losses or 'none'}; {where}.") from None


def _validate(model: Decoder, plan: Plan, progress: Progress, monitor: Monitor) -> float:
    score = evaluate(model, plan.val, plan.micro_tokens)
    better = progress.best_loss is None or score.loss < progress.best_loss
    note = " (best)" if better else f" (best {progress.best_loss:.4f} at step {progress.best_step})"
    if better:
        progress.best_loss, progress.best_step = score.loss, progress.step
    monitor.say(
        f" eval {progress.step:>5}  validation loss {score.loss:.4f}  perplexity {score.perplexity:.2f}{note}"
    )
    if progress.step == 0:
        monitor.step({"step": 0, "val_loss": score.loss})
    return score.loss


def _save(
    run: Path,
    model: Decoder,
    optimizer: torch.optim.AdamW,
    config: TrainConfig,
    plan: Plan,
    progress: Progress,
) -> None:
    checkpoints = run / "checkpoints"
    state = {
        "step": progress.step,
        "seconds": progress.seconds,
        "best_loss": progress.best_loss,
        "best_step": progress.best_step,
        "steps": plan.steps,
        "settings": must_match(config),
        "data": plan.data_hash,
        "base": plan.base,
        "machine": _machine(),
    }
    save_snapshot(
        checkpoints / f"step-{progress.step}", model, optimizer, state, Path(config.model), plan.full
    )
    rotate(checkpoints, config.keep, progress.step, progress.best_step)


def _machine() -> dict[str, str | int]:
    """What the last bits of a float depend on."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def _restore(
    run: Path, model: Decoder, optimizer: torch.optim.AdamW, config: TrainConfig, plan: Plan, console: Console
) -> Progress:
    """Copy the newest whole snapshot of a run into model and optimizer; CheckpointMismatch if it is of other settings."""
    folder, skipped = newest_snapshot(run / "checkpoints")
    for line in skipped:
        console.print(line, highlight=False, markup=False)
    if folder is None:
        raise CheckpointMismatch(f"{run} has no checkpoint to go on from", "Start again with --overwrite.")
    state = read_state(folder)
    now = {**must_match(config), "data": plan.data_hash, "base": plan.base, "steps": plan.steps}
    then = {**state["settings"], "data": state["data"], "base": state["base"], "steps": state["steps"]}
    changed = [f"{k}: {then.get(k)} then, {v} now" for k, v in now.items() if then.get(k) != v]
    if changed:
        raise CheckpointMismatch(f"{folder} is of a run with other settings ({'; '.join(changed)})",
                                 "Resume with the settings of that run, or start another --output.")  # fmt: skip
    load_snapshot(folder, model, optimizer, plan.full)
    differs = [
        f"{k} was {state['machine'].get(k)}, is {v}"
        for k, v in _machine().items()
        if state["machine"].get(k) != v
    ]
    note = f" (not bit for bit: {', '.join(differs)})" if differs else ""
    console.print(f"resume  from {folder}{note}", highlight=False, markup=False, soft_wrap=True)
    return Progress(step_of(folder), state["seconds"], state["best_loss"], state["best_step"])


def _check_disk(run: Path, model: Decoder) -> None:
    """DiskError now rather than at the first save: a snapshot and its successor need 2 x 12 bytes a trained parameter."""
    need = 2 * 12 * sum(p.numel() for p in trained_parameters(model).values()) + (1 << 20)
    free = shutil.disk_usage(run).free
    if free < need:
        raise DiskError(
            f"{run}: checkpoints need {need / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free",
            "Free some space, or give another --output.",
        )


@contextmanager
def _memory_hint() -> Iterator[None]:
    """Say what would need less memory when there is not enough."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        ours = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(
            error
        )
        if not ours:
            raise
        raise OutOfMemory(f"out of memory: {str(error).partition(chr(10))[0][:200] or 'the system gives no more'}",
                          "Try --checkpointing on, a smaller --micro-tokens (with a smaller --max-length), or a smaller --lora-r.") from None  # fmt: skip


def _say_done(console: Console, run: Path, result: Path, config: TrainConfig, progress: Progress) -> None:
    picture = plot_loss(run)
    lines = ["", f"done    {progress.step} steps in {progress.seconds:,.0f} s"]
    if progress.best_step is not None:
        lines.append(f"best    validation loss {progress.best_loss:.4f} at step {progress.best_step}"
                     + (f": {run / 'checkpoints' / 'best'}" if progress.best_step else ", before training"))  # fmt: skip
    if config.method == "full":
        lines += [f"model   {result}", f"loss    {picture}", "", f"  minilora chat --model {result}"]
    else:
        chat = f"  minilora chat  --model {config.model} --adapter {result}"
        rows = config.val if Path(config.val).is_file() else config.data
        define = "".join(f" --define {shlex.quote(f'{key}={text}')}" for key, text in config.define.items())
        score = f"  minilora eval  --model {config.model} --adapter {result} --data {rows}{define}"
        merge = f"  minilora merge --model {config.model} --adapter {result} --output {run / 'merged'}"
        lines += [f"adapter {result}", f"loss    {picture}", "", chat, score, merge]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
