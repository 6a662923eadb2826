"""LoftQ: base + adapter start nearer to the weights than the quantised base, and are found again from the folder."""

import json
import shutil
from pathlib import Path
from typing import cast

import pytest
import torch
from oracle import as_wrong_as
from safetensors.torch import load_file, save_file
from tiny import make_model

import minilora
from minilora import load_adapter, load_model, loftq_init, save_adapter
from minilora.__main__ import main
from minilora.errors import ModelError, UsageError
from minilora.kernels.quantized import QuantizedWeight, weight_as
from minilora.lora import adapters, add_lora
from minilora.methods.low_rank import low_rank

GOLDEN = Path(__file__).parents[1] / "golden"
DEMO = Path(minilora.__file__).parent / "demo"
MINI = DEMO / "mini"


def started(folder: Path, quant: str, **lora):
    model = load_model(folder, device="cpu", quant=quant)
    add_lora(model, **lora)
    loftq_init(model, folder)
    return model


def difference(wrapper) -> torch.Tensor:
    return wrapper.scale * wrapper.lora_B.detach().double() @ wrapper.lora_A.detach().double()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("quant", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["qwen3", "glm4", "chatglm"])
def test_the_error_falls_to_that_of_the_best_of_its_rank(name: str, quant: str, rslora: bool):
    """For every linear, against an SVD in fp64."""
    plain = load_model(GOLDEN / name, device="cpu")
    for path, wrapper in adapters(started(GOLDEN / name, quant, r=4, alpha=6, rslora=rslora)):
        wide = plain.get_parameter(f"{path}.weight").double()
        off = wide - weight_as(wrapper.base.weight, torch.float32).double()
        left, least = float((off - difference(wrapper)).norm()), float(torch.linalg.svdvals(off)[4:].norm())
        assert left < 0.999 * off.norm() and left == pytest.approx(least, rel=1e-9), path
        assert cast(QuantizedWeight, wrapper.base.weight).error_left == pytest.approx(
            left / float(wide.norm()), rel=1e-5
        )
        as_wrong_as(difference(wrapper).float(), truncated(off.float()), truncated(off), path)
        assert torch.allclose(wrapper.lora_A.norm(dim=1), wrapper.lora_B.norm(dim=0), rtol=1e-5)


def truncated(m: torch.Tensor) -> torch.Tensor:
    u, s, v = torch.linalg.svd(m, full_matrices=False)
    return (u[:, :4] * s[:4]) @ v[:4]


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
def test_the_nearest_of_a_rank(shape: tuple[int, int]):
    m = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(m.double())
    for r in (1, 5, 24, 30):
        b, a = low_rank(m, r)
        assert b.shape == (shape[0], min(r, 24)) and a.shape == (min(r, 24), shape[1])
        best = (u[:, :r] * s[:r]) @ v[: min(r, 24)] if r < 24 else m.double()
        assert (b.double() @ a.double() - best).norm() < 1e-5 * m.norm()


def test_directions_without_an_error_start_as_usual(tmp_path: Path):
    """A and B of zeros would never train."""
    m = torch.outer(torch.arange(1.0, 9), torch.ones(6))
    b, a = low_rank(m, 4)
    assert b.shape == (8, 1) and torch.allclose(b @ a, m, atol=1e-5)
    folder = make_model(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    save_file(tensors | {f"{name}.weight": torch.ones_like(tensors[f"{name}.weight"])}, folder / "model.safetensors")
    usual = load_model(folder, device="cpu", quant="int8")
    add_lora(usual, r=2)
    found, before = dict(adapters(started(folder, "int8", r=2))), dict(adapters(usual))
    assert found[name].lora_A.equal(before[name].lora_A) and not found[name].lora_B.any()
    assert sum(not w.lora_A.equal(before[path].lora_A) for path, w in found.items()) == len(found) - 1


def test_folder_bits_and_adapter_are_the_model_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Trained, resumed, answered and merged; on other bits refused in one line."""
    run, words = tmp_path / "run", ["--model", str(MINI)]
    train = ["train", *words, "--data", str(DEMO / "identity.json"), "--lora-r", "4", "--lora-init", "loftq"]
    flags = ["--quant", "nf4", "--max-steps", "4", "--save-every", "2", "--device", "cpu"]
    assert main([*train, *flags, "--output", str(run)]) == 0
    said = capsys.readouterr().out
    assert "% with the adapters of LoftQ" in said and "--quant nf4" in said.splitlines()[-3]
    # half of it and the rest are the whole
    other = shutil.copytree(run, tmp_path / "other", symlinks=True)
    for name in ("adapter", "checkpoints/step-4"):
        shutil.rmtree(other / name)
    assert main(["train", "--output", str(other), "--resume"]) == 0
    weights = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (run, other)]
    assert weights[0] == weights[1]
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["init_lora_weights"] is True
    capsys.readouterr()
    words += ["--adapter", str(run / "adapter")]
    chat = ["chat", *words, "--greedy", "--max-tokens", "2", "--prompt", "Hello"]
    assert main(chat) == 4
    assert (
        "began as the error of a base in nf4 (LoftQ), and this is a base that is not quantised"
        in capsys.readouterr().err
    )
    assert main([*chat, "--quant", "nf4"]) == 0 and main([*chat, "--any-base"]) == 0
    assert main([*chat, "--quant", "int8"]) == 4
    assert main(["merge", *words, "--output", str(tmp_path / "merged")]) == 0
    assert "the nf4 weights are widened" in capsys.readouterr().out
    model = load_model(MINI, device="cpu", quant="nf4")
    load_adapter(model, run / "adapter")
    merged = load_model(tmp_path / "merged", device="cpu")
    for path, wrapper in adapters(model):
        wide = weight_as(wrapper.base.weight, torch.bfloat16)
        assert merged.get_parameter(f"{path}.weight").equal(wrapper.merged("weight", wide)), path


def test_a_loaded_adapter_remembers(tmp_path: Path):
    save_adapter(started(GOLDEN / "qwen3", "int8", r=2), tmp_path / "one")
    model = load_model(GOLDEN / "qwen3", device="cpu", quant="int8")
    load_adapter(model, tmp_path / "one")
    save_adapter(model, tmp_path / "two")
    plain, weights = load_model(GOLDEN / "qwen3", device="cpu"), tmp_path / "two" / "adapter_model.safetensors"
    with pytest.raises(ModelError, match="a base in int8"):
        load_adapter(plain, tmp_path / "two")
    save_file(load_file(weights), weights, {"minilora_init": "loftq", "minilora_quant": "\x1b[31mint8"})
    load_adapter(plain, tmp_path / "two")  # what it says is of no format known here


def test_what_has_no_error_to_start_from_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--model", str(MINI), "--data", str(DEMO / "identity.json"), "--lora-init", "loftq"]
    assert main(["train", *words, "--output", str(tmp_path / "run")]) == 2
    assert main(["plan", *words]) == 2
    errors = capsys.readouterr().err
    assert (
        errors.count("LoftQ starts from the error of quantised weights, and model.layers.0.self_attn.q_proj is not")
        == 2
    )
    for name, quant in (("qwen3_nf4", "nf4"), ("qwen3_fp8", "keep"), ("qwen3_nf4", "int8")):
        model = load_model(GOLDEN / name, device="cpu", quant=quant)
        add_lora(model, r=2)
        with pytest.raises(UsageError, match=f"{name} does not hold"):
            loftq_init(model, GOLDEN / name)
