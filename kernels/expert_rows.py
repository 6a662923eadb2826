"""The slots of a routing as rows of buffers in which every expert has whole blocks, so that one product serves many experts.

Experts lie one after the other in the order of their numbers, each in some blocks of `block` rows; the rows behind an expert's
own slots repeat its last one. So a block belongs to one expert, and [rows, N] is a batch [blocks, block, N] for what is too
small to be computed expert by expert. Rows that repeat are finite where what they repeat is, no token reads them, and in sums
over rows their weight is zero.

oneDNN prepares each size of a product in bf16 once, in half a millisecond and half a megabyte that it keeps. Experts have as many
tokens as it happens; their blocks are of few numbers, and batches are of one size, filled up by blocks of no expert.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minilora.kernels.dispatch import to_device

LARGEST = 64  # rows of a block
BATCH = 1024  # rows of a batch of blocks
AT_ONCE = 1 << 20  # values of x that go through the experts together: what a CPU's cache holds


class Part(NamedTuple):
    """Neighbouring experts that have tokens: the rows of all, their numbers, how many rows each has, and behind them no expert."""

    rows: slice
    numbers: list[int]
    sizes: list[int]
    batch: int  # blocks
    experts: Tensor  # the numbers once more
    of_block: Tensor  # which of these experts each block belongs to, counted from the first


class ExpertRows(NamedTuple):
    """slots [rows]: the slot of each row; tokens [rows]: its token; real [rows]: whether it is no repetition; at [T, k]: the row of each slot."""

    experts: int
    block: int
    slots: Tensor
    tokens: Tensor
    real: Tensor
    at: Tensor
    parts: list[Part]

    @staticmethod
    def of(index: Tensor, slots: Tensor, counts: Sequence[int], width: int) -> "ExpertRows":
        """For index [T, k], the slots sorted by expert, how many each expert has, and the width of x."""
        device = index.device
        block = block_of(len(slots) / max(1, sum(count > 0 for count in counts)))
        blocks = {e: few_sizes(-(-count // block)) for e, count in enumerate(counts) if count}
        parts, rows = [], []
        for numbers in _groups(blocks, max(1, AT_ONCE // (block * width))):
            own = [blocks[e] for e in numbers]
            batch = min(BATCH // block, 1 << (sum(own) - 1).bit_length())
            more = -sum(own) % batch
            with_more = [*own[:-1], own[-1] + more]
            of_block = torch.arange(len(own)).repeat_interleave(torch.tensor(with_more))
            experts, of_block = to_device(torch.tensor(numbers), device), to_device(of_block, device)
            here = slice(sum(rows), sum(rows) + len(of_block) * block)
            parts.append(Part(here, numbers, [n * block for n in own], batch, experts, of_block))
            rows += [n * block for n in with_more]
        count, span = (torch.tensor(n, dtype=torch.int64) for n in ([counts[e] for e in blocks], rows))
        expert = torch.arange(len(span)).repeat_interleave(span)
        within = torch.arange(len(expert)) - (span.cumsum(0) - span)[expert]
        source = (count.cumsum(0) - count)[expert] + within.minimum(count[expert] - 1)
        real = within < count[expert]
        at = torch.empty_like(slots).index_copy_(0, slots, to_device(real.nonzero()[:, 0], device)).view(index.shape)
        of_row = slots[to_device(source, device)]
        return ExpertRows(len(counts), block, of_row, of_row // index.shape[1], to_device(real, device), at, parts)


def block_of(mean: float) -> int:
    """Rows of a block where experts have so many rows in the mean: a power of two, no larger than that."""
    return min(LARGEST, 1 << max(0, int(mean).bit_length() - 1))


def few_sizes(n: int) -> int:
    """n rounded up to a number of three significant bits."""
    step = 1 << max(0, n.bit_length() - 3)
    return -(-n // step) * step


def _groups(blocks: dict[int, int], most: int) -> list[list[int]]:
    """Experts with so many blocks each, in groups that have no more than `most` together, if they are several."""
    groups, taken = [], most
    for e, count in blocks.items():
        if taken + count > most:
            groups.append([])
            taken = 0
        groups[-1].append(e)
        taken += count
    return groups
