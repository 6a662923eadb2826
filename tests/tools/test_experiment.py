"""A sweep that asks something: its page, the same page from its folder, and the spectra of what its runs changed."""

import json

import pytest
import torch
import yaml
from tiny import make_model, make_rows

from minilora.__main__ import main
from minilora.checkpoint.load import empty_model, read_config
from minilora.checkpoint.quantized import Stored
from minilora.console import Console
from minilora.files.model_folder import ModelFolder
from minilora.files.safetensors import SafetensorsFile
from minilora.report.record import read_record
from minilora.tools import sweep as sweep_module
from minilora.tools.experiment import _changes, read_cells
from minilora.tools.sweep import sweep

# of each group beside the first: the 95 % interval over seeds that docs/experiments.md tells, as it was measured
FOUND = {
    "rank-and-rate": {("8",): (0.90, 1.55), ("32",): (1.06, 1.58)},
    "attention-or-mlp": {("attention",): (-0.077, 0.055)},
    "lora-plus": {("16",): (-0.103, 0.073)},
    "lora-or-full": {("lora",): (-0.054, 0.217)},
    "batch-penalty": {("lora",): (-0.094, 0.182)},
    "pissa": {("pissa",): (-0.075, 0.066)},
}


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The folder of a sweep over both methods and two seeds, on a tiny model."""
    home = tmp_path_factory.mktemp("asked")
    base = {"model": str(make_model(home / "m")), "data": str(make_rows(home / "rows.json")), "val": "4", "max_steps": 2,
            "lora_r": 2, "device": "cpu", "batch_size": 4}  # fmt: skip
    question = {"ask": "Is LoRA as good?", "published": "Yes.", "compare": "method", "expect": [-1, 1], "spectra": True}
    file = {"base": base, "product": {"method": ["full", "lora"], "seed": [1, 2]}, "question": question}
    (home / "s.yaml").write_text(yaml.safe_dump(file))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_module, "_child", lambda *words: main([str(word) for word in words]))
        sweep(str(home / "s.yaml"), str(home / "out"), {}, console=Console(quiet=True))
    return home / "out"


def test_the_page_answers_what_was_asked(swept, capsys):
    text = (swept / "compare.md").read_text()
    assert "# Is LoRA as good?" in text and "method lora less that of method full" in text
    assert "effective rank" in text and "All 4 runs" in text
    assert main(["compare", str(swept), "--output", str(swept / "again.html")]) == 0
    assert (swept / "again.html").read_text() == (swept / "compare.html").read_text()
    assert "method lora less that" in capsys.readouterr().out
    assert main(["compare", str(swept / "method=full,seed=1"), "--output", str(swept / "x.html")]) == 2


@pytest.mark.parametrize("damage", ["no runs", "no list", "no names", "no question"])
def test_a_sweep_file_that_no_sweep_wrote_is_told(swept, tmp_path, damage, capsys):
    about = json.loads((swept / "sweep.json").read_text())
    about |= {"no list": {"runs": 5}, "no names": {"runs": [5]}, "no question": {"question": "why"}}.get(damage, {})
    if damage == "no runs":
        del about["runs"]
    (tmp_path / "sweep.json").write_text(json.dumps(about))
    assert main(["compare", str(tmp_path), "--output", str(tmp_path / "x.html")]) == 3
    assert "sweep.json is not what a sweep writes" in capsys.readouterr().err


def test_what_full_fine_tuning_changed_is_read_in_fp32(swept):
    run = read_record(swept / "method=full,seed=1")
    folder = ModelFolder(run.config["model"])
    stored = Stored.of(folder, empty_model(read_config(folder)))
    changes = _changes(run, stored)
    after = SafetensorsFile(run.folder / "checkpoints/last/model.safetensors")
    before = SafetensorsFile(ModelFolder(run.config["model"]).path / "model.safetensors")
    assert changes.keys() == _changes(read_record(swept / "method=lora,seed=1"), stored).keys()
    for path, f in changes.items():
        change = after.tensor(f"{path}.weight").double() - before.tensor(f"{path}.weight").double()
        assert change.any()
        torch.testing.assert_close(f.scale * f.b @ f.a, change, rtol=0, atol=1e-12)


@pytest.mark.long
@pytest.mark.parametrize("name", FOUND)
def test_a_recipe_finds_what_the_docs_tell(tmp_path, name):
    """Another CPU rounds otherwise: the mean over the same seeds stays within the interval that another set of seeds would."""
    sweep(name, str(tmp_path / "out"), {}, console=Console(quiet=True))
    cells = read_cells(tmp_path / "out")
    assert {group for group in cells.groups[1:]} == FOUND[name].keys()
    for group, (low, high) in FOUND[name].items():
        found = cells.estimate(group)
        assert found is not None and low <= found.mean <= high, (group, found)
