"""Tiles that the Triton GEMMs can have on a GPU, for a day with one to time: the first is the one that is taken.

    python -m bench.tiles [--cache DIR]

Compiles every candidate at the shapes of Qwen2.5-7B without a GPU, and prints what it needs. Those in the table spill no register and
fit the memory of a program; with `taking` the launches inside have one of them.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from triton import knobs

from bench.proof.compile import needs
from bench.proof.launches import recorded
from minilora.kernels import lora_gemm
from minilora.kernels.lora_linear import group_example, lora_linear_group


class Tile(NamedTuple):
    """Rows, columns and the depth of one pass; warps, and passes whose operands are on their way."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int


class Kernel(NamedTuple):
    """A GEMM: its name in a recording, its table and its launches, which are kept by shape."""

    name: str
    table: dict[int, dict[str, Any]]
    launch: Any


KERNELS = {
    "y": Kernel("lora_gemm._forward_kernel", lora_gemm.GEMM, lora_gemm._forward_launch),
    "dx": Kernel("lora_gemm._input_gradient_kernel", lora_gemm.INPUT_GRADIENT, lora_gemm._input_gradient_launch),
}
CANDIDATES: dict[tuple[str, int], tuple[Tile, ...]] = {
    ("y", 80): (
        Tile(128, 128, 32, 4, 4), Tile(128, 128, 32, 4, 3), Tile(128, 128, 32, 4, 5), Tile(128, 128, 64, 4, 3),
        Tile(128, 256, 32, 8, 3), Tile(128, 256, 32, 8, 4), Tile(128, 256, 64, 8, 3), Tile(256, 128, 32, 8, 3),
        Tile(256, 128, 64, 8, 3), Tile(128, 64, 32, 4, 4), Tile(64, 128, 32, 4, 4),
    ),
    ("dx", 80): (
        Tile(128, 128, 32, 4, 4), Tile(128, 128, 32, 4, 3), Tile(128, 128, 32, 4, 5),
        Tile(128, 256, 32, 8, 3), Tile(128, 256, 32, 8, 4), Tile(128, 256, 64, 8, 3), Tile(256, 128, 32, 8, 3),
        Tile(256, 128, 64, 8, 3), Tile(128, 64, 32, 4, 4), Tile(64, 128, 32, 4, 4),
    ),
    ("y", 90): (
        Tile(128, 256, 64, 8, 3), Tile(128, 256, 64, 8, 4), Tile(256, 128, 64, 8, 3), Tile(256, 128, 64, 8, 4),
        Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 4, 4), Tile(128, 256, 32, 8, 4), Tile(64, 256, 64, 4, 4),
    ),
    ("dx", 90): (
        Tile(128, 256, 64, 8, 3), Tile(128, 256, 64, 8, 4), Tile(256, 128, 64, 8, 3), Tile(256, 128, 64, 8, 4),
        Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 4, 4), Tile(128, 256, 32, 8, 4), Tile(64, 256, 64, 4, 4),
    ),
}  # fmt: skip


@contextmanager
def taking(what: str, arch: int, tile: Tile) -> Iterator[None]:
    """The launches of y or dx inside have a tile; R, the part of a rank in one dot, stays."""
    kernel = KERNELS[what]
    kernel.launch.cache_clear()
    try:
        with patch.dict(kernel.table, {arch: kernel.table[arch] | tile._asdict()}):
            yield
    finally:
        kernel.launch.cache_clear()


def called() -> None:
    """The q, k and v of Qwen2.5-7B, forward and backward, at rank 16 on tensors without data."""
    (x, projections), _ = group_example(4099, 3584, (3584, 512, 512), 16, torch.bfloat16, "meta")
    ys = lora_linear_group(x.requires_grad_(), projections)
    torch.autograd.backward(ys, [torch.empty_like(y) for y in ys])


def needed(what: str, arch: int, tile: Tile) -> dict[str, Any]:
    """What the kernel needs of a card with this tile."""
    with taking(what, arch, tile), recorded(arch) as launches:
        called()
    (launch,) = (launch for launch in launches if launch.name == KERNELS[what].name)
    return needs(launch, arch)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tiles", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/minilora/compile").expanduser(), metavar="DIR")
    knobs.cache.dir = str(parser.parse_args(argv).cache)
    for (what, arch), tiles in CANDIDATES.items():
        for tile in tiles:
            found = needed(what, arch, tile)
            pipes = ", ".join(f"{pipe} {n}" for pipe, n in found["cycles"].items() if n)
            sizes = f"{found['registers']} registers, {found['spills']} B spilled, {found['shared']} B shared"
            print(f"{what} sm_{arch} {tuple(tile)}: {sizes}, {found['blocks']} blocks (cycles: {pipes})", flush=True)


if __name__ == "__main__":
    sys.exit(main())
