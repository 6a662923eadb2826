"""Tiles that the Triton GEMMs can have on a GPU, for a day with one to time: the first is the one that is taken.

    python -m bench.tiles [--cache DIR]                           compile every candidate, without a GPU, and print what it needs
    python -m bench.tiles --time [--tokens 8192] [--save FILE]    time those of this GPU at the products of Qwen2.5-7B

Those in the table spill no register and fit the memory of a program; with `taking` the launches inside have one of them.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from triton import knobs

from bench.figures import Figures
from bench.proof.compile import needs
from bench.proof.launches import Launch, recorded
from bench.roof import machine
from bench.shapes import MODELS, Shape
from bench.timing import in_turn
from bench.workers import Row, in_workers, lost, work
from minilora.kernels import lora_gemm
from minilora.kernels.dispatch import architecture
from minilora.kernels.group import Group, padded_rank
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


def products(
    what: str, tokens: int, device: torch.device, shape: Shape = MODELS["qwen2.5-7b"]
) -> dict[str, Callable[[], Any]]:
    """The launches of y or dX alone for the groups of a layer, at rank 16."""
    groups = {"q, k, v": (shape.width, (shape.query, shape.kv, shape.kv)), "gate, up": (shape.width, (shape.ffn,) * 2),
              "down": (shape.ffn, (shape.width,)), "o": (shape.query, (shape.width,))}  # fmt: skip
    calls = {}
    for name, (k, ns) in groups.items():
        (x, projections), _ = group_example(tokens, k, ns, 16, torch.bfloat16, str(device))
        group = Group.of(projections)
        s = torch.randn(len(group.a), tokens, padded_rank(group.ranks), dtype=x.dtype, device=device)
        dys = [torch.randn(tokens, n, dtype=x.dtype, device=device) for n in ns]
        forward = partial(lora_gemm.forward, x, s, group)
        calls[name] = forward if what == "y" else partial(lora_gemm.input_gradient, dys, s, group)
    return calls


def launches(arch: int) -> list[Launch]:
    """What timing the candidates of an architecture launches, recorded."""
    found: list[Launch] = []
    for (what, card), candidates in CANDIDATES.items():
        for tile in candidates if card == arch else ():
            with taking(what, arch, tile), recorded(arch) as made:
                for call in products(what, 8192, torch.device("meta")).values():
                    call()
            found += made
    return found


def label(what: str, arch: int, tile: Tile) -> str:
    return f"{what} sm_{arch} {'x'.join(map(str, tile[:3]))}, {tile.num_warps} warps, {tile.num_stages} stages"


HEAD = (
    "| tile | "
    + " | ".join(f"{name}, ms" for name in ("q, k, v", "gate, up", "down", "o"))
    + " |\n|---|---|---|---|---|"
)


def line_of(row: Row) -> str:
    times = row.get("seconds")
    return (
        f"| {row['name']} | " + (" | ".join(f"{t[0] * 1e3:.3f}" for t in times.values()) if times else lost(row)) + " |"
    )


def time_all(
    tokens: int, seconds: float, save: str | None, words: list[str], names: list[str], lines: Path | None
) -> None:
    """Time the candidates of this GPU, each a case of its own."""
    device, arch = torch.device("cuda"), architecture(torch.device("cuda"))
    cases = {
        label(what, arch, tile): (what, tile)
        for (what, card), tiles in CANDIDATES.items()
        if card == arch
        for tile in tiles
    }

    def case(name: str) -> Row:
        what, tile = cases[name]
        with taking(what, arch, tile):
            return {"seconds": in_turn(products(what, tokens, device), device, 10)}

    if lines:
        return work(names, case, lines)
    figures = Figures(machine(device) | {"tokens": tokens}, [HEAD], line_of, save)
    in_workers([sys.executable, "-m", "bench.tiles", *words], list(cases), 1, seconds, figures.add)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tiles", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/minilora/compile").expanduser(), metavar="DIR")
    parser.add_argument("--time", action="store_true", help="time the tiles on this GPU instead")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=1e9, help="what is not done by then is skipped")
    parser.add_argument("--save", metavar="FILE", help="write the times as JSON, and the table beside it as .md")
    parser.add_argument("--names", nargs="+", default=[], help=argparse.SUPPRESS)  # of a worker
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.time:
        words = ["--time", f"--tokens={args.tokens}"]
        return time_all(args.tokens, args.seconds, args.save, words, args.names, args.lines)
    knobs.cache.dir = str(args.cache)
    for (what, arch), tiles in CANDIDATES.items():
        for tile in tiles:
            found = needed(what, arch, tile)
            pipes = ", ".join(f"{pipe} {n}" for pipe, n in found["cycles"].items() if n)
            sizes = f"{found['registers']} registers, {found['spills']} B spilled, {found['shared']} B shared"
            print(f"{what} sm_{arch} {tuple(tile)}: {sizes}, {found['blocks']} blocks (cycles: {pipes})", flush=True)


if __name__ == "__main__":
    sys.exit(main())
