"""Folders that are quantised, and those that are quantised while they load. tests/models/test_golden.py has their logits and gradients."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import randomise
from safetensors.torch import load_file, save_file
from torch import Tensor

import minilora
from minilora.__main__ import main
from minilora.checkpoint.load import empty_model, fingerprint, read_config
from minilora.checkpoint.open_model import open_model
from minilora.checkpoint.quantized import quantized_note
from minilora.data import Example, make_batch
from minilora.errors import ModelError, UsageError
from minilora.files.model_folder import ModelFolder
from minilora.kernels import fp8_blocks, int8_rows, nf4
from minilora.kernels.quantized import QuantizedWeight, weight_as
from minilora.lora import adapters, add_lora, base_parameters, linears
from minilora.machine.dry_run import step_memory
from minilora.models.quantized import quantized_weights

GOLDEN = Path(__file__).parents[1] / "golden"
DEMO = Path(minilora.__file__).parent / "demo"
Q = "model.layers.0.self_attn.q_proj.weight"
STATE = f"{Q}.quant_state.bitsandbytes__nf4"
CLASSES = {"nf4": nf4.NF4Weight, "int8": int8_rows.Int8Weight, "fp8": fp8_blocks.FP8Weight}


def stored(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / name / "model.safetensors")


def as_loaded(name: str, quant: str = "keep") -> dict[str, QuantizedWeight]:
    return quantized_weights(minilora.load_model(GOLDEN / name, device="cpu", quant=quant))


@pytest.mark.parametrize("quant", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "glm4", "chatglm", "chatglm2", "qwen"])
def test_every_linear_of_a_block_is_quantised_while_it_loads(name: str, quant: str):
    plain = minilora.load_model(GOLDEN / name, device="cpu")
    found = as_loaded(name, quant)
    assert found.keys() == {f"{path}.weight" for path in linears(plain)}
    for weight_name, weight in found.items():
        wanted = CLASSES[quant].of(plain.get_parameter(weight_name))
        assert type(weight) is CLASSES[quant]
        for part in weight.parts:
            assert getattr(weight, part).equal(getattr(wanted, part)), (weight_name, part)


@pytest.mark.parametrize(("name", "form"), [("qwen3_nf4", "nf4"), ("qwen3_fp8", "fp8")])
def test_a_quantised_folder_stays_as_it_is(name: str, form: str):
    tensors = stored(name)
    for weight_name, weight in as_loaded(name).items():
        assert type(weight) is CLASSES[form]
        assert weight.codes.view(torch.uint8).flatten().equal(tensors[weight_name].view(torch.uint8).flatten())


@pytest.mark.parametrize("name", ["qwen3_nf4", "qwen3_fp8"])
def test_a_quantised_folder_is_widened(name: str):
    kept = minilora.load_model(GOLDEN / name, device="cpu")
    wide = minilora.load_model(GOLDEN / name, device="cpu", quant="off", dtype=torch.bfloat16)
    assert not quantized_weights(wide)
    for weight_name, weight in quantized_weights(kept).items():
        assert wide.get_parameter(weight_name).equal(weight.weight_as(torch.bfloat16))


def test_bits_of_one_format_become_those_of_another():
    kept = as_loaded("qwen3_fp8")
    for name, weight in as_loaded("qwen3_fp8", "nf4").items():
        wanted = nf4.NF4Weight.of(kept[name].weight_as(torch.float32))
        for part in weight.parts:
            assert getattr(weight, part).equal(getattr(wanted, part)), (name, part)


def test_int8_of_bitsandbytes(tmp_path: Path):
    """A folder as transformers saves it with load_in_8bit: codes under the weight's name, SCB and weight_format beside it."""
    plain, folder = minilora.load_model(GOLDEN / "qwen3", device="cpu"), copied("qwen3", tmp_path)
    tensors = dict(load_file(folder / "model.safetensors"))
    for path in linears(plain):
        made = int8_rows.quantize(tensors[f"{path}.weight"])
        tensors |= {
            f"{path}.weight": made.codes,
            f"{path}.SCB": made.absmax,
            f"{path}.weight_format": torch.tensor(0, dtype=torch.uint8),
        }
    write(folder, tensors, {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}})
    found, wanted = quantized_weights(minilora.load_model(folder, device="cpu")), as_loaded("qwen3", "int8")
    assert found.keys() == wanted.keys()
    for name, weight in found.items():
        assert weight.codes.equal(wanted[name].codes)


