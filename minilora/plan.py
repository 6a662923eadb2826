"""What a training run will do, worked out before it does it: data, steps, and the header that says so."""

import hashlib
import math
import platform
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minilora.models.layers import Decoder

from . import __version__
from .checkpoint import fingerprint
from .config import TrainConfig
from .data import Example, Report, epoch_order, load_examples, steps_per_epoch
from .errors import DataError, UsageError
from .lora import adapters, base_parameters
from .snapshot import trained_parameters
from .tokenizer import Tokenizer, check_fits, load_tokenizer

EPOCHS, MIN_STEPS, MAX_EPOCHS = 3, 100, 20


@dataclass(frozen=True)
class Data:
    """The examples of a run and the reports on them."""

    tokenizer: Tokenizer
    train: list[Example]
    val: list[Example]
    report: Report
    val_note: str


@dataclass(frozen=True)
class Plan:
    """The numbers that a run follows."""

    train: list[Example]
    val: list[Example]
    steps: int
    steps_per_epoch: int
    rows_per_step: int
    micro_tokens: int
    eval_every: int
    save_every: int
    full: bool
    data_hash: str
    base: str
    header: str


def load_data(config: TrainConfig) -> Data:
    """Read, render and count the rows of a run; the validation rows are a file's, or taken out of the training rows."""
    tokenizer = load_tokenizer(config.model)
    limits = (config.loss_on, config.max_length, config.max_source_length, config.max_target_length)
    train, report = load_examples(config.data, tokenizer, config.define, *limits)
    idle = [key for key in config.define if not report.defined[key]]
    if idle:
        raise UsageError(
            f"--define {idle[0]}: no row of {config.data} has {{{{{idle[0]}}}}}",
            "Correct the name or leave it out.",
        )
    val, note = [], ""
    if config.val and Path(config.val).exists():
        val, val_report = load_examples(config.val, tokenizer, config.define, *limits)
        note = str(val_report)
    elif config.val:
        count = _val_count(config.val, len(train))
        order = epoch_order(len(train), config.seed, 2**31)
        val, train = [train[i] for i in sorted(order[:count])], [train[i] for i in sorted(order[count:])]
        note = f"{count:,} of these rows"
    return Data(tokenizer, train, val, report, note)


def _val_count(text: str, rows: int) -> int:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share < 1e15:
        raise UsageError(f"val is {text!r}", "It is a file that exists, a number of rows, or a share such as 0.05.")
    count = round(share * rows) if share < 1 else int(share)
    if not 0 < count < rows:
        raise DataError(f"val {text} would take {count:,} of {rows:,} rows", "Leave rows on both sides.")
    return count


def make_plan(config: TrainConfig, data: Data, model: Decoder) -> Plan:
    """Steps and streams of a run, and its header. ModelError if the tokenizer has more ids than the model."""
    check_fits(data.tokenizer, model.config.vocab, Path(config.model))
    rows_per_step = config.batch_size * config.accumulation
    per_epoch = steps_per_epoch(len(data.train), rows_per_step)
    epochs = config.epochs
    if epochs is None:
        epochs = min(max(EPOCHS, -(-MIN_STEPS // per_epoch)), MAX_EPOCHS)
    steps = max(1, round(epochs * per_epoch)) if config.max_steps is None else config.max_steps
    longest = max(len(e.ids) for e in data.train + data.val)
    plan = Plan(
        train=data.train,
        val=data.val,
        steps=steps,
        steps_per_epoch=per_epoch,
        rows_per_step=rows_per_step,
        micro_tokens=max(config.micro_tokens or config.max_length, longest),
        eval_every=config.eval_every or per_epoch,
        save_every=config.save_every or per_epoch,
        full=config.method == "full",
        data_hash=_hash(data.train) + _hash(data.val),
        base="" if config.method == "full" else fingerprint(base_parameters(model)),
        header="",
    )
    header = _header(config, data, model, plan, epochs)
    return Plan(**{**plan.__dict__, "header": header})


def data_record(data: Data, plan: Plan) -> dict[str, Any]:
    """What became of a run's rows, for data.json: counts, what was dropped and why, lengths as {tokens: rows}, hashes."""
    masked, trained = (Counter(n) for n in zip(*((len(e.ids) - e.trained, e.trained) for e in plan.train), strict=True))
    return {
        "rows": data.report.rows,
        "dropped": dict(data.report.dropped),
        "train_rows": len(plan.train),
        "val_rows": len(plan.val),
        "tokens": sum(len(e.ids) for e in plan.train),
        "trained": sum(e.trained for e in plan.train),
        "masked_lengths": dict(sorted(masked.items())),
        "trained_lengths": dict(sorted(trained.items())),
        "steps": plan.steps,
        "train_hash": _hash(plan.train),
        "val_hash": _hash(plan.val),
        "base": plan.base,
    }


def _hash(examples: list[Example]) -> str:
    digest = hashlib.sha256()
    for e in examples:
        digest.update(len(e.ids).to_bytes(8, "little") + e.ids.tobytes() + e.targets.tobytes())
    return digest.hexdigest()[:16]


def _header(config: TrainConfig, data: Data, model: Decoder, plan: Plan, epochs: float) -> str:
    device = model.head.device
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    total = sum(p.numel() for p in base_parameters(model).values())
    trained = sum(p.numel() for p in trained_parameters(model).values())
    c = model.config
    dtype = str(model.head.dtype).removeprefix("torch.")
    model_name, chat = Path(config.model).name, data.tokenizer.template.name
    lines = [
        f"minilora {__version__}   python {platform.python_version()}   torch {torch.__version__}   {place}",
        f"model   {model_name}   {c.family}, {total / 1e6:,.1f}M parameters, {c.layers} layers, {dtype}   chat format {chat}",
    ]
    if plan.full:
        lines.append(f"full    every weight is trained, {trained / 1e6:,.1f}M parameters in fp32")
    else:
        wrapped = [w for _, w in adapters(model)]
        names = " ".join(dict.fromkeys(p.split(".")[-1].removesuffix("_proj") for p, _ in adapters(model)))
        lines.append(
            f"lora    r={config.lora_r} alpha={config.lora_alpha:g} (scale {wrapped[0].scale:g})  {names}  {len(wrapped)} linears"
            f"  {trained / 1e6:,.2f}M trained ({100 * trained / total:.2f} %), fp32"
        )
    indent = "\n        "
    lines.append("data    " + str(data.report).replace("\n", indent))
    if data.val:
        lines.append("val     " + data.val_note.replace("\n", indent))
    lines.append(
        f"plan    {plan.rows_per_step} rows a step, {plan.steps_per_epoch:,} steps an epoch, {epochs:g} epochs: {plan.steps:,} steps"
        if config.max_steps is None
        else f"plan    {plan.rows_per_step} rows a step, {plan.steps:,} steps"
    )
    return "\n".join(lines)
