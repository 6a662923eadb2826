"""Every method: new parts change nothing or almost, a folder gives the model back, packed is as alone, and what is resumed has the same bits."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import IDS, OWN, WIDE, cached_logits, conversations, tiny, tiny_folder
from tiny import make_model, make_rows
from torch import Tensor

from minilora import load_adapter, load_model, merge, save_adapter
from minilora.__main__ import main
from minilora.adapted import adapted, without_adapters
from minilora.checkpoint.load import fingerprint
from minilora.config import TrainConfig
from minilora.console import Console
from minilora.data import make_batch
from minilora.errors import ModelError, UsageError
from minilora.files.safetensors import write_tensors
from minilora.lora import base_parameters, trained_parameters
from minilora.methods.table import PEFT_TYPES
from minilora.models.decoder import Decoder
from minilora.models.quantized import widen_linears
from minilora.run.setup import prepare
from minilora.settings import resolve
from minilora.tools.plan import forecast
from minilora.train import train

VIRTUAL = {
    "prefix": {"method": "prefix", "pre_seq_len": 5},
    "prefix mlp": {"method": "prefix", "pre_seq_len": 5, "prefix_projection": True},
    "prompt": {"method": "prompt", "pre_seq_len": 5},
}
MERGE = {
    "dora": {"method": "dora", "lora_r": 3},
    "ia3": {"method": "ia3"},
    "freeze": {"method": "freeze", "freeze_trainable_layers": 1},
    "bitfit": {"method": "bitfit"},
}
BOTTLENECK = {"bottleneck": {"method": "bottleneck", "bottleneck_size": 6}}
METHODS = {**MERGE, **BOTTLENECK, **VIRTUAL}
EVEN: dict[str, Any] = WIDE["qwen2"]  # widths that NF4 takes
methods = pytest.mark.parametrize("method", METHODS)
# no biases to train; DoRA goes on no experts; a prefix is of attention
WITHOUT = {"bitfit": ("qwen3", "moe_lite"), "dora": ("moe", "next"), "prefix": ("qwen3_5", "next")}
pairs = pytest.mark.parametrize(
    ("method", "family"),
    [(m, f) for m in METHODS for f in OWN if not any(part in f for part in WITHOUT.get(m.split()[0], ()))],
)


def prepared(
    method: str, family: str = "qwen2", dtype: torch.dtype = torch.float32, trained: bool = True, **changes: Any
) -> Decoder:
    """A tiny model with a method's parts; trained: with values as a training would leave them."""
    model = prepare(tiny(family, dtype, **changes), resolve(METHODS[method])).to(dtype)
    if trained:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in trained_parameters(model).values():
                p += 0.3 * torch.randn(p.shape, generator=generator)
    return model.eval()


def loss_and_gradients(model: Decoder, examples: list[Any]) -> list[Tensor]:
    loss = model.loss(make_batch(examples))
    loss.backward()
    found = [loss.detach(), *(p.grad.clone() for p in trained_parameters(model).values() if p.grad is not None)]
    model.zero_grad()
    assert len(found) == 1 + len(trained_parameters(model))
    return found


@pytest.mark.parametrize("method", [*MERGE, *BOTTLENECK])
def test_new_parts_change_nothing(method: str):
    model = tiny()
    before, name = model.logits(IDS), fingerprint(base_parameters(model))
    model = prepared(method, trained=False)
    torch.testing.assert_close(model.logits(IDS), before, rtol=0, atol=1e-5 * float(before.abs().max()))
    assert fingerprint(base_parameters(model)) == name


@methods
def test_a_folder_gives_the_model_back_and_the_base_is_still_there(method: str, tmp_path: Path):
    model, base = prepared(method), tiny()
    with torch.no_grad():
        wanted, plain = model.logits(IDS), base.logits(IDS)
        assert (wanted - plain).abs().max() > 0.01 * plain.abs().max()
        save_adapter(model, tmp_path / "a")
        load_adapter(base, tmp_path / "a")
        base.eval()
        assert torch.equal(base.logits(IDS), wanted)
        with without_adapters(base):
            assert torch.equal(base.logits(IDS), plain)
        assert torch.equal(base.logits(IDS), wanted)
    assert fingerprint(base_parameters(base)) == fingerprint(base_parameters(tiny()))
    assert trained_parameters(base).keys() == {n for n in trained_parameters(model) if "trans" not in n}


@pairs
def test_packed_documents_are_as_alone(method: str, family: str):
    model = prepared(method, family, torch.float64).train()
    examples = conversations(family)
    together = loss_and_gradients(model, examples)
    alone = [loss_and_gradients(model, [example]) for example in examples]
    for part, parts in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(part, sum(parts), rtol=1e-9, atol=1e-10)


