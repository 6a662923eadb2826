"""Adapters on tiny models: what they compute, where they go, and their folder."""

import inspect
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import IDS, config_json, randomise, tiny, tiny_folder
from torch import Tensor

from minilora import add_lora, load_adapter, load_model, merge, save_adapter, save_model
from minilora.adapted import without_adapters
from minilora.checkpoint.adapter_config import HARMLESS, MOST_PATTERNS, READ, REFUSED, meant, refuse_what_is_not_lora
from minilora.config import defaults
from minilora.errors import ModelError, UsageError
from minilora.files.safetensors import SafetensorsFile, write_tensors
from minilora.lora import adapters, linears, set_dropout_keys
from minilora.methods.dora import DoRALinear
from minilora.models.decoder import Decoder
from minilora.models.layers import Linear
from minilora.run.setup import prepare
from minilora.settings import resolve
from minilora.targets import chosen

families = pytest.mark.parametrize("family", ["qwen2", "qwen3"])
PREFIX = "base_model.model."


def paths(model: torch.nn.Module) -> list[str]:
    return [path for path, _ in adapters(model)]


def trained(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


# what an adapter computes


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_new_adapter_changes_no_bit(family: str, dtype: torch.dtype):
    model = tiny(family, dtype)
    before = model.logits(IDS)
    add_lora(model, r=3, alpha=5)
    assert torch.equal(model.logits(IDS), before)


def test_a_new_adapter_learns_from_the_first_step():
    """B is zero, so A gets no gradient yet; B must."""
    model = tiny()
    add_lora(model, r=3)
    model.logits(IDS).square().sum().backward()
    for _, wrapper in adapters(model):
        assert wrapper.lora_A.grad is not None and wrapper.lora_B.grad is not None
        assert wrapper.lora_B.grad.any() and not wrapper.lora_A.grad.any()


def test_the_adapter_alone_is_trained(tmp_path: Path):
    model, other = tiny().requires_grad_(), tiny().requires_grad_()
    add_lora(model, "mlp", r=3)
    save_adapter(model, tmp_path / "a")
    load_adapter(other, tmp_path / "a")
    wanted = {f"{path}.lora_{half}" for path in paths(model) for half in "AB"}
    assert trained(model).keys() == trained(other).keys() == wanted
    assert {p.dtype for p in trained(model).values()} == {torch.float32}


def test_defaults_are_those_of_a_run():
    given, run = inspect.signature(add_lora).parameters, defaults()
    names = {
        "r": "lora_r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "rslora": "rslora",
        "targets": "lora_targets",
    }
    assert {name: given[name].default for name in names} == {name: run[key] for name, key in names.items()}


def test_a_starts_as_pefts_does_and_follows_from_the_seed():
    """Kaiming uniform with a = sqrt(5): within 1/sqrt(in), and not all in the middle of it."""
    first, second, other = tiny(), tiny(), tiny()
    for model, seed in ((first, 5), (second, 5), (other, 6)):
        add_lora(model, r=8, seed=seed)
    for (_, a), (_, b), (_, c) in zip(adapters(first), adapters(second), adapters(other), strict=True):
        assert torch.equal(a.lora_A, b.lora_A) and not torch.equal(a.lora_A, c.lora_A)
        bound = a.base.in_features**-0.5
        assert 0.9 * bound < a.lora_A.abs().max() <= bound


@pytest.mark.parametrize("rslora", [False, True])
def test_the_wrapped_linear_is_the_formula(rslora: bool):
    model = tiny(dtype=torch.float64)
    add_lora(model, "q_proj", r=3, alpha=7, rslora=rslora)
    randomise(model)
    q = dict(adapters(model))["model.layers.0.self_attn.q_proj"]
    x = torch.randn(5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scale = 7 / math.sqrt(3) if rslora else 7 / 3
    truth = q.base(x) + scale * (x @ q.lora_A.double().T @ q.lora_B.double().T)
    torch.testing.assert_close(q(x), truth, rtol=0, atol=1e-12)


def test_dropout_follows_the_key_and_training_alone():
    model = tiny()
    add_lora(model, r=3, dropout=0.5)
    randomise(model)
    plain = model.logits(IDS)
    model.train()
    set_dropout_keys(model, seed=1, step=2, micro=0)
    first = model.logits(IDS)
    set_dropout_keys(model, seed=1, step=3, micro=0)
    other = model.logits(IDS)
    set_dropout_keys(model, seed=1, step=2, micro=0)
    assert torch.equal(model.logits(IDS), first)
    assert not torch.equal(first, other) and not torch.equal(first, plain)
    assert torch.equal(model.eval().logits(IDS), plain)


def test_every_module_drops_its_own_values():
    model = tiny()
    add_lora(model, r=3, dropout=0.5)
    set_dropout_keys(model, seed=1, step=2, micro=0)
    keys = [wrapper.keys.of(wrapper.number) for _, wrapper in adapters(model)]
    assert len(set(keys)) == len(keys)


def test_activation_checkpointing_draws_the_same_masks_again():
    """The gradients of a recomputed block are those of a kept one, bit for bit."""
    grads = []
    for checkpointing in (False, True):
        model = tiny()
        add_lora(model, r=3, dropout=0.5)
        randomise(model)
        model.checkpointing = checkpointing
        set_dropout_keys(model.train(), seed=1, step=2, micro=0)
        model.logits(IDS).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# merge and without_adapters


@families
def test_merged_is_wrapped_in_fp64(family: str):
    model = tiny(family, torch.float64)
    add_lora(model, r=3, alpha=7, rslora=True)
    randomise(model)
    wrapped = model.logits(IDS)
    merge(model)
    assert not paths(model)
    torch.testing.assert_close(model.logits(IDS), wrapped, rtol=0, atol=1e-12 * float(wrapped.detach().abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merge_rounds_once(dtype: torch.dtype):
    model = tiny(dtype=dtype)
    add_lora(model, r=4, alpha=8)
    randomise(model)
    wrapped = dict(adapters(model))
    deltas = {path: 2 * (w.lora_B @ w.lora_A).detach() for path, w in wrapped.items()}
    weights = {path: w.base.weight.clone() for path, w in wrapped.items()}
    merge(model)
    for path, w in weights.items():
        merged = model.get_parameter(f"{path}.weight")
        assert torch.equal(merged, (w.float() + deltas[path]).to(dtype))
        assert not torch.equal(merged, w + deltas[path].to(dtype)), "rounding twice would not be seen here"


def test_merge_leaves_the_rest_alone():
    model, base = tiny(), dict(tiny().named_parameters())
    add_lora(model, "attention", r=3)
    randomise(model)
    merge(model)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, base[n])}
    assert changed == {n for n in base if ".self_attn." in n and n.endswith("_proj.weight")}


def test_without_adapters_is_the_base_and_puts_them_back():
    model = tiny()
    before = model.logits(IDS)
    add_lora(model, r=3)
    randomise(model)
    wrapped, names = model.logits(IDS), [n for n, _ in model.named_parameters()]
    with without_adapters(model):
        assert torch.equal(model.logits(IDS), before) and not paths(model)
    assert torch.equal(model.logits(IDS), wrapped)
    assert [n for n, _ in model.named_parameters()] == names


def test_without_adapters_puts_them_back_after_an_error():
    model = tiny()
    add_lora(model, r=3)
    names = paths(model)
    with pytest.raises(RuntimeError, match="inside"), without_adapters(model):
        raise RuntimeError("inside")
    assert paths(model) == names


def test_adapters_go_on_once(tmp_path: Path):
    """A wrapper around a wrapper's base would be trained, and lost when the adapter is saved."""
    model = tiny()
    add_lora(model, r=3)
    names = paths(model)
    save_adapter(model, tmp_path / "a")
    with pytest.raises(UsageError, match="adapters already"):
        add_lora(model, r=3)
    with pytest.raises(UsageError, match="adapters already"):
        load_adapter(model, tmp_path / "a")
    assert paths(model) == names


def test_a_model_with_adapters_is_not_saved_as_a_checkpoint(tmp_path: Path):
    """Its tensors carry other names: the folder would be one that nothing can read."""
    folder = tiny_folder(tmp_path / "base")
    model = load_model(folder)
    add_lora(model, r=3)
    with pytest.raises(UsageError, match="merge"):
        save_model(model, tmp_path / "out", folder)
    assert not (tmp_path / "out").exists()


# targets

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("targets", "leaves"),
    [
        ("all-linear", ATTENTION + MLP),
        ("attention", ATTENTION),
        ("mlp", MLP),
        ("q_proj", ["q_proj"]),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        (["v_proj", "up_proj"], ["v_proj", "up_proj"]),
        (r".*\.(q|v)_proj", ["q_proj", "v_proj"]),
        ("mlp.up_proj", ["up_proj"]),
    ],
)
@families
def test_targets(family: str, targets: str | list[str], leaves: list[str]):
    model = tiny(family)
    add_lora(model, targets, r=2)
    assert {p.split(".")[-1] for p in paths(model)} == set(leaves)
    assert len(paths(model)) == 2 * len(leaves)


@pytest.mark.parametrize("targets", ["model.layers.1.mlp.up_proj", r"model\.layers\.1\..*up_proj"])
def test_one_linear_of_one_layer(targets: str):
    model = tiny()
    add_lora(model, targets, r=2)
    assert paths(model) == ["model.layers.1.mlp.up_proj"]


def test_the_head_gets_no_adapter():
    model = tiny(tie_word_embeddings=False)
    add_lora(model, r=2)
    assert not any("lm_head" in p for p in paths(model))


@pytest.mark.parametrize(
    "targets", ["q_prj", "q_proj,q_prj", ["q_prj"], r".*\.q_prj", r".*\.q_pro", "proj", "", "lm_head"]
)
def test_an_unknown_target_names_those_that_exist(targets: str | list[str]):
    model = tiny()
    with pytest.raises(UsageError) as error:
        add_lora(model, targets, r=2)
    assert all(leaf in error.value.hint for leaf in ATTENTION + MLP)
    assert not paths(model)


def test_a_broken_expression_is_a_usage_error():
    with pytest.raises(UsageError, match="not a regular expression"):
        add_lora(tiny(), "(q_proj", r=2)


# the folder


def adapted(**changes: Any) -> Decoder:
    """A model with a random adapter of all linears."""
    model = tiny()
    add_lora(model, **{"r": 3, "alpha": 7, **changes})
    randomise(model)
    return model


def edited(folder: Path, **changes: Any) -> Path:
    """The adapter folder with other keys in its config."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize("targets", ["all-linear", "attention", "model.layers.1.mlp.up_proj"])
@pytest.mark.parametrize("rslora", [False, True])
def test_save_and_load_is_bit_exact(tmp_path: Path, targets: str, rslora: bool):
    model = adapted(targets=targets, rslora=rslora, dropout=0.25)
    save_adapter(model, tmp_path / "a", "a/base")
    other = tiny()
    load_adapter(other, tmp_path / "a")
    first, second = trained(model), trained(other)
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    assert torch.equal(model.logits(IDS), other.logits(IDS))
    assert {w.dropout for _, w in adapters(other)} == {0.25}
    save_adapter(other, tmp_path / "b", "a/base")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_adapter_of_another_method_is_read_by_it(tmp_path: Path):
    model = prepare(tiny(), resolve({"method": "ia3"}))
    save_adapter(model, tmp_path / "a")
    again = tiny()
    load_adapter(again, tmp_path / "a")
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()] and not paths(again)


def test_an_adapter_of_a_bf16_base_is_fp32_in_the_file(tmp_path: Path):
    model = tiny(dtype=torch.bfloat16)
    add_lora(model, r=3)
    save_adapter(model, tmp_path / "a")
    file = SafetensorsFile(tmp_path / "a" / "adapter_model.safetensors")
    assert {entry.dtype for entry in file.entries.values()} == {torch.float32}
    load_adapter(tiny(dtype=torch.bfloat16), tmp_path / "a")


def test_the_linears_of_an_adapter_are_named_in_one_order(tmp_path: Path):
    """Each process has its own order of a set."""
    save_adapter(adapted(), tmp_path / "a")
    named = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"]
    assert len(named) == 7 and named == sorted(named)


def test_no_key_of_an_adapters_config_is_dropped_in_silence(tmp_path: Path):
    save_adapter(adapted(), tmp_path / "a")
    before = (tmp_path / "a" / "adapter_config.json").read_text()

    def outcome(**changes: Any) -> list[Any]:
        (tmp_path / "a" / "adapter_config.json").write_text(before)
        model = tiny()
        try:
            load_adapter(model, edited(tmp_path / "a", **changes))
        except ModelError as error:
            return [error.what]
        return [(w.r, w.scale, w.dropout, w.factors()[1].sum().item()) for _, w in adapters(model)]

    plain = outcome()
    for key in set(READ) - {"base_model_name_or_path"}:  # which a refusal quotes
        assert outcome(**{key: "pissa" if key == "init_lora_weights" else 0.5}) != plain, key
    for key in HARMLESS:
        assert outcome(**{key: {"a": 1}}) == plain, key
    for key in (*REFUSED, "lora_scale", "x"):
        for value in (True, 0.5, "text", {"a": 1}, [1]):
            assert key in outcome(**{key: value})[0], key
    for nothing in (None, False, "", [], {}):
        assert outcome(x=nothing) == plain


def peft_folder(folder: Path, ranks: dict[str, int], **config: Any) -> Path:
    """An adapter folder as PEFT writes it, with random matrices of the given rank for each path."""
    base = linears(tiny())
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for path, r in ranks.items():
        rows, columns = base[path].weight.shape
        tensors[f"{PREFIX}{path}.lora_A.weight"] = torch.randn(r, columns, generator=generator)
        tensors[f"{PREFIX}{path}.lora_B.weight"] = torch.randn(rows, r, generator=generator)
    folder.mkdir()
    write_tensors(folder / "adapter_model.safetensors", tensors)
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "lora_dropout": 0.0}
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    return folder


Q0, Q1, UP1 = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj")


@pytest.mark.parametrize("left_out", [r".*up_proj", ["up_proj"]])
def test_modules_that_a_config_leaves_out_are_not_missed(tmp_path: Path, left_out: str | list[str]):
    config = {"target_modules": r".*q_proj|.*up_proj", "exclude_modules": left_out}
    model = tiny()
    load_adapter(model, peft_folder(tmp_path / "a", {Q0: 4, Q1: 4}, **config))
    assert {path for path, _ in adapters(model)} == {Q0, Q1}


@pytest.mark.parametrize("rslora", [False, True])
def test_rank_and_alpha_patterns(tmp_path: Path, rslora: bool):
    """A name, a path, and an expression; the first that fits counts, up to the end of the path."""
    folder = peft_folder(
        tmp_path / "a", {Q0: 2, Q1: 6, UP1: 4},
        rank_pattern={"layers.0.self_attn.q_proj": 2, "q_proj": 6, "up": 9},
        alpha_pattern={r"layers\.[1-9]\.mlp\..*": 3, "self_attn": 99},
        use_rslora=rslora,
    )  # fmt: skip
    model = tiny()
    load_adapter(model, folder)
    found = {path: (w.r, w.alpha, w.scale) for path, w in adapters(model)}
    root = math.sqrt if rslora else float
    assert found == {Q0: (2, 8, 8 / root(2)), Q1: (6, 8, 8 / root(6)), UP1: (4, 3, 3 / root(4))}


def test_as_many_patterns_are_read_as_is_said(tmp_path: Path):
    most = {f"layer{i}": 1 for i in range(MOST_PATTERNS)}
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    for name in ("rank_pattern", "alpha_pattern"):
        refuse_what_is_not_lora(tmp_path, plain | {name: most})
        with pytest.raises(ModelError, match=f"{name} has 10,001 patterns"):
            refuse_what_is_not_lora(tmp_path, plain | {name: most | {"one": 1}})


def test_unequal_ranks_survive_a_round_trip(tmp_path: Path):
    folder = peft_folder(
        tmp_path / "a", {Q0: 2, Q1: 6, UP1: 4}, rank_pattern={Q0: 2, "q_proj": 6}, alpha_pattern={UP1: 1.5}
    )
    model, again = tiny(), tiny()
    load_adapter(model, folder)
    save_adapter(model, tmp_path / "b")
    load_adapter(again, tmp_path / "b")
    assert [(p, w.r, w.alpha) for p, w in adapters(again)] == [(p, w.r, w.alpha) for p, w in adapters(model)]
    assert torch.equal(model.logits(IDS), again.logits(IDS))


def test_every_mismatch_is_in_one_error(tmp_path: Path):
    save_adapter(adapted(targets="attention"), tmp_path / "a")
    with pytest.raises(ModelError) as error:
        load_adapter(tiny(hidden_size=32, num_hidden_layers=1), tmp_path / "a")
    text = str(error.value)
    assert len(text.splitlines()) <= 6
    for leaf in ATTENTION:
        assert leaf in text.partition("no such linear: ")[2].partition("\n")[0]
        assert (
            f"model.layers.0.self_attn.{leaf}"
            in text.partition("lora_A is [3, 24], [3, 32] fits: ")[2].partition("\n")[0]
        )


def test_many_mismatches_are_a_few_lines_with_the_name_of_the_base(tmp_path: Path):
    save_adapter(adapted(), tmp_path / "a", "models/other")
    with pytest.raises(ModelError) as error:
        load_adapter(tiny(hidden_size=32, intermediate_size=48, num_hidden_layers=1), tmp_path / "a")
    lines = error.value.what.splitlines()
    assert len(lines) == 5 and "more kinds of mismatch" in lines[-1]
    assert error.value.hint == "It was made for 'models/other'."


def test_an_error_leaves_the_model_as_it_was(tmp_path: Path):
    save_adapter(adapted(), tmp_path / "a")
    model = tiny(num_hidden_layers=1)
    with pytest.raises(ModelError):
        load_adapter(model, tmp_path / "a")
    assert not paths(model)


def test_another_base_of_the_same_shape_is_refused_unless_it_is_wanted(tmp_path: Path):
    save_adapter(adapted(), tmp_path / "a")
    other = tiny(seed=1)
    with pytest.raises(ModelError, match="another base"):
        load_adapter(other, tmp_path / "a")
    assert not paths(other)
    load_adapter(other, tmp_path / "a", any_base=True)
    assert len(paths(other)) == 14


# each tries for ever on a path that does not fit at its end
ENDLESS = (
    "(|.)" * 40 + "X", "(.|.)" * 40 + "X", "(.|.|.|.)" * 10 + "X", "(a|a)*X", "((.|.)|(.|.))" * 10 + "X", ".*.*.*X", "(.?)" * 20 + "X", "(?:.|..)+X",
    "(?=(.*)*).X", r"(.)\1{9}X", "(m|m|m)" * 25,
)  # fmt: skip


@pytest.mark.parametrize("pattern", ENDLESS)
def test_patterns_that_try_for_ever_are_not_tried(tmp_path: Path, pattern: str):
    """Nor are those of targets: the names that the file holds stand for them."""
    save_adapter(adapted(), tmp_path / "a")
    model = tiny()
    load_adapter(model, edited(tmp_path / "a", target_modules=pattern))
    assert paths(model) == paths(adapted())
    path = "model.layers.10.self_attn.q_proj"
    assert not meant(pattern, path, {"up_proj"}) and meant(pattern, path, {"q_proj"})


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(self_attn|mlp)\.(q_proj|k_proj)",
        r"model\.layers\.[0-9]+\.self_attn.*",
        "(?:q_proj|up_proj)",
        ".*attn.*",
        "(?:q_proj|up_proj|".ljust(199, "k") + ")",  # no longer one is tried
        r"layers\.\d\d?\.self",
    ],
)
def test_plain_patterns_are_tried_as_regular_expressions(pattern: str):
    for path in ("model.layers.10.self_attn.q_proj", "model.layers.1.mlp.up_proj", "q_proj"):
        assert meant(pattern, path, set()) == (re.fullmatch(pattern, path) is not None)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"peft_type": "LOHA"},
        {"peft_type": None},
        {"layer_replication": [[0, 2]]},
        {"trainable_token_indices": [3]},
        {"target_parameters": "experts"},
        {"r": 0},
        {"r": "3"},
        {"lora_alpha": True},
        {"lora_dropout": "much"},
        {"lora_dropout": 1.5},
        {"rank_pattern": ["q_proj"]},
        {"rank_pattern": {"q_proj": "3"}},
        {"rank_pattern": {"(": 3}},
        {"rank_pattern": {"(a+)+b": 3}},
        *({key: {pattern: 3}} for key in ("rank_pattern", "alpha_pattern") for pattern in ENDLESS),
        {"alpha_pattern": {"q_proj": "7"}},
        {"alpha_pattern": {"q_proj": -1}},
    ],
    ids=json.dumps,
)
def test_a_config_that_is_not_plain_lora_is_refused_by_name(tmp_path: Path, changes: dict[str, Any]):
    save_adapter(adapted(), tmp_path / "a")
    model = tiny()
    with pytest.raises(ModelError, match=next(iter(changes))):
        load_adapter(model, edited(tmp_path / "a", **changes))
    assert not paths(model)


def test_pickle_is_not_read(tmp_path: Path):
    save_adapter(adapted(), tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickle"):
        load_adapter(tiny(), tmp_path / "a")


def test_a_dora_adapter_has_a_fitting_vector_of_every_linear(tmp_path: Path):
    model = tiny()
    add_lora(model, "o_proj", r=2, kind=DoRALinear)
    randomise(model)
    save_adapter(model, tmp_path / "a")
    again, path = tiny(), tmp_path / "a" / "adapter_model.safetensors"
    load_adapter(again, tmp_path / "a")
    assert torch.equal(model.logits(IDS), again.logits(IDS))
    file = SafetensorsFile(path)
    tensors = {key: file.tensor(key).clone() for key in file.entries}
    first, *others = [key for key in tensors if "magnitude" in key]
    without = {key: t for key, t in tensors.items() if key != first}
    for told, changed in (
        ("the magnitudes of .* are", tensors | {first: torch.ones(1)}),
        ("has not all of a DoRA adapter", without),
        ("says use_dora, and", {key: t for key, t in without.items() if key not in others}),
    ):
        path.unlink()
        write_tensors(path, changed)
        with pytest.raises(ModelError, match=told):
            load_adapter(tiny(), tmp_path / "a")


@pytest.mark.parametrize("half", ["A", "B"])
def test_half_an_adapter_is_refused(tmp_path: Path, half: str):
    folder = peft_folder(tmp_path / "a", {Q0: 4})
    file = SafetensorsFile(folder / "adapter_model.safetensors")
    key = f"{PREFIX}{Q0}.lora_{half}.weight"
    kept = {key: file.tensor(key).clone()}
    (folder / "adapter_model.safetensors").unlink()
    write_tensors(folder / "adapter_model.safetensors", kept)
    with pytest.raises(ModelError, match=f"lora_{'B' if half == 'A' else 'A'} is missing"):
        load_adapter(tiny(), folder)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors", None])
def test_a_folder_that_is_none(tmp_path: Path, missing: str | None):
    save_adapter(adapted(), tmp_path / "a")
    if missing:
        (tmp_path / "a" / missing).unlink()
    with pytest.raises(ModelError, match=missing or "not a folder"):
        load_adapter(tiny(), tmp_path / ("a" if missing else "b"))


# checkpoint and back


@families
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_loads_bit_for_bit(tmp_path: Path, family: str, tied: bool):
    folder = tiny_folder(tmp_path / "base", family, tie_word_embeddings=tied)
    model, truth = load_model(folder), tiny(family, tie_word_embeddings=tied)
    assert dict(model.named_parameters()).keys() == dict(truth.named_parameters()).keys()
    assert torch.equal(model.logits(IDS), truth.logits(IDS))
    assert json.loads((folder / "config.json").read_text()) == config_json(family, tie_word_embeddings=tied)


def test_shards_are_read_back(tmp_path: Path):
    folder = tiny_folder(tmp_path / "base")
    model = load_model(folder)
    save_model(model, tmp_path / "shards", folder, shard_bytes=4000)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 3
    assert torch.equal(load_model(tmp_path / "shards").logits(IDS), model.logits(IDS))


def test_groups_and_names_may_be_given_together():
    model = tiny("qwen3")
    both = chosen(list(linears(model)), "attention,mlp")
    assert both == chosen(list(linears(model)), "all-linear") == chosen(list(linears(model)), ["all-linear"])
    assert set(chosen(list(linears(model)), ["attention", "up_proj"])) == {
        p for p in both if "self_attn" in p or "up_proj" in p
    }
    for wrong in ([], ["q_proj", "attention", "nothing"]):
        with pytest.raises(UsageError):
            chosen(list(linears(model)), wrong)
    with pytest.raises(UsageError, match="lora_r is 0"):
        add_lora(model, r=0)


def test_new_adapters_drop_by_masks_of_their_own():
    model = tiny("qwen3")
    add_lora(model, r=2, dropout=0.5)
    keys = [wrapper.keys.of(wrapper.number) for _, wrapper in adapters(model)]
    assert len(set(keys)) == len(keys)


def test_a_trained_linear_of_another_dtype_is_cast():
    linear = Linear(8, 4).to(torch.bfloat16)
    x = torch.randn(3, 8, requires_grad=True)
    y = linear(x)
    y.sum().backward()
    assert y.dtype == torch.float32 and torch.equal(
        y, torch.nn.functional.linear(x, linear.weight.float(), linear.bias.float())
    )
    assert linear.weight.grad is not None and linear.weight.grad.dtype == torch.bfloat16
