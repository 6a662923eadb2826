"""Projections of one input as launches take them, and what the numbers of a launch depend on."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minilora.kernels.dispatch import architecture, gemm_choice, gemm_form, target
from minilora.kernels.dropout import seed_of
from minilora.kernels.lang import INTERPRETED, PINNED, accum_dtype, cdiv
from minilora.kernels.launch import per_shape
from minilora.kernels.projection import Projection
from minilora.kernels.quantized import format_of, kernel_parts


def arch(device: torch.device) -> int:
    """0 for the interpreter, 80 or 90 for a GPU with as much shared memory as an A100 or H100, 86 for any other."""
    found = 0 if INTERPRETED else architecture(device)
    return 90 if found in (90, 100, 103) else found if found in (0, 80) else 86


class Place(NamedTuple):
    """Where a launch runs and what it computes in: what all of its numbers depend on."""

    device: torch.device
    dtype: torch.dtype
    arch: int

    @staticmethod
    def of(x: Tensor) -> "Place":
        return _place(x.device, x.dtype, target())


@per_shape
def _place(device: torch.device, dtype: torch.dtype, target: int | None) -> Place:
    return Place(device, dtype, arch(device))


def configuration(table: dict, place: Place) -> dict:
    """The launch options of a table."""
    return {**table[place.arch], "ACC": accum_dtype(place.dtype), **PINNED}


def launch_options(table: dict, place: Place, ranks: Sequence[int]) -> dict:
    """The same for a kernel that multiplies with adapters of these ranks."""
    options, width = configuration(table, place), padded_rank(ranks)
    return {**options, "COUNT": len(ranks), "PADDED_R": width, "R": min(options["R"], width)}


def padded_rank(ranks: Sequence[int]) -> int:
    """Columns of S that every adapter of a group gets: 16, 32 or a multiple of 64."""
    rank = max(ranks)
    return 16 if rank <= 16 else 32 if rank <= 32 else cdiv(rank, 64) * 64


class Sizes(NamedTuple):
    """What a kernel is told of a projection beside its memory; one without bias or adapter has none of its columns or ranks."""

    n: int
    w_stride: int
    bias_n: int
    rank: int
    scale: float


class Forms(NamedTuple):
    """The forms of y and of dX of a group: triton, library or augmented (wide_products.py)."""

    y: str
    dx: str

    @staticmethod
    def of(projections: Sequence[Projection]) -> "Forms":
        chosen = gemm_choice()
        if isinstance(chosen, str):
            return ALIKE[chosen]
        shapes = shapes_of(projections)
        return Forms(gemm_form("y", *shapes), gemm_form("dx", *shapes))


ALIKE = {form: Forms(form, form) for form in ("triton", "library", "augmented")}


def shapes_of(projections: Sequence[Projection]) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """K, the N_j and the R_j (0 without an adapter) of a group: the class that a form is chosen for."""
    ranks = tuple([p.adapter.a.shape[0] if p.adapter else 0 for p in projections])
    return projections[0].weight.shape[1], tuple([p.weight.shape[0] for p in projections]), ranks


class Group(NamedTuple):
    """Projections of one input as launches take them: what is alike of all, together."""

    format: str  # of the weights: "wide", or the name of a quantised one
    weights: tuple[Tensor, ...]  # or their codes
    scales: tuple[Tensor, ...] | None  # of quantised ones: the first part of all, the second of all, ...
    biases: tuple[Tensor, ...]  # memory that is not read for a projection without one; so `wide_bs`
    wide_bs: tuple[Tensor, ...]
    sizes: tuple[Sizes, ...]
    a: tuple[Tensor, ...]  # of the adapters alone, from here on
    b: tuple[Tensor, ...]
    ranks: tuple[int, ...]
    rates: tuple[float, ...]
    factors: tuple[float, ...]
    seeds: tuple[Tensor, ...]  # the keys of the masks; memory that is not read for an adapter without one
    projections: tuple[Projection, ...]  # as they came
    forms: Forms

    @staticmethod
    def of(projections: Sequence[Projection]) -> "Group":
        weights, parts, biases, sizes, a, b, ranks, rates, factors, seeds = [], [], [], [], [], [], [], [], [], []
        for weight, bias, adapter in projections:
            w, *of_scales = kernel_parts(weight)
            n, rank, factor = w.shape[0], 0, 0.0
            if adapter is not None:
                rank, factor = adapter.a.shape[0], adapter.factor
                a.append(adapter.a.contiguous())
                b.append(adapter.b.contiguous())
                ranks.append(rank)
                rates.append(adapter.p)
                factors.append(factor)
                seeds.append(seed_of(adapter.key, w.device) if adapter.p else None)
            weights.append(w)
            parts.append(of_scales)
            biases.append(None if bias is None else bias.contiguous())
            sizes.append(Sizes(n, w.stride(0), 0 if bias is None else n, rank, factor))
        dropped = [seed for seed in seeds if seed is not None]
        seeds = [dropped[0] if seed is None else seed for seed in seeds] if dropped else a
        scales = tuple([part for of_all in zip(*parts, strict=True) for part in of_all]) or None
        rest, unread = iter(b), next((bias for bias in biases if bias is not None), weights[0])
        biases = [unread if bias is None else bias for bias in biases]
        wide_bs = b if len(b) == len(sizes) else [next(rest) if size.rank else [*b, weights[0]][0] for size in sizes]
        fields: Any = map(tuple, (biases, wide_bs, sizes, a, b, ranks, rates, factors, seeds, projections))
        return Group(format_of(projections[0].weight), tuple(weights), scales, *fields, forms=Forms.of(projections))


def s_index(sizes: Sequence[Sizes]) -> tuple[int, ...]:
    """Which S belongs to each projection."""
    return tuple([sum(before.rank > 0 for before in sizes[:j]) for j in range(len(sizes))])
