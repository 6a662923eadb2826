"""minilora verify, and export before it gives a folder its name: what PEFT or vLLM would leave out of an adapter is told."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model

import minilora
from minilora.__main__ import main
from minilora.checkpoint.check_export import check_export, logits_moved
from minilora.checkpoint.consumers import vllm_rank
from minilora.checkpoint.export import export_adapter
from minilora.errors import MiniloraError, ModelError
from minilora.files.safetensors import SafetensorsFile, write_tensors
from minilora.lora import adapters
from minilora.methods.dora import DoRALinear

GOLDEN = Path(__file__).parent.parent / "golden"
FAMILIES = sorted(
    {p.parent.name for p in GOLDEN.glob("*/adapter")} - {"qwen2_sliding", "qwen2_yarn", "qwen3_fp8", "qwen3_nf4"}
)
REFUSED = {
    ("glm4_moe_lite", "vllm"): r"applies no adapter there: .*kv_b_proj",
    ("gpt2", "vllm"): "takes no adapters on gpt2",
}
WEIGHTS = "adapter_model.safetensors"
IDS = torch.arange(20)


def read(folder: Path) -> dict[str, torch.Tensor]:
    file = SafetensorsFile(folder / WEIGHTS)
    return {key: file.tensor(key).clone() for key in file.entries}


def changed(adapter: Path, to: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    shutil.copytree(adapter, to)
    if tensors is not None:
        (to / WEIGHTS).unlink()
        write_tensors(to / WEIGHTS, tensors)
    j = json.loads((to / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps(j | config))
    return to


def trained(folder: Path, to: Path, r: int = 3, **options: Any) -> Path:
    model = minilora.load_model(folder, device="cpu")
    minilora.add_lora(model, r=r, alpha=7, **options)
    generator = torch.Generator().manual_seed(0)
    for _, wrapper in adapters(model):
        wrapper.lora_B.data.normal_(0, 0.1, generator=generator)
    minilora.save_adapter(model, to)
    return to


@pytest.mark.parametrize("consumer", ["peft", "vllm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_export_writes_is_applied(tmp_path: Path, family: str, consumer: str):
    if (family, consumer) in REFUSED:
        with pytest.raises(MiniloraError, match=REFUSED[family, consumer]):
            export_adapter(GOLDEN / family, GOLDEN / family / "adapter", tmp_path / "out", consumer)
        assert not (tmp_path / "out").exists()
        return
    export_adapter(GOLDEN / family, GOLDEN / family / "adapter", tmp_path / "out", consumer)
    check = check_export(GOLDEN / family, tmp_path / "out", consumer)
    assert check.problems == [] and check.zero == 0 and sum(check.found.values()) > 0


def test_dora_is_written_for_peft_and_refused_for_vllm(tmp_path: Path):
    folder = make_model(tmp_path / "model")
    adapter = trained(folder, tmp_path / "dora", kind=DoRALinear)
    export_adapter(folder, adapter, tmp_path / "out", "peft")
    written, own = (SafetensorsFile(place / WEIGHTS) for place in (tmp_path / "out", adapter))
    assert written.entries.keys() == own.entries.keys()
    assert all(torch.equal(written.tensor(key), own.tensor(key)) for key in own.entries)
    with pytest.raises(ModelError, match="DoRA|dora"):
        export_adapter(folder, adapter, tmp_path / "other", "vllm")


def test_what_needs_another_base_is_not_exported(tmp_path: Path):
    folder = make_model(tmp_path / "model")
    adapter = trained(folder, tmp_path / "adapter")
    pissa = changed(adapter, tmp_path / "pissa", init_lora_weights="pissa")
    with pytest.raises(ModelError, match="PiSSA as PEFT trains it"):
        export_adapter(folder, pissa, tmp_path / "out", "peft")
    loftq = changed(adapter, tmp_path / "loftq")
    (loftq / WEIGHTS).unlink()
    write_tensors(loftq / WEIGHTS, read(adapter), {"minilora_init": "loftq", "minilora_quant": "nf4"})
    with pytest.raises(ModelError, match="LoftQ"):
        export_adapter(folder, loftq, tmp_path / "out", "vllm")
    assert "LoftQ" in "".join(check_export(folder, loftq, "vllm").problems)
    assert logits_moved(folder, loftq, device="cpu")[0] > 0  # PEFT can have the base in nf4


def test_a_chat_template_of_the_adapters_own_goes_with_it(tmp_path: Path):
    folder = make_model(tmp_path / "model")
    adapter = trained(folder, tmp_path / "adapter")
    own = (folder / "chat_template.jinja").read_text().replace("<|im_start|>", "<|im_start|> ")
    (adapter / "chat_template.jinja").write_text(own)
    export_adapter(folder, adapter, tmp_path / "out", "vllm")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == own


@pytest.mark.parametrize("family", ["glm", "glm4"])
def test_vllm_has_the_halves_of_gate_up(tmp_path: Path, family: str):
    """Each with the A of the whole; read back, also where each has an A of its own, it is one adapter again."""
    folder = make_model(tmp_path / "model", model_type=family)
    adapter = trained(folder, tmp_path / "adapter")
    export_adapter(folder, adapter, tmp_path / "vllm", "vllm")
    ours, theirs = read(adapter), read(tmp_path / "vllm")
    layer = "base_model.model.model.layers.1.mlp."
    whole, halves = f"{layer}gate_up_proj.lora_", [f"{layer}{half}_proj.lora_" for half in ("gate", "up")]
    assert not [key for key in theirs if "gate_up" in key]
    assert all(torch.equal(theirs[f"{half}A.weight"], ours[f"{whole}A.weight"]) for half in halves)
    assert torch.equal(torch.cat([theirs[f"{half}B.weight"] for half in halves]), ours[f"{whole}B.weight"])
    names = json.loads((tmp_path / "vllm" / "adapter_config.json").read_text())["target_modules"]
    assert names == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]

    def logits(adapter: Path) -> torch.Tensor:
        model = minilora.load_model(folder, device="cpu", compute="float32")
        minilora.load_adapter(model, adapter)
        return model.eval().logits(IDS).detach()

    torch.testing.assert_close(logits(tmp_path / "vllm"), logits(adapter), rtol=1e-5, atol=1e-5)
    for key in theirs:  # the same product from another A in one half
        if "up_proj.lora_A" in key:
            theirs[key] *= 2
            theirs[key.replace("_A", "_B")] /= 2
    other = changed(tmp_path / "vllm", tmp_path / "other", theirs)
    torch.testing.assert_close(logits(other), logits(adapter), rtol=1e-5, atol=1e-5)


def test_what_is_not_applied_is_told(tmp_path: Path):
    """Each fault that a reader passes over, planted into an adapter that is good."""
    folder = make_model(tmp_path / "model")
    adapter = trained(folder, tmp_path / "adapter")
    assert check_export(folder, adapter, "vllm").problems == check_export(folder, adapter, "peft").problems == []
    tensors = read(adapter)
    bare = {key.removeprefix("base_model.model."): t for key, t in tensors.items()}
    some = {key: t * ("q_proj.lora_B" not in key) for key, t in tensors.items()}
    told = {
        "vllm finds no such module: .*q_proj": {"tensors": bare},
        "vLLM does not read alpha_pattern": {"alpha_pattern": {"q_proj": 3}},
    }
    for i, (said, change) in enumerate(told.items()):
        (problem,) = check_export(folder, changed(adapter, tmp_path / str(i), **change), "vllm").problems
        assert re.match(said, problem), problem
    check = check_export(folder, changed(adapter, tmp_path / "some", some), "vllm")
    assert check.zero == 2 and not check.problems
    big = trained(folder, tmp_path / "big", r=520, targets="q_proj")
    assert check_export(folder, big, "vllm").problems == ["vLLM takes ranks up to 512, r is 520"]
    with pytest.raises(ModelError, match="(?s)would not apply .*up to 512"):
        export_adapter(folder, big, tmp_path / "out", "vllm")
    assert not (tmp_path / "out").exists()
    assert [vllm_rank(r) for r in (1, 3, 16, 24, 300, 512)] == [1, 8, 16, 32, 320, 512]


def test_a_path_of_the_other_class(tmp_path: Path):
    """Qwen3.5's language model by itself and within the vision model: vLLM leaves the wrong one out without a word."""
    folder = GOLDEN / "qwen3_5_text"
    model = tmp_path / "model"
    model.mkdir()
    j = json.loads((folder / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "text_config": j}))
    for consumer, other in (("peft", "vllm"), ("vllm", "peft")):
        export_adapter(model, folder / "adapter", tmp_path / consumer, consumer)
        assert check_export(model, tmp_path / consumer, consumer).problems == []
        (problem,) = check_export(model, tmp_path / consumer, other).problems
        assert problem.startswith(f"{other} finds no such module: model.")


