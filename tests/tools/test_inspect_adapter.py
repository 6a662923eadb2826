"""`minilora inspect adapter`: what was planted in an adapter is found, and equals what dense linear algebra says."""

import json
import re
from pathlib import Path

import pytest
import torch
from tiny import make_model, make_rows
from torch import Tensor

from minilora import load_adapter, load_model, save_adapter
from minilora.__main__ import main
from minilora.checkpoint.factors import Factors, read_factors
from minilora.lora import adapters, add_lora
from minilora.tools.inspect_adapter import (
    INTRUDER,
    STRONGEST,
    TOP,
    Spectrum,
    beside,
    compare_adapters,
    effective_rank,
    inspect_adapter,
    rank_for,
)


def inspecting(*words: object) -> list[str]:
    return ["inspect", "adapter", *map(str, words)]


def delta(f: Factors) -> Tensor:
    return f.scale * f.b @ f.a


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> tuple[Path, Path]:
    """(base, adapter of rank 16): q_proj of layer 0 has rank 3, o_proj of layer 1 is dead, v_proj of layer 0 holds an intruder."""
    home = tmp_path_factory.mktemp("planted")
    base = make_model(home / "base")
    model = load_model(base)
    add_lora(model, "attention", r=16, alpha=16)
    generator = torch.Generator().manual_seed(1)
    for path, linear in adapters(model):
        linear.lora_B.data.normal_(0, 0.003, generator=generator)
        if path.endswith("0.self_attn.q_proj"):
            linear.lora_B.data[:, 3:] = 0
        if path.endswith("1.self_attn.o_proj"):
            linear.lora_B.data *= 1e-4
        if path.endswith(
            "0.self_attn.v_proj"
        ):  # one strong direction that is none of the weight's: the sum of all of them
            u, _, vh = torch.linalg.svd(linear.base.weight.detach(), full_matrices=False)
            linear.lora_A.data[0] = vh.mean(0) * 100
            linear.lora_B.data[:, 0] = u.mean(1) * 100
    save_adapter(model, home / "adapter", base)
    return base, home / "adapter"


def test_what_was_planted_is_found(planted):
    base, adapter = planted
    changes = {c.path.removeprefix("model.layers."): c for c in inspect_adapter(adapter, base).changes}
    assert len(changes) == 8
    assert {path for path, c in changes.items() if c.dead} == {"1.self_attn.o_proj"}
    low = changes["0.self_attn.q_proj"]
    assert low.rank_99 <= 3 < changes["1.self_attn.q_proj"].rank_99
    assert sum(v > 1e-9 * low.values[0] for v in low.values) == 3 and low.effective_rank <= 3 + 1e-6
    intruders = {path: c.base.intruders for path, c in changes.items() if c.base and c.base.intruders}
    assert intruders == {"0.self_attn.v_proj": 1}


def test_the_spectrum_is_that_of_the_whole_change(planted):
    for f in read_factors(planted[1]).values():
        spectrum, dw = Spectrum.of(f), delta(f)
        torch.testing.assert_close(spectrum.s, torch.linalg.svdvals(dw)[: f.r], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(spectrum.u * spectrum.s @ spectrum.v.T, dw, rtol=1e-9, atol=1e-12)
        u, s, vh = torch.linalg.svd(dw)
        torch.testing.assert_close(delta(spectrum.first(2)), u[:, :2] * s[:2] @ vh[:2], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(48, 30), (30, 48), (40, 40)])
def test_beside_the_base_as_dense_algebra_says(shape: tuple[int, int]):
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(shape, generator=generator)
    f = Factors(
        torch.randn(4, shape[1], generator=generator).double(),
        torch.randn(shape[0], 4, generator=generator).double(),
        0.5,
    )
    found, dw = beside(w, f, Spectrum.of(f)), delta(f)
    u, _, vh = torch.linalg.svd(w.double(), full_matrices=False)
    top = round(TOP * min(shape))
    assert found.relative == pytest.approx(float(dw.norm() / w.double().norm()), rel=1e-5)
    inside = u[:, :top].T @ dw @ vh[:top].T
    assert found.strong == pytest.approx(float(inside.norm() ** 2 / dw.norm() ** 2), rel=1e-3)
    assert found.by_chance == pytest.approx(top * top / w.numel())
    tuned_u, _, tuned_vh = torch.linalg.svd(w.double() + dw, full_matrices=False)
    ours, theirs = (u.T, tuned_u[:, :STRONGEST]) if shape[0] <= shape[1] else (vh, tuned_vh[:STRONGEST].T)
    assert found.intruders == int(((ours @ theirs).abs().amax(0) < INTRUDER).sum())


