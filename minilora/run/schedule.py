"""The plan of a training run, made before its first step: rows, steps, learning rate, and the header that says so."""

import math
import platform
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from minilora.models.config import as_json
from minilora.models.decoder import Decoder

from .. import __version__
from ..checkpoint.load import fingerprint
from ..checkpoint.open_model import folder_notes
from ..checkpoint.quantized import quantized_note
from ..config import TrainConfig
from ..data import Examples, pack, step_examples, steps_per_epoch
from ..experts import experts_note
from ..files.model_folder import ModelFolder
from ..lora import base_parameters, trained_parameters
from ..machine.compute import name_of
from ..machine.cpu import device_name
from ..machine.gemm import gemm_lines
from ..machine.kernel_paths import kernel_paths
from ..positions import check_room
from ..ranks.ranks import ALONE, Ranks
from ..rows.dataset import Data
from ..text.tokenizer import check_fits
from .advice import advice
from .fit import check_longest, longest_document, stream_tokens
from .graphs import Choice, choose
from .method_lines import method_lines

EPOCHS, MIN_STEPS, MAX_EPOCHS = 3, 100, 20


@dataclass(frozen=True)
class Plan:
    """The rows of a run and the numbers it follows."""

    train: Examples
    val: Examples
    steps: int
    steps_per_epoch: int
    rows_per_step: int
    micro_tokens: int
    graphs: Choice
    eval_every: int
    save_every: int
    full: bool
    data_hash: str
    base: str
    architecture: dict[str, Any]
    machine: dict[str, str]
    header: str


