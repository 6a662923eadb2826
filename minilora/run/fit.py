"""How long the streams of a run are. On a GPU as long as its memory allows, up to where longer ones gain nothing."""

from typing import NamedTuple

import torch

from minilora.kernels.cross_entropy import BLOCK_ROWS
from minilora.kernels.linear_cross_entropy import CHUNK_ROWS_CUDA
from minilora.models.decoder import Decoder
from minilora.models.stream import Batch, Documents

from ..checkpoint.load import empty_model
from ..checkpoint.quantized import in_memory
from ..config import TrainConfig
from ..files.model_folder import ModelFolder
from ..machine.dry_run import step_memory
from .setup import prepare, quant_asked

LARGEST = 16_384  # tokens of a stream by default: enough rows for any product
TRIAL = 4096  # tokens of the stream of the dry run
SHARE = 0.85  # of the memory that is planned with: the allocator loses some, and the dry run is of the CPU's operations


class Streams(NamedTuple):
    """The most tokens of a stream, and whether the memory takes twice what such a stream allocates."""

    tokens: int
    fit_twice: bool = False


def stream_tokens(
    config: TrainConfig, folder: ModelFolder, model: Decoder, longest: int, rows: int, spared: int = 0
) -> Streams:
    """The streams of a run whose steps have so many rows, the longest of so many tokens; spared: bytes that other ranks hold of the base."""
    device = model.head.device
    if device.type != "cuda":
        return Streams(max(config.micro_tokens or config.max_length, longest))
    quant = in_memory(quant_asked(config, device), folder.config)
    trial = prepare(empty_model(model.config, model.head.dtype, quant), config)
    trial.compute = model.compute
    there = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) + spared
    return streams_on_card(config, trial, there, longest, rows)


def streams_on_card(config: TrainConfig, trial: Decoder, there: float, longest: int, rows: int) -> Streams:
    """The same on a GPU with so many bytes for the run; trial is its model on the meta device."""
    logits = CHUNK_ROWS_CUDA * trial.config.vocab * trial.compute_dtype.itemsize  # of a chunk; no more with more tokens
    memory = step_memory(trial, _trial_stream(trial))
    most, most_twice = (memory.most_tokens(TRIAL, SHARE * there - logits, copies) for copies in (1, 2))
    tokens = max(config.micro_tokens or min(most, LARGEST, rows * longest), longest)
    return Streams(tokens, tokens <= most_twice)


def _trial_stream(model: Decoder) -> Batch:
    """One document. Few of its tokens are trained: the logits are counted beside it, and little else grows with those."""
    ids, prefix_lens = torch.zeros(TRIAL, dtype=torch.long), [1] if hasattr(model.config, "sop") else None
    return Batch(ids, Documents.of([TRIAL], prefix_lens), torch.arange(BLOCK_ROWS), ids[:BLOCK_ROWS], [])
