"""`minilora inspect model`: what it tells of a folder, with and without weights, and of one that is not supported."""

import json

import pytest
from tiny import make_model

from minilora.__main__ import main


@pytest.fixture
def inspect(capsys):
    """Call the command; returns (exit code, standard output)."""

    def call(*arguments) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["inspect", "model", *map(str, arguments)])
        return code, capsys.readouterr().out

    return call


def test_a_whole_folder(inspect, tmp_path):
    folder = make_model(tmp_path / "m")
    (folder / "modeling_own.py").write_text("1 / 0")
    code, out = inspect(folder, "--json")
    found = json.loads(out)
    assert code == 0 and found["problems"] == []
    assert found["sizes"]["layers"] == 2 and found["weights"]["tensors"] == 2 * 11 + 2
    names = [row["name"].split(".")[-1] for row in found["linears"]]
    assert names == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert found["linears"][0] == {
        "name": "model.layers.*.self_attn.q_proj",
        "shape": [64, 32],
        "bias": False,
        "count": 2,
    }
    assert found["parameters"] == 260 * 32 + 32 + 2 * (32 * (64 + 32 + 32 + 64) + 3 * 32 * 56 + 2 * 32 + 2 * 16)
    assert {s["token"] for s in found["stop"]} == {"<|im_end|>", "<|endoftext|>"}
    assert found["code"] == ["modeling_own.py"] and found["ignored"] == []
    assert "modeling_own.py" in inspect(folder)[1]


def test_a_config_alone(inspect, tmp_path):
    folder = make_model(tmp_path / "m")
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    code, out = inspect(folder, "--targets", "q_proj")
    assert code == 0 and "weights     none here" in out and "k_proj" not in out


def test_what_is_not_supported_is_said(inspect, tmp_path):
    folder = make_model(tmp_path / "m")
    config = folder / "config.json"
    config.write_text(config.read_text().replace("qwen3", "gpt_neox"))
    code, out = inspect(folder)
    assert code == 4 and "'gpt_neox' is not supported" in out
    config.write_text(config.read_text().replace("gpt_neox", "qwen3").replace("260", "200"))
    code, out = inspect(folder)
    assert code == 4 and "ids up to 258, the model 200 rows" in out and "config.json makes it [200, 32]" in out


def test_architectures_that_are_no_texts_are_told(inspect, tmp_path):
    folder = make_model(tmp_path / "m", architectures=[1, {"a": 2}])
    code, out = inspect(folder)
    assert code == 0 and "architectures names '1'" in out