def make_plan(
    config: TrainConfig, folder: ModelFolder, data: Data, model: Decoder, computing: str, ranks: Ranks = ALONE
) -> Plan:
    """Steps and streams of a run, and its header, which has `computing` as the line on dtype and threads.

    ModelError if the tokenizer has more ids than the model; OutOfMemory for a row that no stream has room for, DataError for one that
    has more tokens than the model learned positions.
    """
    check_fits(data.tokenizer, model.config.vocab, folder)
    steps, per_epoch, epochs = count_steps(config, len(data.train))
    rows_per_step = config.batch_size * config.accumulation
    longest = max(data.train.longest, data.val.longest)
    for rows in filter(len, (data.train, data.val)):
        check_room(model, *longest_document(rows))
    sharing = ranks.count if ranks.shards else 1
    streams = stream_tokens(config, folder, model, longest, -(-rows_per_step // ranks.count), sharing)
    check_longest(config, data.train, streams.room, model.head.device)
    plan = Plan(
        train=data.train,
        val=data.val,
        steps=steps,
        steps_per_epoch=per_epoch,
        rows_per_step=rows_per_step,
        micro_tokens=ranks.least(streams.tokens),
        graphs=choose(config, model, streams),
        eval_every=config.eval_every or per_epoch,
        save_every=config.save_every or per_epoch,
        full=config.method == "full",
        data_hash=data.train.digest() + data.val.digest(),
        base=fingerprint(base_parameters(model)),
        architecture=as_json(model.config),
        machine={
            "minilora": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": device_name(model.head.device),
            "computing": computing,
        },
        header="",
    )
    return replace(plan, header=_header(config, folder, data, model, plan, epochs, computing, ranks))


def data_record(data: Data, plan: Plan) -> dict[str, Any]:
    """A record of a run's rows, for data.json: counts, what was dropped or cut and why, lengths as {tokens: rows}, hashes; and of the machine."""
    length, trained = plan.train.column("length"), plan.train.column("trained")
    return {
        "rows": data.report.rows,
        "dropped": {f"over {limit}": n for limit, n in data.report.dropped.items()} | dict(data.report.broken),
        "cut": {f"over {limit}": n for limit, n in data.report.cut.items()},
        "train_rows": int(plan.train.firsts.sum()),
        "val_rows": int(plan.val.firsts.sum()),
        "tokens": int(length.sum()),
        "trained": int(trained.sum()),
        "masked_lengths": _counted(length - trained),
        "trained_lengths": _counted(trained),
        "steps": plan.steps,
        "train_hash": plan.train.digest(),
        "val_hash": plan.val.digest(),
        "base": plan.base,
        "architecture": plan.architecture,
        "machine": plan.machine,
    }


def _counted(lengths: np.ndarray) -> dict[str, int]:
    return {str(n): int(rows) for n, rows in zip(*np.unique(lengths, return_counts=True), strict=True)}


def count_steps(config: TrainConfig, rows: int) -> tuple[int, int, float]:
    """(optimizer steps of a run, steps of an epoch, epochs) for this many rows."""
    per_epoch = steps_per_epoch(rows, config.batch_size * config.accumulation)
    epochs = config.epochs
    if epochs is None:
        epochs = min(max(EPOCHS, -(-MIN_STEPS // per_epoch)), MAX_EPOCHS)
    steps = max(1, round(epochs * per_epoch)) if config.max_steps is None else config.max_steps
    return steps, per_epoch, epochs


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The rate of step 0, 1, ... of `steps`: linear warmup to config.lr, then the schedule towards 0."""
    warmup = round(config.warmup * steps) if config.warmup < 1 else min(int(config.warmup), steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return config.lr * shape[config.schedule]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of the next step, for each group times its ratio; on a GPU it lies in a tensor, from which a CUDA graph reads it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr * group.get("ratio", 1.0))
        else:
            group["lr"] = lr * group.get("ratio", 1.0)


def _header(
    config: TrainConfig,
    folder: ModelFolder,
    data: Data,
    model: Decoder,
    plan: Plan,
    epochs: float,
    computing: str,
    ranks: Ranks,
) -> str:
    device = model.head.device
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    total = sum(p.numel() for p in base_parameters(model).values())
    trained = sum(p.numel() for p in trained_parameters(model).values())
    c = model.config
    dtype = name_of(model.head.dtype)
    template = data.tokenizer.template
    model_name = folder.path.name
    chat = template.name + (" (the last answer of a row is trained)" if template.last_only else "")
    lines = [
        f"minilora {__version__}   python {platform.python_version()}   torch {torch.__version__}   {place}",
        f"model   {model_name}   {c.family}, {total / 1e6:,.1f}M parameters, {c.layers} layers, {dtype}   chat format {chat}",
    ]
    inputs = c.layers * plan.micro_tokens * c.width * model.compute_dtype.itemsize
    waits = f"the inputs of layers wait in the host's memory, pinned: up to {inputs / 1e9:,.2f} GB"
    notes = {
        "experts": experts_note(model),
        "quant": quantized_note(model),
        "offload": waits if model.offload else None,
    }
    notes |= folder_notes(folder, data.tokenizer)
    lines += [f"{name:<8}{note}" for name, note in notes.items() if note]
    if plan.full:
        lines.append(f"full    every weight is trained, {trained / 1e6:,.1f}M parameters in fp32")
    else:
        share = f"{trained / 1e6:,.2f}M trained ({100 * trained / total:.2f} %), fp32"
        lines += [f"{name:<8}{note}" for name, note in method_lines(config, model, share)]
    indent = "\n        "
    lines.append("compute " + computing)
    lines.append("kernels " + indent.join(kernel_paths(model, device)))
    if device.type == "cuda" or config.graphs == "on":
        lines.append(f"graphs  {'on' if plan.graphs.on else 'off'}: {plan.graphs.why}")
    forms = gemm_lines(model)
    lines += ["gemm    " + indent.join(forms)] if forms else []
    if ranks.count > 1:
        first = pack(step_examples(plan.train, plan.rows_per_step, config.seed, 0), plan.micro_tokens)
        lines.append("ranks   " + ranks.note([len(batch.ids) for batch in first]))
    if config.shard == "on":
        lines.append("shard   " + (ranks.shards.note() if ranks.shards else "off: there is one rank"))
    lines.append("data    " + str(data.report).replace("\n", indent))
    lines += [f"{name:<8}" + note.replace("\n", indent) for name, note in data.notes.items()]
    lines.append(
        f"plan    {plan.rows_per_step} rows a step, {plan.steps_per_epoch:,} steps an epoch, {epochs:g} epochs: {plan.steps:,} steps"
        if config.max_steps is None
        else f"plan    {plan.rows_per_step} rows a step, {plan.steps:,} steps"
    )
    lines += [f"advice  {line}" for line in advice(config, trained, int(plan.train.column("trained").sum()))]
    return "\n".join(lines)