def test_the_logits_move(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = make_model(tmp_path / "model")
    adapter = trained(folder, tmp_path / "adapter")
    moved, largest = logits_moved(folder, adapter, device="cpu")
    assert 0 < moved < 100 * largest
    tensors = read(adapter)
    zero = changed(adapter, tmp_path / "zero", {key: t * ("lora_A" in key) for key, t in tensors.items()})
    assert logits_moved(folder, zero, device="cpu")[0] == 0
    assert main(["verify", str(adapter), "--model", str(folder), "--for", "vllm"]) == 0
    assert "14 of 14 linears" in capsys.readouterr().out
    assert main(["verify", str(zero), "--model", str(folder), "--for", "peft"]) == 4
    said = capsys.readouterr()
    assert "B is zero on 14" in said.out and "B is zero everywhere" in said.err
    odd = changed(adapter, tmp_path / "odd", alpha_pattern={"q_proj": 3})
    assert main(["verify", str(odd), "--model", str(folder), "--no-logits"]) == 4
    assert "does not read alpha_pattern" in capsys.readouterr().err


def test_verify_takes_the_base_of_the_adapter_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    adapter = trained(make_model(tmp_path / "model"), tmp_path / "adapter")
    other = make_model(tmp_path / "other")
    file = SafetensorsFile(other / "model.safetensors")
    tensors = {name: -file.tensor(name) for name in file.entries}
    (other / "model.safetensors").unlink()
    write_tensors(other / "model.safetensors", tensors)
    words = ["verify", str(adapter), "--model", str(other)]
    assert main(words) == 4 and "trained on another base" in capsys.readouterr().err
    assert main([*words, "--any-base"]) == 0
