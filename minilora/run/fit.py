"""How long the streams of a run are. On a GPU as long as its memory allows, up to where longer ones gain nothing.

A row is never divided, so a stream is at least as long as the longest one; one that does not fit is named before training begins.
"""

from dataclasses import replace
from math import inf
from typing import NamedTuple

import numpy as np
import torch

from minilora.kernels.cross_entropy import BLOCK_ROWS
from minilora.kernels.linear_cross_entropy import CHUNK_ROWS_CUDA
from minilora.models.decoder import Decoder
from minilora.models.stream import Batch, Documents

from ..checkpoint.load import empty_model
from ..checkpoint.quantized import in_memory
from ..config import TrainConfig
from ..data import Examples
from ..errors import OutOfMemory
from ..files.model_folder import ModelFolder
from ..machine.cpu import device_name, memory_gb
from ..machine.dry_run import StepMemory, step_memory
from ..ranks.shard import shard_bytes
from .setup import prepare, quant_asked

LARGEST = 16_384  # tokens of a stream by default: enough rows for any product
TRIAL = 4096  # tokens of the stream of the dry run
SHARE = 0.85  # of the memory that is planned with: the allocator loses some, and the dry run is of the CPU's operations


class Streams(NamedTuple):
    """The most tokens of a stream, whether the memory takes twice what such a stream allocates, and the most tokens that it takes."""

    tokens: int
    fit_twice: bool = False
    room: float = inf


def stream_tokens(
    config: TrainConfig, folder: ModelFolder, model: Decoder, longest: int, rows: int, sharing: int = 1
) -> Streams:
    """The streams of a rank whose steps have so many rows, the longest of so many tokens; sharing: ranks that have a base together."""
    device = model.head.device
    usual = max(config.micro_tokens or config.max_length, longest)
    if device.type != "cuda" and longest <= TRIAL:  # the dry run would import torch's compiler: a second
        return Streams(usual)
    quant = in_memory(quant_asked(config, device), folder.config)
    trial = prepare(empty_model(model.config, model.head.dtype, quant), config)
    trial.compute = model.compute
    if device.type != "cuda":
        memory = rank_memory(step_memory(trial, _trial_stream(trial)), trial, sharing, ahead=False)
        return Streams(usual, room=memory.most_tokens(TRIAL, 1e9 * memory_gb(device)))
    there = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return streams_on_card(config, trial, there, longest, rows, sharing)


def streams_on_card(
    config: TrainConfig, trial: Decoder, there: float, longest: int, rows: int, sharing: int = 1
) -> Streams:
    """The same on a GPU with so many bytes for the run; trial is its model on the meta device."""
    logits = CHUNK_ROWS_CUDA * trial.config.vocab * trial.compute_dtype.itemsize  # of a chunk; no more with more tokens
    memory = rank_memory(step_memory(trial, _trial_stream(trial)), trial, sharing, ahead=True)
    most, most_twice = (memory.most_tokens(TRIAL, SHARE * there - logits, copies) for copies in (1, 2))
    tokens = max(config.micro_tokens or min(most, LARGEST, rows * longest), longest)
    return Streams(tokens, tokens <= most_twice, memory.most_tokens(TRIAL, there - logits))


def check_longest(config: TrainConfig, rows: Examples, room: float, device: torch.device) -> None:
    """OutOfMemory if a row has more tokens than a stream may, unless --micro-tokens asks for streams as long as that."""
    if rows.longest <= max(room, config.micro_tokens or 0):
        return
    place = f"the {memory_gb(device):,.3g} GB of {device_name(device)}"
    raise OutOfMemory(
        *long_row(config, longest_row(rows), rows.longest, round_down(room), place, device.type == "cuda")
    )


def long_row(config: TrainConfig, row: str, tokens: int, room: int, place: str, gpu: bool) -> tuple[str, str]:
    """What is wrong with a row of so many tokens where streams of at most `room` fit, and what to do."""
    what = f"{row} has {tokens:,} tokens, and {place} take a stream of about {room:,}"
    if not room:
        return what, "The base and the adapters fill them: --quant nf4 or int8 makes the base smaller."
    ways = [f"--max-length {room} leaves longer rows out (with --truncate cut it shortens them)"]
    if not config.checkpointing:
        ways.insert(0, "--checkpointing makes room for more")
    elif gpu and config.offload == "off":
        ways.insert(0, "--offload on makes room for more")
    return what, "; ".join([*ways, f"--micro-tokens {tokens} tries it as it is."])


def longest_row(rows: Examples) -> str:
    """Where the longest row is."""
    return rows[int(rows.column("length").argmax())].where


def longest_document(rows: Examples) -> tuple[str, int]:
    """Where the longest document is, and its tokens; a pair is two."""
    second = rows.column("second")
    tokens = np.maximum(second, rows.column("length") - second)
    return rows[int(tokens.argmax())].where, int(tokens.max())


def round_down(tokens: float) -> int:
    """Three digits of a number of tokens that was estimated."""
    unit = 10 ** max(0, len(str(int(tokens))) - 3)
    return int(tokens) // unit * unit


def rank_memory(memory: StepMemory, model: Decoder, sharing: int, ahead: bool) -> StepMemory:
    """What is left of the memory of a step where so many ranks share the base out; ahead: on GPUs, where it is gathered ahead."""
    if sharing == 1:
        return memory
    shared = shard_bytes(model, sharing, ahead)
    return replace(memory, weights=shared.kept, buffers=shared.buffers)


def _trial_stream(model: Decoder) -> Batch:
    """One document. Few of its tokens are trained: the logits are counted beside it, and little else grows with those."""
    ids, prefix_lens = torch.zeros(TRIAL, dtype=torch.long), [1] if hasattr(model.config, "sop") else None
    return Batch(ids, Documents.of([TRIAL], prefix_lens), torch.arange(BLOCK_ROWS), ids[:BLOCK_ROWS], [])