def test_linears_that_a_folder_leaves_plain_stay_so(tmp_path: Path):
    """llm_int8_skip_modules, and releases that keep some layers in 16 bits."""
    folder, tensors = copied("qwen3_nf4", tmp_path), stored("qwen3_nf4")
    wide = as_loaded("qwen3_nf4")[Q].weight_as(torch.float32)
    write(folder, {n: t for n, t in tensors.items() if not n.startswith(f"{Q}.")} | {Q: wide})
    model = minilora.load_model(folder, device="cpu")
    assert Q not in quantized_weights(model) and model.get_parameter(Q).equal(wide)
    ids = torch.arange(3, 12)
    with torch.no_grad():
        assert torch.allclose(
            model.logits(ids), minilora.load_model(GOLDEN / "qwen3_nf4", device="cpu").logits(ids), atol=1e-5
        )


def test_scales_of_one_level(tmp_path: Path):
    """bnb_4bit_use_double_quant off: absmax in fp32, nothing nested."""
    folder, tensors, kept = copied("qwen3_nf4", tmp_path), stored("qwen3_nf4"), as_loaded("qwen3_nf4")
    for name, weight in kept.items():
        assert isinstance(weight, nf4.NF4Weight)
        del tensors[f"{name}.nested_absmax"], tensors[f"{name}.nested_quant_map"]
        tensors[f"{name}.absmax"] = weight.scales().clone()
    write(folder, tensors)
    for name, weight in quantized_weights(minilora.load_model(folder, device="cpu")).items():
        assert weight.weight_as(torch.float32).equal(kept[name].weight_as(torch.float32))


def test_codes_stored_as_numbers_of_16_bits(tmp_path: Path):
    """bnb_4bit_quant_storage bfloat16, which sharding wants."""
    folder, tensors, kept = copied("qwen3_nf4", tmp_path), stored("qwen3_nf4"), as_loaded("qwen3_nf4")
    write(folder, tensors | {name: tensors[name].flatten().view(torch.bfloat16)[:, None].contiguous() for name in kept})
    for name, weight in quantized_weights(minilora.load_model(folder, device="cpu")).items():
        assert weight.codes.equal(kept[name].codes)


def test_a_quantised_base_answers_and_says_that_it_widens():
    said: list[str] = []
    demo = Path(minilora.__file__).parent / "demo" / "mini"
    tokenizer = minilora.load_tokenizer(demo)
    model = open_model(demo, tokenizer, device="cpu", say=said.append, quant="nf4")
    assert "nf4 in blocks of 64: 35 weights" in said[0] and "widened for every token" in said[0]
    before = open_model(demo, tokenizer, device="cpu", quant="nf4", int8=True)
    ids = torch.tensor(tokenizer.encode("hello"))
    with torch.inference_mode():
        wanted, found = model.logits(ids).float(), before.logits(ids).float()
    assert (found - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize("quant", ["off", "nf4", "int8"])
def test_a_base_is_recognised_in_any_bits(quant: str):
    """An adapter trained on 4 bits goes on the 16-bit release of the same model."""
    plain = minilora.load_model(GOLDEN / "qwen3", device="cpu")
    other = minilora.load_model(GOLDEN / "qwen3", device="cpu", quant=quant)
    assert fingerprint(base_parameters(other)) == fingerprint(base_parameters(plain))
    minilora.load_adapter(other, GOLDEN / "qwen3" / "adapter")


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_model_without_memory_has_the_bytes_of_the_loaded_one(quant: str):
    folder = ModelFolder(GOLDEN / "qwen3")
    bare, real = empty_model(read_config(folder), quant=quant), minilora.load_model(folder, device="cpu", quant=quant)
    sizes = [{n: w.nbytes for n, w in base_parameters(model).items()} for model in (bare, real)]
    assert sizes[0] == sizes[1] and all(w.device.type == "meta" for w in base_parameters(bare).values())


def test_adapters_on_quantised_weights_are_not_merged():
    model = minilora.load_model(GOLDEN / "qwen3", device="cpu", quant="nf4")
    add_lora(model)
    with pytest.raises(UsageError, match="quantised weights"):
        minilora.merge(model)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_nf4"])
def test_a_quantised_model_is_saved_wide(name: str, tmp_path: Path):
    model = minilora.load_model(GOLDEN / name, device="cpu", quant="nf4")
    minilora.save_model(model, tmp_path / "out", GOLDEN / name)
    again, ids = minilora.load_model(tmp_path / "out", device="cpu"), torch.arange(3, 12)
    with torch.no_grad():
        assert torch.allclose(again.logits(ids), model.logits(ids), atol=1e-5)


def test_an_unknown_format_is_refused():
    with pytest.raises(UsageError, match="quant 'fp4' is not known"):
        minilora.load_model(GOLDEN / "qwen3", device="cpu", quant="fp4")


def copied(name: str, tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN / name, tmp_path / name)
    return tmp_path / name


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))


