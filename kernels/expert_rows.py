"""The slots of a routing as buffer rows, padded so that every expert has whole blocks and one batched product serves many experts.

Experts follow one another in the order of their numbers, each in blocks of `block` rows; padding rows repeat the last slot of
their expert. So a block belongs to one expert, and [rows, N] is a batch [blocks, block, N] for products that are too small to be
computed expert by expert. Padding rows are finite if the slot that they repeat is, no token reads them, and their weight in sums
over rows is zero.

oneDNN prepares a bf16 product once for each size, in half a millisecond, and keeps half a megabyte for it. The token count of an
expert can be any number, so block counts are rounded to few sizes, and all batches have one size, padded by blocks of no expert.
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
    """Neighbouring experts that have tokens: the rows of all, with padding blocks at the end, their numbers, and how many rows each has."""

    rows: slice
    numbers: list[int]
    sizes: list[int]
    batch: int  # blocks
    experts: Tensor  # the numbers once more
    of_block: Tensor  # which of these experts each block belongs to, counted from the first


class ExpertRows(NamedTuple):
    """slots [rows]: the slot of each row; tokens [rows]: its token; real [rows]: whether it is not padding; at [T, k]: the row of each slot."""

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
    """Rows of a block for experts of so many rows on average: the largest power of two up to that, at most LARGEST."""
    return min(LARGEST, 1 << max(0, int(mean).bit_length() - 1))


def few_sizes(n: int) -> int:
    """n rounded up to a number of three significant bits."""
    step = 1 << max(0, n.bit_length() - 3)
    return -(-n // step) * step


def _groups(blocks: dict[int, int], most: int) -> list[list[int]]:
    """Experts in groups of at most `most` blocks together; a larger expert is a group by itself."""
    groups, taken = [], most
    for e, count in blocks.items():
        if taken + count > most:
            groups.append([])
            taken = 0
        groups[-1].append(e)
        taken += count
    return groups
