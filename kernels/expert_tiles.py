"""Finds on the GPU which of the sorted slots each program of the expert kernels has, so that the host never waits for the counts.

A tile is at most ROWS slots of one expert. The host launches as many programs as any routing could need; those whose tile
has no rows return at once, and an expert without tokens has no tile. A buffer is indexed by one of three numbers of a slot, the
j-th choice of token t:

    place   its position among the sorted slots, in [T k, ...] buffers: those of an expert are one range
    slot    t k + j, in [T k, ...] buffers where the k rows of a token are neighbours
    token   t, in x and dY
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from minilora.kernels.dequantize import FEW
from minilora.kernels.dropout import seed_of
from minilora.kernels.group import Place
from minilora.kernels.lang import PINNED, cdiv, jit, next_power_of_2, tl
from minilora.kernels.launch import Launch, per_shape
from minilora.kernels.lora_gemm import GEMM
from minilora.kernels.projection import Projection
from minilora.kernels.quantized import format_of, kernel_parts

if TYPE_CHECKING:
    from minilora.kernels.lora_experts import Routing

BLOCK = 16  # tiles that a program of _tiles_kernel finds


@jit(do_not_specialize=["count"])
def _tiles_kernel(
    counts_ptr, tiles_ptr, starts_ptr, count, E, EXPERTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """A program: BLOCK rows of tiles [count, 3], each an expert, its first place and the place after its last. The first program
    also writes starts [E + 1], the first place of each expert."""
    o_e = tl.arange(0, EXPERTS)[None, :]
    b_counts = tl.load(counts_ptr + o_e, mask=o_e < E, other=0).to(tl.int32)
    b_tiles = tl.cdiv(b_counts, ROWS)
    b_ends, b_tiles_ends = tl.cumsum(b_counts, 1), tl.cumsum(b_tiles, 1)
    # the experts all of whose tiles come before tile i; where these are all, no expert is `here`         [BLOCK, EXPERTS]
    o_i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_expert = tl.sum((b_tiles_ends <= o_i[:, None]).to(tl.int32), 1)
    m_here = o_e == b_expert[:, None]
    b_first = b_ends - b_counts + (o_i[:, None] - b_tiles_ends + b_tiles) * ROWS
    b_last = tl.sum(tl.where(m_here, tl.minimum(b_first + ROWS, b_ends), 0), 1)
    p_tiles = tiles_ptr + 3 * o_i
    tl.store(p_tiles, b_expert, mask=o_i < count)
    tl.store(p_tiles + 1, tl.sum(tl.where(m_here, b_first, 0), 1), mask=o_i < count)
    tl.store(p_tiles + 2, b_last, mask=o_i < count)
    if tl.program_id(0) == 0:
        tl.store(starts_ptr + o_e, b_ends - b_counts, mask=o_e <= E)


@jit
def tile_at(tiles_ptr, i_t):
    """(expert, first place, place after the last) of a tile; one without rows has 0 and 0."""
    p_tile = tiles_ptr + 3 * i_t
    return tl.load(p_tile).to(tl.int64), tl.load(p_tile + 1), tl.load(p_tile + 2)


@jit
def buffer_rows(slots_ptr, o_i, chosen, BY: tl.constexpr):
    """The rows, int64, of the slots at places o_i in a buffer that is indexed by place, slot or token."""
    if BY == "place":
        return o_i.to(tl.int64)
    elif BY == "slot":
        return tl.load(slots_ptr + o_i)
    else:
        return tl.load(slots_ptr + o_i) // chosen


@per_shape
def _tiles_launch(device: torch.device, slots: int, experts: int, rows: int) -> tuple[Launch, int]:
    """The launch, and the most tiles that a routing can have: one per expert with tokens, and one per further `rows` slots."""
    most = min(experts, slots)
    count = most + (slots - most) // rows
    # one more than the experts has a start
    options = {"EXPERTS": next_power_of_2(experts + 1), "ROWS": rows, "BLOCK": BLOCK, "num_warps": 4, **PINNED}
    return Launch(device, cdiv(count, BLOCK), (count, experts), **options), count


class Tiles(NamedTuple):
    """The slots of a routing, as kernels take them."""

    slots: Tensor  # int64 [T k], sorted by expert
    chosen: int  # k
    few: bool  # few rows in a tile, as in decoding
    rows: int  # of a tile, at most
    table: Tensor  # int32 [tiles, 3]
    starts: Tensor  # int32 [E + 1]

    @staticmethod
    def of(routing: "Routing", place: Place, few: bool) -> "Tiles":
        counts, rows = routing.counts, (FEW if few else GEMM)[place.arch]["BM"]
        launch, count = _tiles_launch(place.device, len(routing.slots), len(counts), rows)
        table = counts.new_empty(count, 3, dtype=torch.int32)
        starts = counts.new_empty(len(counts) + 1, dtype=torch.int32)
        launch(_tiles_kernel, counts, table, starts)
        return Tiles(routing.slots, routing.index.shape[1], few, rows, table, starts)


class Rows(NamedTuple):
    """By which of the three numbers each buffer of a linear is indexed."""

    x: str
    mask: str  # of dropout
    y: str
    dy: str
    dx: str


GATE_UP = Rows(x="token", mask="token", y="place", dy="place", dx="slot")
DOWN = Rows(x="place", mask="slot", y="slot", dy="token", dx="place")


class Sizes(NamedTuple):
    """What kernels need to know of a linear of all experts, besides its tensors."""

    rows: Rows
    format: str
    experts: int
    n: int
    k: int
    w_stride: int
    rank: int  # 0 without an adapter
    factor: float
    p: float
    a_step: int  # values from one expert's A to the next; 0 if all share it
    b_step: int


class Stack(NamedTuple):
    """A linear of all experts, as kernels take it."""

    sizes: Sizes
    weight: Tensor  # [E N, K], or its codes
    scales: tuple[Tensor, ...] | None
    a: Tensor | None  # [E or 1, R, K]
    b: Tensor | None  # [E or 1, N, R]
    seed: Tensor | None  # the key of the mask

    @staticmethod
    def of(p: Projection, experts: int, rows: Rows) -> "Stack":
        weight, *scales = kernel_parts(p.weight)
        whole, adapter = (weight, tuple(scales) or None), p.adapter
        frozen = rows, format_of(p.weight), experts, p.weight.shape[0] // experts, p.weight.shape[1], weight.stride(0)
        if adapter is None:
            return Stack(Sizes(*frozen, 0, 0.0, 0.0, 0, 0), *whole, None, None, None)
        a, b = adapter.a.contiguous(), adapter.b.contiguous()
        a_step, b_step = (0 if len(t) == 1 else t.shape[1] * t.shape[2] for t in (a, b))
        sizes = Sizes(*frozen, a.shape[1], adapter.factor, adapter.p, a_step, b_step)
        return Stack(sizes, *whole, a, b, seed_of(adapter.key, weight.device) if adapter.p else None)