def test_ranks_of_known_spectra():
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.tensor([3.0, 0, 0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == rank_for(torch.zeros(3), 0.9) == 0
    s = torch.tensor([3.0, 1.0, 0.0]).double()  # energies 0.9 and 0.1
    assert [rank_for(s, share) for share in (0.5, 0.9, 0.91, 1.0)] == [1, 1, 2, 2]


def test_layers_come_in_their_order(tmp_path, capsys):
    base = make_model(tmp_path / "m", num_hidden_layers=11)
    model = load_model(base)
    add_lora(model, "q_proj", r=2)
    for number, (_, linear) in enumerate(adapters(model)):
        linear.lora_B.data.fill_(number + 1)
    save_adapter(model, tmp_path / "adapter", base)
    changes = inspect_adapter(tmp_path / "adapter").changes
    assert [c.layer for c in changes] == [str(n) for n in range(11)]
    assert main(["inspect", "adapter", str(tmp_path / "adapter")]) == 0
    assert "layers 0 to 10" in capsys.readouterr().out


def test_an_adapter_beside_itself_and_beside_another(planted, tmp_path):
    base, adapter = planted
    factors = read_factors(adapter)
    spectra = {path: Spectrum.of(f) for path, f in factors.items()}
    for same in compare_adapters(spectra, factors, adapter):
        assert (same.cosine, same.outputs, same.inputs) == pytest.approx((1, 1, 1))
    model = load_model(base)
    load_adapter(model, adapter)
    for _, linear in adapters(model):  # writes the same, reads something else
        linear.lora_A.data.normal_(generator=torch.Generator().manual_seed(3))
    save_adapter(model, tmp_path / "other", base)
    for other in compare_adapters(spectra, factors, tmp_path / "other"):
        if other.path.endswith("1.self_attn.q_proj"):
            assert other.outputs > 0.9 and abs(other.cosine) < 0.5 and other.inputs < 0.8


def test_a_run_has_a_start_and_checkpoints(tmp_path, capsys):
    base, rows, run = make_model(tmp_path / "m"), make_rows(tmp_path / "rows.json"), tmp_path / "run"
    settings = ["--lora-r", "4", "--epochs", "2", "--save-every", "2", "--keep-checkpoints", "9", "--batch-size", "4"]
    assert main(["train", "--model", str(base), "--data", str(rows), "--output", str(run), *settings]) == 0
    found = inspect_adapter(run)
    assert [m.step for m in found.drift][:2] == [2, 4]
    assert found.drift[-1].cosine == pytest.approx(1) and found.drift[-1].norm == pytest.approx(1)
    assert 0 < found.drift[0].norm < found.drift[-1].norm * 1.01
    model = load_model(base)
    add_lora(model, r=4, seed=42)
    start = {path: linear.lora_A.detach() for path, linear in adapters(model)}
    for change, (path, f) in zip(found.changes, read_factors(run / "adapter").items(), strict=True):
        first, now = (torch.linalg.svd(a.double(), full_matrices=False)[2] for a in (start[path], f.a))
        assert change.rotated == pytest.approx(1 - float((first @ now.T).square().sum()) / 4, abs=1e-9)
        assert change.rotated and 0 < change.rotated < 0.5
    capsys.readouterr()
    assert main(["inspect", "adapter", str(run)]) == 0
    assert "rotated away from that start" in " ".join(capsys.readouterr().out.split())


def test_a_smaller_adapter_is_written_and_its_loss_told(planted, tmp_path, capsys):
    base, adapter = planted
    rows = make_rows(tmp_path / "rows.json")
    command = inspecting(adapter, "--model", base, "--to-rank", "16", "--output", tmp_path / "same")
    assert main([*command, "--data", str(rows)]) == 0
    losses = [line.split()[2] for line in capsys.readouterr().out.splitlines() if " loss " in line]
    assert len(losses) == 3 and losses[1] == losses[2] != losses[0]
    assert main(["inspect", "adapter", str(adapter), "--to-rank", "3", "--output", str(tmp_path / "small")]) == 0
    old, new = read_factors(adapter), read_factors(tmp_path / "small")
    assert {f.r for f in new.values()} == {3}
    path = next(path for path in old if path.endswith("0.self_attn.q_proj"))
    torch.testing.assert_close(delta(new[path]), delta(old[path]), rtol=1e-5, atol=1e-7)
    load_adapter(load_model(base), tmp_path / "small")  # knows its base


def test_a_smaller_adapter_is_measured_on_the_bits_of_its_training(tmp_path, capsys, monkeypatch):
    base, rows, run = make_model(tmp_path / "m"), make_rows(tmp_path / "rows.json"), tmp_path / "run"
    words = ["--lora-r", "4", "--max-steps", "1", "--quant", "int8"]
    assert main(["train", "--model", str(base), "--data", str(rows), "--output", str(run), *words]) == 0
    both = ["--model", str(base), "--data", str(rows)]
    assert main(inspecting(run / "adapter", "--to-rank", "4", "--output", tmp_path / "small", *both)) == 0
    told = re.search(r"adapter +loss ([0-9.]+)", capsys.readouterr().out)
    assert main(["eval", "--adapter", str(run / "adapter"), "--quant", "int8", *both]) == 0
    assert told and f"loss        {told[1]} nats" in capsys.readouterr().out


def test_json_and_page(planted, tmp_path, capsys):
    base, adapter = planted
    page = tmp_path / "<b>.html"
    command = inspecting(adapter, "--model", base, "--against", adapter, "--html", page, "--json")
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["changes"]) == 8 and found["changes"][0]["base"]["relative"] > 0
    text = page.read_text()
    assert "intruder" in text and text.count("<figure") == 4 and "nan" not in text


@pytest.mark.parametrize(
    "words, code, told",
    [
        (["--to-rank", "2"], 2, "belong together"),
        (["--data", "ROWS"], 2, "smaller rank"),
        (["--model", "OTHER"], 4, "adapter is for"),
        (["--against", "OTHER"], 4, "adapter_config.json is missing"),
    ],
)
def test_what_does_not_fit_is_one_line(planted, tmp_path, capsys, words, code, told):
    other = make_model(tmp_path / "other", hidden_size=64)
    places = {"OTHER": str(other), "ROWS": str(make_rows(tmp_path / "rows.json"))}
    assert main(["inspect", "adapter", str(planted[1]), *(places.get(w) or w for w in words)]) == code
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error