def state(change: dict[str, Any]) -> Callable[[dict[str, Tensor]], None]:
    """Change a weight's quant_state."""

    def edit(tensors: dict[str, Tensor]) -> None:
        raw = json.dumps(json.loads(tensors[STATE].numpy().tobytes()) | change).encode()
        tensors[STATE] = torch.tensor(list(raw), dtype=torch.uint8)

    return edit


def part(name: str, change: Callable[[Tensor], Tensor] | None) -> Callable[[dict[str, Tensor]], None]:
    """Change a tensor, or take it away."""

    def edit(tensors: dict[str, Tensor]) -> None:
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors[name].clone()).contiguous()

    return edit


def with_nan(t: Tensor) -> Tensor:
    t.flatten()[0] = float("nan")
    return t


def vector(tensors: dict[str, Tensor]) -> None:
    """A norm in NF4, with all its parts."""
    name, said = "model.norm.weight", json.loads(tensors[STATE].numpy().tobytes())
    raw = json.dumps(said | {"shape": list(tensors[name].shape)}).encode()
    tensors[STATE.replace(Q, name)] = torch.tensor(list(raw), dtype=torch.uint8)
    for short, count in (("absmax", 2), ("nested_absmax", 1), ("quant_map", 16), ("nested_quant_map", 256)):
        tensors[f"{name}.{short}"] = tensors[f"{Q}.{short}"][:count].clone()
    tensors[name] = tensors[Q][: tensors[name].numel() // 2].clone()


S = Q.removesuffix("weight") + "weight_scale_inv"
DAMAGED = {
    "no absmax": ("qwen3_nf4", part(f"{Q}.absmax", None), "has no absmax"),
    "no state": ("qwen3_nf4", part(STATE, None), "has no quant_state"),
    "no levels": ("qwen3_nf4", part(f"{Q}.quant_map", None), "has no quant_map"),
    "no scales of scales": ("qwen3_nf4", part(f"{Q}.nested_absmax", None), "has no nested_absmax"),
    "no levels of scales": ("qwen3_nf4", part(f"{Q}.nested_quant_map", None), "has no nested_quant_map"),
    "other blocks": ("qwen3_nf4", state({"blocksize": 128}), "has blocksize '128'; 64"),
    "other nested blocks": ("qwen3_nf4", state({"nested_blocksize": 64}), "has nested_blocksize '64'; 256"),
    "foreign type": ("qwen3_nf4", state({"quant_type": "fp4"}), "has quant_type 'fp4'; nf4"),
    "a shape that lies": ("qwen3_nf4", state({"shape": [64, 256]}), "has shape"),
    "an offset that is none": ("qwen3_nf4", state({"nested_offset": None}), "has nested_offset 'None'"),
    "an offset without end": ("qwen3_nf4", state({"nested_offset": float("inf")}), "has nested_offset 'inf'"),
    "state that is no JSON": ("qwen3_nf4", part(STATE, lambda t: t[:-1]), "quant_state that is not a JSON object"),
    "state that is a list": ("qwen3_nf4", part(STATE, lambda t: torch.tensor(list(b"[1]"), dtype=torch.uint8)), "quant_state that is not a JSON object"),
    "codes cut short": ("qwen3_nf4", part(Q, lambda t: t[:-1]), "has bytes of codes '8191'; 8192"),
    "scales cut short": ("qwen3_nf4", part(f"{Q}.absmax", lambda t: t[:-1]), "has scales"),
    "foreign levels": ("qwen3_nf4", part(f"{Q}.quant_map", lambda t: t.flip(0)), "has levels"),
    "foreign levels of scales": ("qwen3_nf4", part(f"{Q}.nested_quant_map", lambda t: t * 2), "nested_quant_map"),
    "scales that are no numbers": ("qwen3_nf4", part(f"{Q}.nested_absmax", with_nan), "not finite"),
    "a part of no weight": ("qwen3_nf4", lambda t: t.update({"model.norm.absmax": torch.zeros(1)}), "not as config.json says"),
    "a vector": ("qwen3_nf4", vector, "has shape [128]; a matrix belongs there"),
    "scales of two kinds": ("qwen3_nf4", part(f"{Q}.absmax", Tensor.float), "nested_absmax, and scales (absmax) in torch.float32"),
    "an offset that is true": ("qwen3_nf4", state({"nested_offset": True}), "has nested_offset 'True'"),
    "one code alone": ("qwen3_nf4", part(Q, lambda t: t.sum()), "has bytes of codes '8'; 8192"),
    "scales below 0": ("qwen3_nf4", part(f"{Q}.nested_absmax", torch.neg), "(nested_absmax) that are not finite numbers, or below 0"),
    "scales below 0 of fp8": ("qwen3_fp8", part(S, torch.neg), "(weight_scale_inv) that are not finite numbers, or below 0"),
    "a vector of fp8": ("qwen3_fp8", lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(fp8_blocks.E4M3)}), "has shape"),
    "no scales": ("qwen3_fp8", part(S, None), "has no weight_scale_inv"),
    "other blocks of fp8": ("qwen3_fp8", part(S, lambda t: torch.cat([t, t])), "has blocks of 128 x 128"),
    "codes that are no numbers": ("qwen3_fp8", part(Q, lambda t: t.view(torch.uint8).fill_(255).view(fp8_blocks.E4M3)), "not finite"),
    "scales of infinity": ("qwen3_fp8", part(S, lambda t: t / 0), "not finite"),
    "a shape of fp8": ("qwen3_fp8", part(Q, lambda t: t[:-1]), "has shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_damaged_is_told_in_one_line(case: str, tmp_path: Path):
    name, edit, told = DAMAGED[case]
    folder, tensors = copied(name, tmp_path), stored(name)
    edit(tensors)
    write(folder, tensors)
    with pytest.raises(ModelError) as error:
        minilora.load_model(folder, device="cpu")
    assert told in error.value.what and "\n" not in error.value.what and error.value.code == 4


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised (gptq)"),
        ({"quant_method": "awq"}, "quantised (awq)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes, fp4"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "quantised (fp8)"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ],
)
def test_other_formats_name_the_unquantised_release(config: dict[str, Any], told: str, tmp_path: Path):
    folder = copied("qwen3_nf4", tmp_path)
    write(folder, stored("qwen3_nf4"), {"quantization_config": config})
    with pytest.raises(ModelError) as error:
        minilora.load_model(folder, device="cpu")
    assert told in error.value.what and "bf16" in error.value.hint


