"""Adapters on experts in files, in two layouts.

PEFT's `target_parameters` stacks the experts of a layer. Where both linears of the experts are adapted, PEFT wraps the
first one, so that its key says base_layer; alone, either has the other's key, and the config tells which it is:

    ...mlp.experts.base_layer.lora_A.weight   gate_up   A [E R, D], expert by expert
    ...mlp.experts.base_layer.lora_B.weight             B [2 F, R E], rank by rank: the expert runs fastest
    ...mlp.experts.lora_A.weight, lora_B      down      A [E R, F], B [D, R E]

The keys of the single experts (transformers 4, vLLM) have A [R, K] and B [N, R] of each matrix:

    ...mlp.experts.7.gate_proj.lora_A.weight, up_proj, down_proj

There gate and up have an A each; here they share one. Two different ones are read as one of twice the rank, whose B is
block-diagonal, with alpha so that the scale stays; written, the shared A stands with both. All of this is exact.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from minilora.models.moe import ExpertLinear

SINGLE = re.compile(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)")
STACKED = re.compile(r"(.+\.experts)(\.base_layer)?")


class Half(NamedTuple):
    """One factor of an adapter in a file: its shape in memory, how it is read, and its name if that is a single expert's."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    name: str = ""


def to_stacked(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """A [E R, K] and B [N, R E] of PEFT, from A [E or 1, R, K] and B [E or 1, N, R]."""
    a, b = a.expand(experts, -1, -1), b.expand(experts, -1, -1)
    return a.reshape(-1, a.shape[2]), b.permute(1, 2, 0).reshape(b.shape[1], -1)


def from_stacked(half: str, value: Tensor, experts: int) -> Tensor:
    """A [E, R, K] or B [E, N, R] from PEFT's."""
    if half == "A":
        return value.view(experts, -1, value.shape[1])
    return value.view(len(value), -1, experts).permute(2, 0, 1).contiguous()


def files_of(path: str, linear: ExpertLinear, a: Tensor, b: Tensor, single: bool, both: bool) -> dict[str, Tensor]:
    """Keys, without PEFT's prefix, and tensors of the adapter at a path; both: the layer's other linear has one too."""
    layer = path.rpartition(".")[0]
    if not single:
        own = ".base_layer" if both and len(linear.parts) == 2 else ""
        a, b = to_stacked(a, b, linear.experts)
        return {f"{layer}{own}.lora_A.weight": a, f"{layer}{own}.lora_B.weight": b}
    found, height = {}, linear.out_features // len(linear.parts)
    for e in range(linear.experts):
        for i, part in enumerate(linear.parts):
            rows = slice(i * height, (i + 1) * height)
            found[f"{layer}.{e}.{part}.lora_A.weight"] = a[e if len(a) > 1 else 0].clone()
            found[f"{layer}.{e}.{part}.lora_B.weight"] = b[e if len(b) > 1 else 0, rows].clone()
    return found


Halves = dict[str, dict[str, Half]]  # by the path of a linear, then A and B


def gathered(found: Halves, linears: Mapping[str, ExpertLinear], named: list[str], shared: bool) -> Halves:
    """The factors of a file with those of experts under the paths of their linears in memory.

    named are the config's target_parameters; shared: the file was written in the shared-outer form. What does not fit
    stays under the name that it has in the file.
    """
    rest, singles = dict(found), _singles(found, linears)
    for path, linear in linears.items():
        layer, gates = path.rpartition(".")[0], len(linear.parts) == 2
        inner, outer = found.get(f"{layer}.base_layer"), found.get(layer)
        if path in singles:
            halves = _of_singles(singles[path], linear)
            for name in (name for parts in singles[path].values() for name in parts if halves):
                rest.pop(name)
        elif inner is not None:
            halves = _of_stack(rest.pop(f"{layer}.base_layer") if gates else rest.pop(layer, {}), linear)
        elif outer is not None and _alone(path, linear, outer, named):
            halves = _of_stack(rest.pop(layer), linear)
        else:
            continue
        if halves:
            rest[path] = {half: _shared(h, half, linear) for half, h in halves.items()} if shared else halves
    return rest


def _alone(path: str, linear: ExpertLinear, halves: dict[str, Half], named: list[str]) -> bool:
    """Whether the only stacked adapter of a layer is that of this linear."""
    layer, _, own = path.rpartition(".")
    meant = {leaf for leaf in ("gate_up_proj", "down_proj") if any(f".{layer}.{leaf}".endswith(f".{n}") for n in named)}
    fits = "B" in halves and halves["B"].shape[0] == linear.out_features
    return meant == {own} if len(meant) == 1 else fits


def _of_stack(halves: dict[str, Half], linear: ExpertLinear) -> dict[str, Half]:
    made = {}
    for half, (shape, read, _) in halves.items():
        axis = 0 if half == "A" else 1
        if len(shape) != 2 or shape[axis] % linear.experts:
            return {}
        r = shape[axis] // linear.experts
        stacked = (linear.experts, r, shape[1]) if half == "A" else (linear.experts, shape[0], r)
        made[half] = Half(stacked, lambda half=half, read=read: from_stacked(half, read(), linear.experts))
    return made


def _shared(half: Half, name: str, linear: ExpertLinear) -> Half:
    of_a, of_b = linear.stacks(True)
    (count,), (_, *shape) = of_a if name == "A" else of_b, half.shape
    return half._replace(shape=(count, *shape), read=lambda: half.read()[:count])


def _singles(found: Halves, linears: Mapping[str, ExpertLinear]) -> dict[str, dict[int, dict[str, dict[str, Half]]]]:
    """By path and expert, the factors of its matrices under the names that they have in the file."""
    of_part = {(p.rpartition(".")[0], part): p for p, linear in linears.items() for part in linear.parts}
    made: dict[str, dict[int, dict[str, dict[str, Half]]]] = {}
    for name, halves in found.items():
        match = SINGLE.fullmatch(name)
        path = of_part.get((match[1], match[3])) if match else None
        if match and path:
            made.setdefault(path, {}).setdefault(int(match[2]), {})[name] = halves
    return made


def _of_singles(experts: dict[int, dict[str, dict[str, Half]]], linear: ExpertLinear) -> dict[str, Half]:
    """One stack of all experts; nothing where one is missing or they differ in shape."""
    parts, count = [], len(linear.parts)
    for e in range(linear.experts):
        halves = sorted(experts.get(e, {}).items())  # gate before up
        if len(halves) != count or not all({"A", "B"} == h.keys() for _, h in halves):
            return {}
        parts.append([h for _, h in halves])
    shapes, name = {(h["A"].shape, h["B"].shape) for of_expert in parts for h in of_expert}, min(experts[0])
    if len(shapes) != 1:
        return {}
    ((r, k), (n, _)), *_ = shapes
    same = count == 1 or all(torch.equal(gate["A"].read(), up["A"].read()) for gate, up in parts)
    rank = r if same else count * r

    def a() -> Tensor:
        return torch.stack([torch.cat([h["A"].read() for h in (e[:1] if same else e)]) for e in parts])

    def b() -> Tensor:
        join = torch.cat if same else lambda of_parts: torch.block_diag(*of_parts)
        return torch.stack([join([h["B"].read() for h in e]) for e in parts])

    return {"A": Half((linear.experts, rank, k), a, name), "B": Half((linear.experts, count * n, rank), b, name)}
