"""`minilora plan`: parameters, tokens, steps and memory of a training, worked out from config.json, and the data if given.

Nothing is loaded but the tokenizer and the rows. Memory is that of the largest stream of the run, by a dry run (dry_run.py).
Without data every row is taken to be as long as the limits allow.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import empty_model, read_config
from .config import TrainConfig
from .data import IGNORE, Batch, Example, make_batch, pack, step_examples
from .dry_run import StepMemory, step_memory
from .errors import UsageError
from .flops import step_flops
from .lora import adapters
from .plan import count_steps
from .rows.dataset import load_data
from .snapshot import trained_parameters
from .text.tokenizer import check_fits
from .train import base_dtype, prepare


def forecast(config: TrainConfig, device_gb: float) -> dict[str, Any]:
    """What a training would need, as plain values for JSON; device_gb is the card's memory in 10^9 bytes."""
    if not config.model:
        raise UsageError("--model is missing", "minilora plan --model DIR [--data FILE] [settings of train]")
    c = read_config(Path(config.model))
    model = prepare(empty_model(c, base_dtype(config)), config)
    parameters = sum(p.numel() for p in empty_model(c).parameters())
    trained = sum(p.numel() for p in trained_parameters(model).values())
    found: dict[str, Any] = {
        "model": config.model,
        "family": c.family,
        "parameters": parameters,
        "dtype": str(model.head.dtype).removeprefix("torch."),
        "method": config.method,
        "lora_r": config.lora_r,
        "linears": sum(1 for _ in adapters(model)),
        "trained": trained,
    }
    prefix = hasattr(c, "sop")
    if config.data:
        data = load_data(config)
        check_fits(data.tokenizer, c.vocab, Path(config.model))
        steps, per_epoch, epochs = count_steps(config, len(data.train))
        streams = _streams(config, data.train, per_epoch)
        found |= {
            "rows": len(data.train),
            "report": str(data.report),
            "steps": steps,
            "epochs": epochs,
            "tokens": data.report.tokens,
        }
    else:
        row = _assumed_row(config, prefix)
        streams = _streams(config, [row] * (config.batch_size * config.accumulation), 1)
        found |= {"row_tokens": len(row.ids), "row_trained": row.trained}
    largest = max(streams, key=lambda batch: len(batch.ids))
    memory = step_memory(model, largest)
    found["step"] = {
        "rows": config.batch_size * config.accumulation,
        "tokens": None if config.data else sum(len(batch.ids) for batch in streams),
        "streams": None if config.data else len(streams),
        "stream_tokens": len(largest.ids),
        "stream_trained": len(largest.rows),
        "flops": step_flops(model, [largest], config.method == "full"),
    }
    found["memory"] = vars(memory) | {"total": memory.total}
    found["device_gb"] = device_gb
    found["most_tokens"] = _most_tokens(config, memory, largest, device_gb)
    return found


def _assumed_row(config: TrainConfig, prefix: bool) -> Example:
    """A row as long as the limits allow; where only max_length is given, all of it trained."""
    source, target = config.max_source_length, config.max_target_length
    length = min(config.max_length, source + target) if source and target else config.max_length
    target = min(target or length - 1, length - 1)
    targets = np.full(length, IGNORE, dtype=np.int64)
    targets[length - 1 - target : length - 1] = 1
    return Example(np.zeros(length, dtype=np.int64), targets, "assumed", length - target if prefix else None)


def _streams(config: TrainConfig, examples: Sequence[Example], steps: int) -> list[Batch]:
    """The streams of the steps of one epoch, as training packs them."""
    room = max(config.micro_tokens or config.max_length, max(len(e.ids) for e in examples))
    rows = config.batch_size * config.accumulation
    return [b for step in range(steps) for b in pack(step_examples(examples, rows, config.seed, step), room)]


def _most_tokens(config: TrainConfig, memory: StepMemory, stream: Batch, device_gb: float) -> int:
    """About how long a stream may be on this card: memory grows along the line of this stream and one twice as long."""
    model = prepare(empty_model(read_config(Path(config.model)), base_dtype(config)), config)
    twice = step_memory(model, _twice(stream))
    slope = (twice.total - memory.total) / len(stream.ids)
    return max(0, int(len(stream.ids) + (device_gb * 1e9 - memory.total) / slope))


def _twice(stream: Batch) -> Batch:
    """A stream with all its documents two times."""
    starts = stream.seams[:-1]
    targets = np.full(len(stream.ids), IGNORE, dtype=np.int64)
    targets[stream.rows.numpy()] = stream.targets.numpy()
    bounds = list(zip(starts, stream.seams[1:], stream.prefixes or [None] * len(starts), strict=True))
    examples = [Example(stream.ids[a:b].numpy(), targets[a:b], "twice", prefix) for a, b, prefix in bounds]
    return make_batch(examples * 2)


def text_of(found: dict[str, Any]) -> str:
    """A forecast for people."""
    step, memory = found["step"], found["memory"]
    share = 100 * found["trained"] / found["parameters"]
    how = f"r={found['lora_r']}, {found['linears']} linears, " if found["method"] == "lora" else ""
    lines = [
        f"model   {found['model']}   {found['family']}, {found['parameters']:,} parameters, {found['dtype']}",
        f"{found['method']:<7} {how}{found['trained']:,} trained ({share:.2f} %), fp32",
    ]
    if "rows" in found:
        lines.append("data    " + found["report"].replace("\n", "\n        "))
        lines.append(f"plan    {found['steps']:,} steps, {found['epochs']:g} epochs of {found['tokens']:,} tokens")
    else:
        lines.append(
            f"rows    of {found['row_tokens']:,} tokens, {found['row_trained']:,} of them trained (assumed: there is no --data)"
        )
        lines.append(f"plan    a step has {step['rows']} rows, {step['tokens']:,} tokens, in {step['streams']} streams")
    lines += [
        f"stream  {step['stream_tokens']:,} tokens in one pass, {step['stream_trained']:,} trained: {step['flops'] / 1e12:,.3g} TFLOP",
        "memory  GB",
    ]
    notes = {
        "activations": "kept for the backward pass",
        "temporaries": "at the peak: gradients on the way, logits of a chunk of rows",
    }
    for name, size in memory.items():
        lines.append(f"        {name:<12} {size / 1e9:>8.3f}   {notes.get(name, '')}".rstrip())
    left = found["device_gb"] - memory["total"] / 1e9
    verdict = (
        f"fits in {found['device_gb']:g} GB, {left:,.1f} free"
        if left > 0
        else f"needs {-left:,.1f} GB more than {found['device_gb']:g}"
    )
    lines.append(f"        {verdict}; what CUDA and the allocator take comes on top")
    lines.append(f"room    for streams of about {found['most_tokens']:,} tokens (--micro-tokens)")
    return "\n".join(lines)