def test_weights_and_config_that_disagree_are_refused(tmp_path: Path):
    folder = copied("qwen3_nf4", tmp_path)
    write(folder, stored("qwen3_nf4"), {"quantization_config": None})
    with pytest.raises(ModelError, match="not as config.json says"):
        minilora.load_model(folder, device="cpu")
    shutil.rmtree(folder)
    folder = copied("qwen3", tmp_path)
    write(folder, stored("qwen3"), {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}})
    with pytest.raises(ModelError, match=r"quantised \(fp8\), and none is"):
        minilora.load_model(folder, device="cpu")


def test_an_adapter_is_merged_into_a_widened_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The merged folder is plain, and computes what the FP8 base and the adapter compute."""
    fp8, out = tmp_path / "fp8", tmp_path / "out"
    shutil.copytree(DEMO / "mini", fp8)
    tensors = load_file(fp8 / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        blocks = [-(-n // 128) for n in tensors[name].shape]
        tensors[f"{name}_scale_inv"] = torch.ones(blocks)
    save_file(tensors, fp8 / "model.safetensors")
    config = json.loads((fp8 / "config.json").read_text())
    how = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    (fp8 / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
    base = minilora.load_model(fp8, device="cpu")
    assert len(quantized_weights(base)) == 35
    add_lora(base, r=4)
    randomise(base)
    minilora.save_adapter(base, tmp_path / "adapter", fp8)
    assert main(["merge", "--model", str(fp8), "--adapter", str(tmp_path / "adapter"), "--output", str(out)]) == 0
    said = capsys.readouterr().out
    assert "the fp8 weights are widened to bfloat16; the merged folder is not quantised" in said
    assert json.loads((out / "config.json").read_text()) == config
    merged = minilora.load_model(out, device="cpu")
    for path, wrapper in adapters(base):
        wide = weight_as(wrapper.base.weight, torch.bfloat16)
        assert merged.get_parameter(f"{path}.weight").equal(wrapper.merged("weight", wide))
    plain = minilora.load_model(DEMO / "mini", device="cpu")
    add_lora(plain, r=4)
    minilora.save_adapter(plain, tmp_path / "plain")
    words = ["merge", "--model", str(fp8), "--adapter", str(tmp_path / "plain"), "--output", str(tmp_path / "other")]
    assert main([*words, "--any-base"]) == 0
    told = "the adapter was trained on a base that is not quantised, and is merged into a base in fp8"
    assert told in capsys.readouterr().out


def test_an_adapter_says_which_bits_it_was_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = minilora.load_model(DEMO / "mini", device="cpu", quant="nf4")
    add_lora(model, r=4)
    randomise(model)
    minilora.save_adapter(model, tmp_path / "adapter", DEMO / "mini")
    words = ["--model", str(DEMO / "mini"), "--adapter", str(tmp_path / "adapter")]
    chat = ["chat", *words, "--greedy", "--max-tokens", "2", "--prompt", "Hello"]
    assert main(chat) == 0
    assert "was trained on a base in nf4, and is on a base that is not quantised" in capsys.readouterr().out
    assert main([*chat, "--quant", "nf4"]) == 0
    assert "was trained on" not in capsys.readouterr().out
    assert main(["merge", *words, "--output", str(tmp_path / "out")]) == 0
    assert (
        "trained on a base in nf4: a logit of that model and of the merged one differ by up to"
        in capsys.readouterr().out
    )


def test_the_dry_run_counts_the_bits(tmp_path: Path):
    """Weights to the byte; the temporaries of widening are in the rest."""
    folder = ModelFolder(GOLDEN / "qwen3")
    example = Example(np.arange(3, 40), np.arange(4, 41), "x")
    found = {}
    for quant in ("off", "nf4", "int8"):
        model = empty_model(read_config(folder), quant=quant)
        add_lora(model, r=4)
        found[quant] = step_memory(model.train(), make_batch([example]))
        real = minilora.load_model(folder, device="cpu", quant=quant)
        assert found[quant].weights == sum(w.nbytes for w in base_parameters(real).values())
        assert abs(found[quant].activations - found["off"].activations) <= 2048  # NF4's table of pairs
    assert found["nf4"].total < found["int8"].total < found["off"].total


def test_the_note_of_a_header_has_bits_and_error():
    note = quantized_note(minilora.load_model(GOLDEN / "qwen3", device="cpu", quant="nf4"))
    assert note is not None and re.match(
        r"nf4 in blocks of 64: 14 weights at 4\.\d+ bits, \d\.\d MB; relative error \(Frobenius\) \d.*%, at most \d",
        note,
    )
    kept = quantized_note(minilora.load_model(GOLDEN / "qwen3_nf4", device="cpu"))
    assert kept is not None and "error" not in kept
    assert quantized_note(minilora.load_model(GOLDEN / "qwen3", device="cpu")) is None


def test_a_run_trains_on_a_quantised_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """From the command line: the header says so, and the adapter goes on the base in 16 bits."""
    demo = Path(minilora.__file__).parent / "demo"
    words = [
        "train",
        "--model",
        str(demo / "mini"),
        "--data",
        str(demo / "identity.json"),
        "--output",
        str(tmp_path / "run"),
    ]
    assert main([*words, "--quant", "nf4", "--max-steps", "2", "--lora-r", "4"]) == 0
    assert "nf4 in blocks of 64: 35 weights" in capsys.readouterr().out
    minilora.load_adapter(minilora.load_model(demo / "mini", device="cpu"), tmp_path / "run" / "adapter")
    assert main([*words[:-1], str(tmp_path / "full"), "--quant", "nf4", "--method", "full"]) == 2
