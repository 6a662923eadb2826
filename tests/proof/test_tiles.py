"""The candidate tiles of a GPU day: the first is the one that is taken, each can be taken, and each compiles without a spill."""

from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch
from triton import knobs

from bench.proof.launches import recorded
from bench.shapes import TOY
from bench.tiles import CANDIDATES, KERNELS, Tile, called, needed, products, taking

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one program may have
each = pytest.mark.parametrize("what, arch", CANDIDATES, ids=str)


@each
def test_the_first_is_the_one_that_is_taken(what: str, arch: int):
    taken = KERNELS[what].table[arch]
    assert CANDIDATES[what, arch][0] == Tile(**{name: taken[name] for name in Tile._fields})
    assert len(set(CANDIDATES[what, arch])) == len(CANDIDATES[what, arch]) >= 8


@each
def test_a_launch_has_the_tile_and_the_next_one_the_old(what: str, arch: int):
    def tile() -> Tile:
        with recorded(arch) as launches:
            called()
        (launch,) = (launch for launch in launches if launch.name == KERNELS[what].name)
        return Tile(**{name: launch.options[name] for name in Tile._fields})

    first, *others = CANDIDATES[what, arch]
    assert tile() == first
    for other in others:
        with taking(what, arch, other):
            assert tile() == other
    assert tile() == first


@pytest.mark.long
@each
def test_each_compiles_without_a_spill_and_fits(what: str, arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    for tile in CANDIDATES[what, arch]:
        found = needed(what, arch, tile)
        assert found["spills"] == 0 and found["shared"] <= SHARED[arch] and found["blocks"] >= 1, tile


@pytest.mark.parametrize("what", ["y", "dx"])
def test_a_timed_product_is_one_launch_with_the_tile(what: str):
    tile = CANDIDATES[what, 80][4]
    for call in products(what, 48, torch.device("meta"), TOY).values():
        with taking(what, 80, tile), recorded(80) as made:
            call()
        (launch,) = made
        assert launch.name == KERNELS[what].name and launch.options["BN"] == tile.BN
