"""A model's folder is opened once and passed on."""

from collections import Counter
from pathlib import Path

import pytest
from tiny import make_model, make_rows

from minilora.__main__ import main
from minilora.errors import ModelError
from minilora.files import model_folder
from minilora.files.model_folder import ModelFolder


def test_a_command_reads_each_small_file_once(tmp_path, monkeypatch):
    """Beside the look at config.json that comes before torch is imported."""
    model, rows = make_model(tmp_path / "model"), make_rows(tmp_path / "rows.json")
    read, found = model_folder.read_json, Counter()

    def counted(path: Path):
        found[path.name] += 1
        return read(path)

    monkeypatch.setattr(model_folder, "read_json", counted)
    paths = ["--model", str(model), "--data", str(rows)]
    assert main(["train", *paths, "--output", str(tmp_path / "run"), "--epochs", "1", "--device", "cpu"]) == 0
    assert found.pop("config.json") == 2 and set(found.values()) <= {1}
    found.clear()
    assert main(["eval", *paths, "--device", "cpu"]) == 0
    assert found.pop("config.json") == 2 and set(found.values()) <= {1}


def test_a_file_is_read_when_it_is_asked_for(tmp_path):
    folder = ModelFolder(tmp_path)
    assert folder.generation_config == {} == folder.tokenizer_config
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        _ = folder.config
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert folder.config == {"a": 1} and ModelFolder.of(folder) is folder
    (tmp_path / "config.json").unlink()
    assert folder.config == {"a": 1}
