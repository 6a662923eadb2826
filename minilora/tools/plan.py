"""`minilora plan`: the parameters, tokens, steps and memory of a training, from config.json and from the data if given.

Only the tokenizer and the rows are loaded. The memory is that of the run's largest stream, by a dry run (dry_run.py). Without
data every row is assumed to be as long as the limits allow. With several ranks the memory is that of one of them, and what travels
between them is told as well (network.py).
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch

from minilora.kernels.dispatch import use_gemm
from minilora.models.decoder import Decoder

from ..checkpoint.load import empty_model, find_device, read_config
from ..checkpoint.quantized import in_memory
from ..config import TrainConfig
from ..data import IGNORE, Batch, Example, pack, step_examples
from ..errors import UsageError
from ..files.model_folder import ModelFolder, positions_note
from ..lora import adapters, trained_parameters
from ..machine.compute import name_of, products_rate
from ..machine.cpu import device_name, memory_gb
from ..machine.dry_run import StepMemory, card_memory, step_memory
from ..machine.flops import flops_per_token, step_flops
from ..machine.gemm import settle
from ..objective import objective_of
from ..rows.dataset import load_data
from ..run.advice import advice
from ..run.fit import long_row, longest_row, rank_memory, round_down, streams_on_card
from ..run.schedule import count_steps
from ..run.setup import check_offload, check_shard, dtypes, prepare, quant_asked
from ..terminal import clock
from ..text.tokenizer import check_fits
from .network import network_forecast, network_lines

CARDS = (8, 16, 24, 48, 80)  # GB of the GPUs there are


def forecast(config: TrainConfig, card_gb: float | None, gpus: int = 1) -> dict[str, Any]:
    """What a training would need, as plain values for JSON: on GPUs with card_gb * 10^9 bytes each, or on this machine."""
    if not config.model:
        raise UsageError("--model is missing", "minilora plan --model DIR [--data FILE] [settings of train]")
    folder = ModelFolder(config.model)
    c = read_config(folder)
    device = find_device(None if config.device == "auto" else config.device)
    on_card = card_gb is not None or device.type == "cuda"
    place = torch.device("cuda") if on_card else device
    check_offload(config, place)
    check_shard(config)
    stored, compute = dtypes(config, c, place)
    quant = quant_asked(config, place, planned=card_gb is not None)
    model = prepare(empty_model(c, stored, in_memory(quant, folder.config)), config)
    model.compute = compute
    parameters = sum(p.numel() for p in empty_model(c).parameters())
    trained = sum(p.numel() for p in trained_parameters(model).values())
    found: dict[str, Any] = {
        "model": config.model,
        "family": c.family,
        "parameters": parameters,
        "dtype": name_of(stored),
        "compute": name_of(compute),
        "method": config.method,
        "lora_r": config.lora_r,
        "linears": sum(1 for _ in adapters(model)),
        "trained": trained,
    }
    prefix, rows = hasattr(c, "sop"), config.batch_size * config.accumulation
    sharing = gpus if config.shard == "on" else 1
    gb = memory_gb(device) / (1 if on_card else gpus) if card_gb is None else card_gb

    def streams_of(examples: Sequence[Example], longest: int, steps: int) -> list[list[Batch]]:
        """The streams of each step of one epoch, as training packs them."""
        room = max(config.micro_tokens or config.max_length, longest)
        if on_card:
            room = streams_on_card(config, model, 1e9 * gb, longest, -(-rows // gpus), sharing).tokens
        return [pack(step_examples(examples, rows, config.seed, step), room) for step in range(steps)]

    if config.data:
        data = load_data(config, folder)
        check_fits(data.tokenizer, c.vocab, folder)
        steps, per_epoch, epochs = count_steps(config, len(data.train))
        of_steps = streams_of(data.train, data.train.longest, per_epoch)
        found |= {
            "rows": len(data.train),
            "report": "\n".join([str(data.report), *data.notes.values()]),
            "steps": steps,
            "epochs": epochs,
            "tokens": data.report.tokens,
            "longest": {"row": longest_row(data.train), "tokens": data.train.longest},
        }
        targets = data.report.trained
    else:
        row = _assumed_row(config, prefix)
        of_steps, targets = streams_of([row] * rows, len(row.ids), 1), None
        found |= {"row_tokens": len(row.ids), "row_trained": row.trained}
        found["note"] = positions_note(folder, len(row.ids))
    found["advice"] = advice(config, trained, targets)
    largest = max(chain(*of_steps), key=lambda batch: len(batch.ids))
    per_token = flops_per_token(model, config.method == "full")
    flops = step_flops(c, [largest], per_token)
    # of the forms that may be chosen, the one that needs the most memory; matrices for it are no part of a shared base
    form = "augmented" if on_card and sharing == 1 else "library"
    with use_gemm(form if config.gemm == "auto" else config.gemm):
        settle(model, len(largest.ids))
        memory = rank_memory((card_memory if on_card else step_memory)(model, largest), model, sharing, on_card)
    found["step"] = {
        "rows": rows,
        "tokens": None if config.data else sum(len(batch.ids) for batch in of_steps[0]),
        "streams": None if config.data else len(of_steps[0]),
        "stream_tokens": len(largest.ids),
        "stream_trained": len(largest.targets),
        "flops": flops,
        "seconds": flops / products_rate(c, stored, compute) if card_gb is None and device.type == "cpu" else None,
    }
    parts = {k: v for k, v in vars(memory).items() if k != "host" and (v or k != "buffers")}
    found["memory"] = parts | {"total": memory.total}
    found["host"] = memory.host
    found["device"] = device_name(device) if card_gb is None else "a card"
    found["device_gb"] = gb
    found["most_tokens"] = _most_tokens(memory, largest, gb)
    if config.data and found["longest"]["tokens"] > found["most_tokens"]:
        place = f"the {gb:,.4g} GB of {found['device']}"
        row = found["longest"]["row"], found["longest"]["tokens"]
        found["too_long"] = "\n".join(long_row(config, *row, found["most_tokens"], place, on_card))
    if on_card:
        found["cards"] = _cards(model, largest, memory, sharing)
    if gpus > 1:
        found["ranks"] = network_forecast(model, of_steps[0], per_token, gpus, sharing > 1, objective_of(config).passes)
    return found


def _assumed_row(config: TrainConfig, prefix: bool) -> Example:
    """A row as long as the limits allow; if only max_length is given, all of it is trained."""
    source, target = config.max_source_length, config.max_target_length
    length = min(config.max_length, source + target) if source and target else config.max_length
    target = min(target or length - 1, length - 1)
    targets = np.full(length, IGNORE, dtype=np.int64)
    targets[length - 1 - target : length - 1] = 1
    return Example(np.zeros(length, dtype=np.int64), targets, "assumed", length - target if prefix else None)


def _most_tokens(memory: StepMemory, stream: Batch, gb: float) -> int:
    """About how many tokens a stream can have in `gb` GB; three digits."""
    return round_down(memory.most_tokens(len(stream.ids), gb * 1e9))


def _cards(model: Decoder, stream: Batch, memory: StepMemory, sharing: int) -> list[dict[str, int]]:
    """About how many tokens a stream can have on GPUs of each size, activations kept and with --checkpointing."""
    found, asked = {model.checkpointing: memory}, model.checkpointing
    model.checkpointing = not asked
    found[not asked] = rank_memory(card_memory(model, stream), model, sharing, ahead=True)
    ways = {"kept": found[False], "checkpointing": found[True]}
    return [{"gb": gb} | {way: _most_tokens(needed, stream, gb) for way, needed in ways.items()} for gb in CARDS]


def text_of(found: dict[str, Any]) -> str:
    """A forecast for people."""
    step, memory = found["step"], found["memory"]
    share = 100 * found["trained"] / found["parameters"]
    how = f"r={found['lora_r']}, {found['linears']} linears, " if found["method"] == "lora" else ""
    lines = [
        f"model   {found['model']}   {found['family']}, {found['parameters']:,} parameters, {found['dtype']}, computed in {found['compute']}",
        f"{found['method']:<7} {how}{found['trained']:,} trained ({share:.2f} %), fp32",
    ]
    if "rows" in found:
        lines.append("data    " + found["report"].replace("\n", "\n        "))
        lines.append(f"plan    {found['steps']:,} steps, {found['epochs']:g} epochs of {found['tokens']:,} tokens")
    else:
        lines.append(
            f"rows    of {found['row_tokens']:,} tokens, {found['row_trained']:,} of them trained (assumed: there is no --data)"
        )
        if found["note"]:
            lines.append(f"note    {found['note']}")
        lines.append(f"plan    a step has {step['rows']} rows, {step['tokens']:,} tokens, in {step['streams']} streams")
    lines += [f"advice  {line}" for line in found["advice"]]
    lines += [
        f"stream  {step['stream_tokens']:,} tokens in one pass, {step['stream_trained']:,} trained: {step['flops'] / 1e12:,.3g} TFLOP",
        "memory  GB" + (", of each rank" if "ranks" in found else ""),
    ]
    notes = {
        "activations": "kept for the backward pass",
        "temporaries": "at the peak: gradients on the way, logits of a chunk of rows",
        "buffers": "where the layers of the base are gathered",
    }
    for name, size in memory.items():
        lines.append(f"        {name:<12} {size / 1e9:>8.3f}   {notes.get(name, '')}".rstrip())
    left = found["device_gb"] - memory["total"] / 1e9
    room = f"the {found['device_gb']:,.4g} GB of {found['device']}"
    verdict = f"fits in {room}, {left:,.1f} free" if left > 0 else f"needs {-left:,.1f} GB more than {room}"
    if left <= 0 and "ranks" in found and not found["ranks"]["shard"]:
        verdict += " (--shard on gives each rank a part of the base)"
    lines.append(f"        {verdict}; what the system and the allocator take comes on top")
    if found["host"]:
        lines.append(f"offload {found['host'] / 1e9:,.3f} GB more in the host's memory: the inputs of layers")
    lines.append(f"room    for streams of about {found['most_tokens']:,} tokens (--micro-tokens)")
    if "too_long" in found:
        lines.append("long    " + found["too_long"].replace("\n", "\n        "))
    if "cards" in found:
        rows = {"gb": "GB of a card", "kept": "tokens of a stream", "checkpointing": "the same with --checkpointing"}
        cells = {key: "".join(f"{gpu[key]:>9,}" for gpu in found["cards"]) for key in rows}
        lines += [f"{'cards' if key == 'gb' else '':<5}{cells[key]}   {what}" for key, what in rows.items()]
    if "ranks" in found:
        lines += network_lines(found["ranks"])
    if step["seconds"] is not None:
        lines.append(f"time    {_duration(step['seconds'])} a stream at least, at the speed of this machine's products")
    if found["device"] != "a card":
        lines.append("        (--device-memory 80: the same on a card of 80 GB, and what fits cards of other sizes)")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    return f"{seconds:,.2g} s" if seconds < 100 else clock(seconds)
