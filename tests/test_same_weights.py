"""The same weights under another config.json, or an adapter's under another adapter_config.json, are another model: nothing goes on with it unseen."""

import json
import shutil
from pathlib import Path

import pytest
from tiny import make_model, make_rows

from minilora.__main__ import main
from minilora.report.caveats import caveats
from minilora.report.record import read_record

TRAIN = ["train", "--model", "model", "--data", "rows.json", "--lora-r", "2", "--batch-size", "4", "--save-every", "1", "--device", "cpu",
         "--output", "run"]  # fmt: skip
PREDICT = ["predict", "--model", "model", "--adapter", "run/adapter", "--data", "rows.json", "--max-tokens", "1", "--output", "answers"]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A model, rows, a run of two steps, and answers."""
    folder = tmp_path_factory.mktemp("made")
    make_model(folder / "model", num_hidden_layers=1)
    (folder / "model" / "generation_config.json").write_text('{"eos_token_id": 258}')
    make_rows(folder / "rows.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*TRAIN, "--max-steps", "2"]) == 0 and main(PREDICT) == 0
    return folder


@pytest.fixture
def here(tmp_path, made, monkeypatch) -> Path:
    shutil.copytree(made, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
def test_a_run_does_not_go_on_with_another_config(here, capsys, key):
    change(here / "model" / "config.json", **{key: 0.5})
    shutil.rmtree(here / "run" / "checkpoints" / "step-2")
    assert main(["train", "--output", "run", "--resume"]) == 9
    assert f"{key.removeprefix('rms_norm_')} of the model: " in (said := capsys.readouterr().err) and "0.5 now" in said


def test_a_run_from_before_configs_were_kept_goes_on(here, monkeypatch):
    from minilora.run import folder

    def older(snapshot):
        state = read(snapshot)
        del state["identity"]["architecture"]
        return state

    read = folder.read_state
    monkeypatch.setattr(folder, "read_state", older)
    shutil.rmtree(here / "run" / "checkpoints" / "step-2")
    assert main(["train", "--output", "run", "--resume"]) == 0


@pytest.mark.parametrize(
    ("file", "value"),
    [
        ("model/config.json", {"rms_norm_eps": 0.5}),
        ("run/adapter/adapter_config.json", {"lora_alpha": 320}),
        ("model/generation_config.json", {"eos_token_id": [257, 258]}),
        ("run/adapter/tokenizer_config.json", {"added_by": "another"}),
    ],
)
def test_answers_are_not_taken_for_those_of_another_config(here, capsys, file, value):
    assert main(PREDICT) == 0 and "holds this prediction already" in capsys.readouterr().out
    (here / file).exists() or (here / file).write_text("{}")
    change(here / file, **value)
    assert main(PREDICT) == 8 and "of other weights, rows or decoding" in capsys.readouterr().err
    assert main([*PREDICT, "--overwrite"]) == 0


def test_runs_of_another_config_are_not_compared_by_their_losses(here):
    change(here / "model" / "config.json", rope_theta=50.0)
    again = [*TRAIN[:-1], "other"]
    assert main([*again, "--max-steps", "2"]) == 0
    same, other = (read_record(here / name) for name in ("run", "other"))
    assert any("from another config.json" in line for line in caveats([same, other]))
    assert not any("config.json" in line for line in caveats([same, read_record(here / "run")]))


def test_scores_of_an_adapter_that_was_trained_on_since_are_told(here):
    assert main([*PREDICT[:-1], "run/predict"]) == 0
    assert not any("other weights" in line for line in caveats([read_record(here / "run")]))
    change(here / "run" / "adapter" / "adapter_config.json", lora_alpha=320)
    assert any("other weights than the run has now" in line for line in caveats([read_record(here / "run")]))
    assert main(["report", "run"]) == 0
    assert "other weights than the run has now" in (here / "run" / "report.html").read_text()


def test_answers_of_the_base_alone_are_not_taken_for_the_runs(here):
    at = PREDICT.index("--adapter")
    assert main([*PREDICT[:at], *PREDICT[at + 2 : -1], "run/predict"]) == 0
    assert read_record(here / "run").stale_answers


def test_a_prediction_whose_results_are_damaged_is_told(here, capsys):
    change(here / "answers" / "predict_results.json", rows="many", metrics=[1])
    assert main(PREDICT) == 3 and "holds what no run writes" in capsys.readouterr().err


def test_answers_of_an_older_model_are_told_where_every_weight_is_trained(here):
    assert main([*TRAIN[:-1], "full", "--method", "full", "--max-steps", "1"]) == 0
    assert (
        main(["predict", "--model", "full", "--data", "rows.json", "--max-tokens", "1", "--output", "full/predict"])
        == 0
    )
    assert not read_record(here / "full").stale_answers
    shutil.copy("model/model.safetensors", "full/model/model.safetensors")
    assert any("other weights than the run has now" in line for line in caveats([read_record(here / "full")]))