@pairs
@pytest.mark.parametrize("keep_attention", [False, True])
def test_checkpointing_gives_the_same_gradients(method: str, family: str, keep_attention: bool):
    model = prepared(method, family).train()
    kept = loss_and_gradients(model, conversations(family))
    model.checkpointing, model.keep_attention = True, keep_attention
    again = loss_and_gradients(model, conversations(family))
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


@pairs
def test_decoding_with_a_cache_is_the_whole_document_at_once(method: str, family: str):
    # the rotary base of Qwen-1 depends on the length of a prompt beyond this one
    long: dict[str, Any] = dict.fromkeys(["seq_length"] if family == "qwen" else [], 64)
    model = prepared(method, family, torch.float64, **long)
    with torch.no_grad():
        pieces = torch.cat(cached_logits(model, IDS, [13, 1, 1]))
        torch.testing.assert_close(pieces, model.logits(IDS), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", MERGE)
def test_merged_weights_compute_the_same(method: str):
    model = prepared(method, dtype=torch.float64)
    with torch.no_grad():
        wanted = model.logits(IDS)
        merge(model)
        assert not list(adapted(model))
        torch.testing.assert_close(model.logits(IDS), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", [*BOTTLENECK, *VIRTUAL])
def test_what_cannot_be_merged_says_so(method: str):
    with pytest.raises(UsageError, match="no weight of the base can hold"):
        merge(prepared(method))


@pytest.fixture(scope="module", params=[*METHODS, "pissa"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, TrainConfig]:
    """A method, the folder of a finished run of it with a checkpoint in the middle, and its config."""
    work = tmp_path_factory.mktemp("methods")
    own = METHODS.get(request.param, {"lora_init": "pissa", "lora_r": 3})
    shape = {"model_type": "qwen2", "head_dim": 8}  # which has biases
    model, rows = make_model(work / "model", torch.bfloat16, **shape), make_rows(work / "rows.json")
    given = {"max_steps": 4, "batch_size": 11, "lr": 1e-2, "save_every": 2, "device": "cpu", "val": "3", **own}
    config = resolve(
        given, {"model": model, "data": rows, "compute": "float32", "output": work / "run", "keep": "last"}
    )
    train(config, console=Console(quiet=True))
    return request.param, work / "run", config


def test_a_run_learns_and_a_resumed_one_has_the_same_bits(run: tuple[str, Path, TrainConfig], tmp_path: Path):
    _, folder, config = run
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [m["loss"] for m in lines if "loss" in m]
    assert len(losses) == 4 and losses[-1] < losses[0]
    shutil.copytree(folder, tmp_path / "b", symlinks=True)
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-4")
    again = train(resolve(config.__dict__, {"output": tmp_path / "b"}), resume=True, console=Console(quiet=True))
    name = "adapter_model.safetensors"
    assert (folder / "adapter" / name).read_bytes() == (again / name).read_bytes()
    steps = [path / "checkpoints" / "step-4" / "optimizer.safetensors" for path in (folder, tmp_path / "b")]
    assert steps[0].read_bytes() == steps[1].read_bytes()


def test_the_commands_read_from_the_folder_what_was_trained(
    run: tuple[str, Path, TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    method, folder, config = run
    both = ["--model", config.model, "--adapter", str(folder / "adapter")]
    assert (folder / "report.html").is_file()
    assert main(["eval", *both, "--data", config.data, "--json"]) == 0
    adapted_loss = json.loads(capsys.readouterr().out)["loss"]
    assert main(["chat", *both, "--greedy", "--max-tokens", "3", "--prompt", "1"]) == 0
    code = main(["merge", *both, "--output", str(tmp_path / "merged")])
    said = capsys.readouterr()
    if method in (*BOTTLENECK, *VIRTUAL):
        assert code == 2 and "no weight of the base can hold" in said.err and not (tmp_path / "merged").exists()
        return
    assert code == 0 and "proof" in said.out
    assert main(["eval", "--model", str(tmp_path / "merged"), "--data", config.data, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(adapted_loss, rel=0.02)


@methods
def test_a_card_is_planned_with(method: str, tmp_path: Path):
    """The memory of a step, by a model without data; and the operations of a token."""
    folder = tiny_folder(tmp_path / "m", num_hidden_layers=5)
    found = forecast(resolve(METHODS[method], {"model": folder}), 80)
    model = prepared(method, trained=False, num_hidden_layers=5)
    assert found["trained"] == sum(p.numel() for p in trained_parameters(model).values())
    assert found["memory"]["total"] > 0 and found["step"]["flops"] > 0


@pytest.mark.parametrize("method", ["dora", "ia3", "bitfit", "bottleneck", "prefix", "prompt"])
def test_a_quantised_base_computes_as_its_widened_weights(method: str, tmp_path: Path):
    folder = tiny_folder(tmp_path / "m", **EVEN)
    nf4 = prepare(load_model(folder, quant="nf4"), resolve(METHODS[method]))
    plain = load_model(folder, quant="nf4")
    widen_linears(plain, torch.float32)
    plain = prepare(plain, resolve(METHODS[method]))
    for a, b in zip(*(loss_and_gradients(model, conversations("qwen2")) for model in (nf4, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_freeze_refuses_a_quantised_base(tmp_path: Path):
    with pytest.raises(UsageError, match="quantised"):
        prepare(load_model(tiny_folder(tmp_path / "m", **EVEN), quant="nf4"), resolve(METHODS["freeze"]))


def test_dpo_has_the_base_of_every_method_as_its_reference():
    for method in METHODS:
        model = prepared(method)
        with torch.no_grad(), without_adapters(model):
            assert torch.equal(model.logits(IDS), tiny().logits(IDS)), method


def test_settings_of_lora_are_refused():
    for wrong in ({"lora_dropout": 0.1}, {"study": True}, {"lora_init": "pissa"}):
        with pytest.raises(UsageError, match="is of --method lora"):
            prepare(tiny(), resolve(METHODS["ia3"], wrong))
    with pytest.raises(UsageError, match="no linear is called|The model has"):
        prepare(tiny(), resolve(METHODS["ia3"], {"lora_targets": "nothing"}))
    with pytest.raises(UsageError, match="has none"):
        prepare(tiny("qwen3"), resolve(METHODS["bitfit"]))
    with pytest.raises(UsageError, match="5 of 2 layers"):
        prepare(tiny(), resolve(METHODS["freeze"], {"freeze_trainable_layers": 5}))


@pytest.mark.parametrize(
    ("flag", "settings"), [("--method dora", {"method": "dora"}), ("--lora-init pissa", {"lora_init": "pissa"})]
)
def test_what_does_not_go_on_experts_names_what_does(flag: str, settings: dict[str, Any]):
    with pytest.raises(UsageError, match=f"{flag} does not go on experts\n.*--lora-targets attention"):
        prepare(tiny("qwen3_moe"), resolve(settings))
    prepare(tiny("qwen3_moe"), resolve(settings, {"lora_targets": "attention"}))


def test_a_folder_of_another_model_is_refused_in_one_line(tmp_path: Path):
    for method in METHODS:
        save_adapter(prepared(method), tmp_path / method)
        with pytest.raises(ModelError, match="fits|fit this|no linear|missing|has no place|another base|its layers"):
            load_adapter(tiny("qwen2", hidden_size=32, num_key_value_heads=4), tmp_path / method, any_base=True)


DOWN = "base_model.model.model.layers.0.self_attn.o_proj.adapter_down.weight"
HIDDEN = "transformer.prefix_encoder.trans.0.weight"
SIZES = {
    "nothing of any height": ("BOTTLENECK", {DOWN: (1 << 25, 0)}, "which holds nothing"),
    "far too high": ("BOTTLENECK", {DOWN: (1 << 20, 1)}, "more do not fit"),
    "a scalar": ("BOTTLENECK", {DOWN: ()}, "no BOTTLENECK adapter of this model"),
    "a scalar of IA3": ("IA3", {DOWN.replace("adapter_down.weight", "ia3_l"): ()}, "no IA3 adapter of this model"),
    "an encoder of one dimension": ("PREFIX_TUNING", {HIDDEN: (5,)}, "no PREFIX_TUNING adapter of this model"),
    "a million tokens": ("PROMPT_TUNING", {"prompt_embeddings": (1,)}, r"\[1048576, 32\] fits"),
    "no tensor": ("IA3", {}, "holds no adapter"),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_size_that_a_header_says_is_compared_before_anything_is_made_of_it(tmp_path: Path, monkeypatch, name: str):
    kind, shapes, told = SIZES[name]
    model = load_model(make_model(tmp_path / "model"), device="cpu")
    write_tensors(tmp_path / "adapter_model.safetensors", {key: torch.zeros(shape) for key, shape in shapes.items()})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "num_virtual_tokens": 1 << 20}))
    read = PEFT_TYPES[kind].read

    def without_memory(model: Decoder, *more: Any) -> dict[str, Tensor]:
        assert model.head.is_meta
        return read(model, *more)

    monkeypatch.setattr(PEFT_TYPES[kind], "read", without_memory)
    with pytest.raises(ModelError, match=told):
        load_adapter(model, tmp_path)
