"""Two matrices of every adapter of a folder: their scale, their norm, and what does not fit."""

import json

import pytest
import torch

from minilora.checkpoint.factors import Factors, read_factors, write_factors
from minilora.errors import ModelError, UsageError
from minilora.files.safetensors import write_tensors

LAYERS = [f"model.layers.{n}.mlp.up_proj" for n in (0, 2, 10)]


def folder_of(folder, tensors, **config):
    folder.mkdir()
    j = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["up_proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(j))
    write_tensors(folder / "adapter_model.safetensors", {f"base_model.model.{k}.weight": t for k, t in tensors.items()})
    return folder


def halves(path, r=2, n=4, k=3):
    generator = torch.Generator().manual_seed(len(path))
    return {
        f"{path}.lora_A": torch.empty(r, k).normal_(generator=generator),
        f"{path}.lora_B": torch.empty(n, r).normal_(generator=generator),
    }


def test_norm_and_product_are_those_of_the_change_of_w():
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.empty(shape).double().normal_(generator=generator) for shape in ((2, 5), (7, 2), (4, 5), (7, 4))]
    a, b = Factors(drawn[0], drawn[1], 3.0), Factors(drawn[2], drawn[3], 0.5)
    one, two = (f.scale * f.b @ f.a for f in (a, b))
    assert a.r == 2 and a.norm == pytest.approx(float(one.norm()), rel=1e-12)
    assert a.dot(b) == pytest.approx(float((one * two).sum()), rel=1e-12) == b.dot(a)


@pytest.mark.parametrize(("rslora", "scales"), [(False, [3, 3, 4]), (True, [6 / 2**0.5, 6 / 2**0.5, 4])])
def test_scales_follow_ranks_and_patterns_layer_by_layer(tmp_path, rslora, scales):
    tensors = {k: t for path in LAYERS for k, t in halves(path, 1 if "10" in path else 2).items()}
    patterns = {"rank_pattern": {LAYERS[2]: 1}, "alpha_pattern": {LAYERS[2]: 4}}
    found = read_factors(folder_of(tmp_path / "a", tensors, use_rslora=rslora, **patterns))
    assert list(found) == LAYERS and [f.scale for f in found.values()] == scales
    for path, f in found.items():
        assert torch.equal(f.a, tensors[f"{path}.lora_A"].double()) and f.b.dtype == torch.float64


A, B = halves(LAYERS[0]).values()


@pytest.mark.parametrize(
    ("tensors", "config", "told"),
    [
        ({"a.lora_A": A}, {}, r"a has lora_A \[2, 3\]"),
        ({"a.lora_A": A, "a.lora_B": B.T.contiguous()}, {}, r"lora_B \[2, 4\]"),
        ({"a.lora_A": A, "a.lora_B": B}, {"r": 1}, r"a has lora_A \[2, 3\]"),
        ({"a.lora_A": A[0], "a.lora_B": B}, {}, r"a has lora_A \[3\]"),
        ({"a.lora_A": A / 0, "a.lora_B": B}, {}, "not finite"),
        ({"a.lora_A": A, "a.lora_B": B, "a": B}, {}, "a.weight is no matrix of an adapter"),
        ({}, {}, "holds no adapter"),
        ({"a.lora_A": A, "a.lora_B": B}, {"use_dora": True}, "is DoRA"),
        ({"a.lora_A": A, "a.lora_B": B}, {"use_qalora": True}, "use_qalora, which pools the input"),
        ({"a.lora_A": A, "a.lora_B": B}, {"init_lora_weights": "pissa"}, "is PiSSA"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path, tensors, config, told):
    with pytest.raises(ModelError, match=told):
        read_factors(folder_of(tmp_path / "a", tensors, **config))


def test_written_factors_come_back(tmp_path):
    source = folder_of(
        tmp_path / "a",
        halves(LAYERS[0]),
        lora_dropout=0.5,
        fan_in_fan_out=True,
        auto_mapping={"parent_library": "evil"},
        foreign=[],
    )
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}")
    cut = {path: Factors(torch.ones(r, 3), torch.ones(4, r)) for path, r in zip(LAYERS, (1, 3, 2), strict=True)}
    write_factors(tmp_path / "b", cut, source)
    found = read_factors(tmp_path / "b")
    assert [f.r for f in found.values()] == [1, 3, 2] and {f.scale for f in found.values()} == {1}
    assert all(torch.equal(f.a, cut[path].a.double()) for path, f in found.items())
    j = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert j["r"] == j["lora_alpha"] == 3 and j["lora_dropout"] == 0.5
    assert j["fan_in_fan_out"] and not j.keys() & {"auto_mapping", "foreign"}
    assert j["rank_pattern"] == j["alpha_pattern"] == {LAYERS[0]: 1, LAYERS[2]: 2}
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == "{{ messages }}"
    with pytest.raises(UsageError, match="on experts"):
        write_factors(tmp_path / "c", cut | {"a.experts.0.b": cut[LAYERS[0]]}, source)


LAYER = "model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("paths", "config", "leaves"),
    [
        ([LAYER], {}, {"": "gate_up_proj"}),
        ([LAYER], {"target_parameters": ["mlp.experts.down_proj"]}, {"": "down_proj"}),
        ([LAYER, f"{LAYER}.base_layer"], {}, {"": "down_proj", ".base_layer": "gate_up_proj"}),
    ],
)
def test_a_stack_is_a_pair_of_matrices_of_each_expert(tmp_path, paths, config, leaves):
    """Three experts in PEFT's layout: A [experts x R, in], B [out, R x experts], the rank major."""
    tensors = {k: t for path in paths for k, t in halves(path, 6).items()}
    found = read_factors(folder_of(tmp_path / "a", tensors, **config))
    assert sorted(found) == sorted(f"{LAYER}.{e}.{leaf}" for leaf in leaves.values() for e in range(3))
    for inner, leaf in leaves.items():
        a, b = (tensors[f"{LAYER}{inner}.lora_{half}"].double() for half in "AB")
        for e in range(3):
            f = found[f"{LAYER}.{e}.{leaf}"]
            assert f.scale == 3 and torch.equal(f.a, a[2 * e : 2 * e + 2]) and torch.equal(f.b, b[:, e::3])


@pytest.mark.parametrize("changes", [{"A": torch.ones(5, 3)}, {"B": torch.ones(4, 5)}, {"A": None}, {"B": None}])
def test_a_stack_that_does_not_fit_is_refused(tmp_path, changes):
    tensors = {k: changes.get(k[-1], t) for k, t in halves(LAYER, 6).items()}
    with pytest.raises(ModelError, match="belong there"):
        read_factors(folder_of(tmp_path / "a", {k: t for k, t in tensors.items() if t is not None}))
