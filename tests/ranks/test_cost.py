"""The formulas of the cost model beside the engine's own counts on models that are not loaded; the wire is in test_ranks.py."""

import json
from pathlib import Path

import pytest
import torch
from published import PUBLISHED

from minilora.checkpoint.load import empty_model, read_config
from minilora.files.model_folder import ModelFolder
from minilora.lora import add_lora, base_parameters, trained_parameters
from minilora.machine.flops import PEAKS, flops_per_token, step_flops
from minilora.models.decoder import Decoder
from minilora.models.stream import Batch, Documents
from minilora.ranks.cost import LINKS, Step, all_gather_bytes, all_reduce_bytes
from minilora.ranks.scale import NF4_BITS, SHAPES, Shape


def adapted(folder: Path, name: str, quant: str = "keep") -> Decoder:
    (folder / "config.json").write_text(json.dumps(PUBLISHED[name][1]))
    model = empty_model(read_config(ModelFolder(folder)), torch.bfloat16, quant)
    add_lora(model, r=8)
    return model


@pytest.mark.parametrize("name", ["Qwen2.5-7B", "Qwen3-32B"])
def test_formulas_are_the_engines_counts(name: str, tmp_path: Path):
    """Norms and biases, which the formulas leave out, are less than a thousandth."""
    shape, model = SHAPES[name], adapted(tmp_path, name)
    assert shape.parameters == pytest.approx(PUBLISHED[name][0], rel=1e-3)
    assert shape.trained(8) == sum(p.numel() for p in trained_parameters(model).values())
    ids = torch.zeros(3000, dtype=torch.long)
    batch = Batch(ids, Documents.of([3000]), torch.arange(3000), ids, [])
    assert shape.flops(3000, 8) == pytest.approx(step_flops(model.config, [batch], flops_per_token(model, False)))
    assert shape.base_bytes() == pytest.approx(sum(w.nbytes for w in base_parameters(model).values()), rel=1e-3)
    narrow = adapted(tmp_path, name, "nf4")
    assert shape.base_bytes(NF4_BITS) == pytest.approx(
        sum(w.nbytes for w in base_parameters(narrow).values()), rel=1e-3
    )


def test_a_mixture_is_as_large_as_published():
    """235B parameters, of which a token uses 22B, the embedding and the head among them (Qwen3's technical report)."""
    shape = SHAPES["Qwen3-235B-A22B"]
    embeddings = 2 * shape.vocab * shape.width
    assert shape.parameters == pytest.approx(235e9, rel=2e-3)
    assert shape.used + embeddings == pytest.approx(22e9, rel=1e-2)
    # with as many experts as a token uses it is a dense model
    few = Shape(2, 64, 4, 2, 16, 96, 500, experts=2, active=2)
    dense = Shape(2, 64, 4, 2, 16, 2 * 96, 500)
    assert few.used - dense.used == 2 * 64 * 2 and few.used == few.parameters - 2 * 500 * 64  # the router
    assert few.trained(4) - few.trained(4, "attention") == 2 * 3 * 2 * 4 * (64 + 96)


def test_a_ring_sends_every_part_almost_twice():
    assert all_reduce_bytes(100, 2) == 100 and all_reduce_bytes(100, 4) == 150 and all_gather_bytes(100, 4) == 75
    assert all_reduce_bytes(100, 1) == all_gather_bytes(100, 1) == 0


def test_a_step_waits_for_the_slower_of_computing_and_gathering():
    flops, rate = PEAKS["A100"], 1e9  # a second at a full peak
    assert Step(flops, reduced=5e8).seconds("A100", rate, mfu=1) == 1.5
    assert Step(flops, 5e8, gathered=5e8).seconds("A100", rate, mfu=1) == 1.5
    assert Step(flops, 0, gathered=4e9).efficiency("A100", rate, mfu=1) == 0.25


def test_links_have_the_published_rates_in_one_direction():
    rates = {link.name: link.rate / 1e9 for link in LINKS}
    assert [rates[f"NVLink, {card}"] for card in ("A800", "A100", "H100")] == [200, 300, 450]
    assert rates["PCIe 4 x16"] == pytest.approx(31.5, abs=0.01)
    assert [rates[f"{bits} Gb/s"] for bits in (400, 200, 100)] == [50, 25, 12.5]
