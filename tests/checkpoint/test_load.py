"""Checkpoint folders: shards, mismatches, the spellings of config.json, hostile folders, and writing that fails."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from minilora.checkpoint.load import MOST, MOST_EXPERTS, _of_some_size, load_model, read_config
from minilora.checkpoint.save import save_model, write_checkpoint
from minilora.errors import ModelError, UsageError
from minilora.files.atomic import atomic_folder
from minilora.files.safetensors import SafetensorsFile, write_tensors
from minilora.files.tensors import INDEX, Tensors

GOLDEN = Path(__file__).parents[1] / "golden"
GONE = object()
EMBEDDING = "model.embed_tokens.weight"


def weights_of(name: str = "qwen3") -> dict[str, torch.Tensor]:
    file = SafetensorsFile(GOLDEN / name / "model.safetensors")
    return {n: file.tensor(n).clone() for n in file.entries}


def make(folder: Path, weights: dict[str, torch.Tensor], name: str = "qwen3", **changes) -> Path:
    """A folder of golden config.json with changes (GONE: without the key) and these weights."""
    folder.mkdir(parents=True)
    write_config(folder, name, **changes)
    write_tensors(folder / "model.safetensors", weights)
    return folder


def write_config(folder: Path, name: str = "qwen3", **changes) -> None:
    j = json.loads((GOLDEN / name / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in j.items() if v is not GONE}))


def make_shards(folder: Path, count: int = 3) -> Path:
    """The golden qwen3 in `count` shards with an index."""
    folder.mkdir()
    write_config(folder)
    weights, places = weights_of(), {}
    for i in range(count):
        part = {n: w for k, (n, w) in enumerate(weights.items()) if k % count == i}
        write_tensors(folder / f"s{i}.safetensors", part)
        places |= dict.fromkeys(part, f"s{i}.safetensors")
    write_index(folder, places)
    return folder


def write_index(folder: Path, places) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))


def places_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    left, right = dict(a.named_parameters()), dict(b.named_parameters())
    return left.keys() == right.keys() and all(
        torch.equal(left[n], right[n]) and left[n].dtype == right[n].dtype for n in left
    )


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        load_model(folder, device="cpu")
    return str(error.value)


def test_shards_are_read(tmp_path):
    assert equal(load_model(make_shards(tmp_path / "m")), load_model(GOLDEN / "qwen3"))


def test_all_missing_shards_are_named(tmp_path):
    folder = make_shards(tmp_path / "m")
    (folder / "s0.safetensors").unlink()
    (folder / "s2.safetensors").unlink()
    assert "s0.safetensors, s2.safetensors missing (2 of 3 shards)" in refusal(folder)


@pytest.mark.parametrize("shard", [
    "../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.bin", "", "..", "x.safetensors/", "a\0.safetensors",
    "\x1b[2J.safetensors", "x" * 300 + ".safetensors", "\ud800.safetensors",
])  # fmt: skip
def test_a_shard_outside_the_folder_is_refused(tmp_path, shard):
    folder = make_shards(tmp_path / "m")
    write_tensors(tmp_path / "x.safetensors", weights_of())
    write_index(folder, dict.fromkeys(weights_of(), shard))
    message = refusal(folder)
    assert "is not a file name in this folder" in message and "\x1b" not in message


@pytest.mark.parametrize("places", [{}, [], None, {"a": 1}, {"a": None}, "x"])
def test_a_broken_index(tmp_path, places):
    folder = make_shards(tmp_path / "m")
    write_index(folder, places)
    assert "weight_map is missing or empty" in refusal(folder)


def test_a_tensor_in_two_shards(tmp_path):
    folder = make_shards(tmp_path / "m")
    places = places_of(folder)
    name = next(n for n, p in places.items() if p == "s0.safetensors")
    (folder / "s1.safetensors").unlink()
    part = {n: w for n, w in weights_of().items() if places[n] == "s1.safetensors" or n == name}
    write_tensors(folder / "s1.safetensors", part)
    message = refusal(folder)
    assert name in message and "s1.safetensors" in message


def test_index_and_shard_disagree(tmp_path):
    folder = make_shards(tmp_path / "m")
    write_index(folder, places_of(folder) | {"model.norm.weight": "s0.safetensors", "extra": "s0.safetensors"})
    message = refusal(folder)
    assert "s0.safetensors: extra" in message and "not where the index says" in message


def test_a_shard_may_be_a_link_into_a_cache(tmp_path):
    folder = make_shards(tmp_path / "m")
    (folder / "s0.safetensors").rename(tmp_path / "blob")
    (folder / "s0.safetensors").symlink_to(tmp_path / "blob")
    assert equal(load_model(folder), load_model(GOLDEN / "qwen3"))


def test_every_mismatch_stands_in_one_message(tmp_path):
    weights = weights_of()
    del (
        weights["model.norm.weight"],
        weights["model.layers.0.self_attn.q_proj.weight"],
        weights["model.layers.1.self_attn.q_proj.weight"],
    )
    weights |= {
        "model.layers.0.surprise": torch.ones(1),
        EMBEDDING: torch.ones(127, 64),
        "model.layers.7.mlp.up_proj.weight": torch.ones(2),
    }
    weights["model.layers.1.input_layernorm.weight"] = torch.ones(64, dtype=torch.int32)
    message = refusal(make(tmp_path / "m", weights))
    for part in (
        "model.norm.weight",
        "model.layers.*.self_attn.q_proj.weight (2 tensors)",
        "unexpected: model.layers.0.surprise",
        "model.layers.7.mlp.up_proj.weight",
        f"{EMBEDDING} is [127, 64], config.json makes it [128, 64]",
        "model.layers.1.input_layernorm.weight is torch.int32",
    ):
        assert part in message


def test_old_rotary_buffers_are_ignored(tmp_path):
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(16) for i in range(2)}
    assert equal(load_model(make(tmp_path / "m", weights_of() | extra)), load_model(GOLDEN / "qwen3"))


def test_a_layer_behind_the_last_is_ignored_where_glm_has_one(tmp_path):
    """That of the tokens after the next."""
    weights, layers = weights_of("glm4_moe"), read_config(GOLDEN / "glm4_moe").layers
    weights |= {f"model.layers.{layers}.eh_proj.weight": torch.ones(2)}
    assert equal(load_model(make(tmp_path / "a", weights, "glm4_moe")), load_model(GOLDEN / "glm4_moe"))
    weights |= {f"model.layers.{layers - 1}.eh_proj.weight": torch.ones(2)}
    assert f"unexpected: model.layers.{layers - 1}.eh_proj" in refusal(make(tmp_path / "b", weights, "glm4_moe"))
    more = weights_of() | {"model.layers.2.eh_proj.weight": torch.ones(2)}
    assert "unexpected: model.layers.2.eh_proj" in refusal(make(tmp_path / "c", more))


def test_a_tied_head_that_is_there_and_equal(tmp_path):
    weights = weights_of()
    assert "lm_head.weight" not in weights
    model = load_model(make(tmp_path / "m", weights | {"lm_head.weight": weights[EMBEDDING].clone()}))
    assert equal(model, load_model(GOLDEN / "qwen3"))


@pytest.mark.parametrize(
    "change", [lambda w: w + 1, lambda w: w[:-1], lambda w: w.double()], ids=["values", "shape", "dtype"]
)
def test_a_tied_head_that_differs(tmp_path, change):
    weights = weights_of()
    folder = make(tmp_path / "m", weights | {"lm_head.weight": change(weights[EMBEDDING])})
    assert "lm_head.weight differs from the embedding" in refusal(folder)


def test_an_untied_head_must_be_there(tmp_path):
    assert "missing: lm_head.weight" in refusal(make(tmp_path / "m", weights_of(), tie_word_embeddings=False))


OLD = {  # golden folder -> what transformers 4 wrote instead of what 5 writes
    "qwen2": {"dtype": GONE, "rope_parameters": GONE, "layer_types": GONE, "torch_dtype": "float32", "rope_theta": 1000000.0},
    "qwen3": {"dtype": GONE, "rope_parameters": GONE, "layer_types": GONE, "torch_dtype": "float32", "rope_theta": 1000000.0,
              "rope_scaling": None},
    "qwen2_sliding": {"dtype": GONE, "rope_parameters": GONE, "layer_types": GONE, "torch_dtype": "float32"},
    "qwen2_yarn": {"dtype": GONE, "rope_parameters": GONE, "layer_types": GONE, "torch_dtype": "float32"},
}  # fmt: skip


@pytest.mark.parametrize("name", OLD)
def test_both_spellings_of_config_json(tmp_path, name):
    j, old = json.loads((GOLDEN / name / "config.json").read_text()), dict(OLD[name])
    rope = j["rope_parameters"]
    old["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] == "yarn":
        old["rope_scaling"] = {"type": "yarn"} | {k: v for k, v in rope.items() if k not in ("rope_type", "rope_theta")}
    (tmp_path / "old").mkdir()
    write_config(tmp_path / "old", name, **old)
    new = read_config(GOLDEN / name)
    assert read_config(tmp_path / "old") == new
    assert new.rope_theta == rope["rope_theta"] and (new.yarn is not None) == (name == "qwen2_yarn")


BROKEN = {
    "family": ({"model_type": "llama"}, "model_type 'llama' is not supported"),
    "no family": ({"model_type": GONE}, "model_type 'None' is not supported"),
    "family of wrong kind": ({"model_type": ["qwen3"]}, "model_type"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantised"),
    "rope": ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_type is 'llama3'"),
    "rope of wrong kind": ({"rope_parameters": "yarn"}, "rope_parameters"),
    "yarn without factor": ({"rope_parameters": {"rope_type": "yarn"}}, "'factor'"),
    "infinite yarn": ({"rope_parameters": {"rope_type": "yarn", "factor": float("inf")}}, "factor"),
    "missing": ({"hidden_size": GONE}, "'hidden_size' is missing"),
    "null": ({"vocab_size": None}, "'vocab_size' is missing"),
    "text": ({"hidden_size": "64"}, "hidden_size is 64"),
    "float": ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0"),
    "bool": ({"num_attention_heads": True}, "num_attention_heads is True"),
    "zero": ({"intermediate_size": 0}, "intermediate_size is 0"),
    "negative": ({"num_key_value_heads": -2}, "num_key_value_heads is -2"),
    "huge": ({"vocab_size": 2**31}, "vocab_size is 2147483648"),
    "layers without end": ({"num_hidden_layers": 2**31 - 1}, "num_hidden_layers"),
    "sizes that overflow": ({"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 1, "num_attention_heads": 2**31 - 1,
                             "num_key_value_heads": 2**31 - 1, "head_dim": 2**31 - 2}, "hidden_size is 2147483647"),
    "groups": ({"num_key_value_heads": 3}, "not a multiple"),
    "odd head": ({"head_dim": 33}, "head_dim is 33"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is gelu"),
    "bias": ({"attention_bias": True}, "attention_bias"),
    "dtype": ({"dtype": "int8"}, "dtype is 'int8'"),
    "eps": ({"rms_norm_eps": "small"}, "rms_norm_eps is small"),
    "eps not a number": ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    "layer types": ({"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"]}, "layer_types"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "part"), BROKEN.values(), ids=BROKEN)
def test_a_config_that_does_not_work_names_the_key(tmp_path, changes, part):
    message = refusal(make(tmp_path / "m", weights_of(), **changes))
    assert part in message and "config.json" in message


def test_sizes_out_of_all_proportion_together():
    sizes = {"heads": 1, "head_size": 1, "value_heads": 1, "value_size": 1, "layers": 1, "experts": 1}
    for most, one, two in (
        (MOST, "heads", "head_size"),
        (MOST, "value_heads", "value_size"),
        (MOST_EXPERTS, "layers", "experts"),
    ):
        largest: Any = SimpleNamespace(**sizes | {one: most // 4, two: 4})
        assert _of_some_size(largest) is largest
        with pytest.raises(ValueError, match="together"):
            _of_some_size(cast(Any, SimpleNamespace(**sizes | {one: most // 4 + 1, two: 4})))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"a":' * 100_000, b"\xff\xfe{", b'{"model_type": "qwen3"} x']
)
def test_a_broken_config_json(tmp_path, content):
    folder = make(tmp_path / "m", weights_of())
    (folder / "config.json").write_bytes(content)
    assert "config.json" in refusal(folder)


def test_values_of_every_wrong_kind_in_config_json(tmp_path):
    folder = make(tmp_path / "m", weights_of())
    good = json.loads((folder / "config.json").read_text())
    wrong = [
        None,
        True,
        0,
        -1,
        1.5,
        "x",
        "",
        [],
        ["a"],
        {},
        {"a": 1},
        float("inf"),
        10**400,
        2**31 - 1,
        [[1]],
        float("nan"),
    ]
    refused = 0
    for key in [*good, "rope_scaling", "rope_theta", "torch_dtype", "quantization_config", "use_sliding_window"]:
        for value in wrong:
            (folder / "config.json").write_text(json.dumps(good | {key: value}))
            try:
                load_model(folder, device="cpu")
            except ModelError:
                refused += 1
    assert refused > 100


def test_pickle_is_not_read(tmp_path):
    folder = make(tmp_path / "m", weights_of())
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    message = refusal(folder)
    assert "pickle (pytorch_model.bin), which can run code" in message and "minilora convert" in message


def test_folders_that_are_none(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd" / "config.json").mkdir(parents=True)
    assert "is not a folder" in refusal(tmp_path / "absent") and "is not a folder" in refusal(tmp_path / "file")
    assert "config.json is missing" in refusal(tmp_path / "empty")
    assert "config.json is a folder" in refusal(tmp_path / "odd")
    shutil.copy(GOLDEN / "qwen3" / "config.json", tmp_path / "empty")
    assert "no model.safetensors" in refusal(tmp_path / "empty")


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(UsageError, match=device):
        load_model(GOLDEN / "qwen3", device=device)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("shard_bytes", [1 << 40, 100_000, 1])
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_save_and_load(tmp_path, name, shard_bytes):
    model = load_model(GOLDEN / name)
    for p in model.parameters():
        p.data.add_(1)
    save_model(model, tmp_path / "out", GOLDEN / name, shard_bytes)
    assert equal(load_model(tmp_path / "out"), model)
    sizes = [p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")]
    assert (len(sizes) == 1) == (shard_bytes == 1 << 40) and (tmp_path / "out" / INDEX).exists() == (len(sizes) > 1)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_bf16_checkpoint_keeps_its_bits(tmp_path):
    weights = {n: w.bfloat16() for n, w in weights_of().items()}
    folder = make(tmp_path / "m", weights, dtype="bfloat16")
    save_model(load_model(folder), tmp_path / "out", folder)
    assert files_of(tmp_path / "out") == files_of(folder)


def test_a_shard_is_filled_up_to_its_limit(tmp_path):
    shapes = {name: (torch.float32, (n,)) for name, n in zip("abcdef", (2, 2, 1, 5, 4, 9), strict=True)}
    write_checkpoint(tmp_path, shapes, lambda name: torch.ones(shapes[name][1]), GOLDEN / "qwen3", shard_bytes=20)
    index = json.loads((tmp_path / INDEX).read_text())
    assert [file[6:11] for file in index["weight_map"].values()] == [f"{n:05}" for n in (1, 1, 1, 2, 3, 4)]
    assert index["metadata"]["total_size"] == 4 * 23 and len(list(tmp_path.glob("*-of-00004.safetensors"))) == 4


def test_transformers_would_find_the_shards(tmp_path):
    save_model(load_model(GOLDEN / "qwen3"), tmp_path / "out", GOLDEN / "qwen3", 100_000)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    tensors = Tensors(tmp_path / "out")
    assert index["weight_map"].keys() == tensors.shapes.keys()
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in weights_of().values())


def failing(call, number: int):
    """A stand-in for `call` whose call of that number raises OSError."""
    calls = iter(range(1000))

    def stand_in(*args, **kwargs):
        if next(calls) == number:
            raise OSError(28, "No space left on device")
        return call(*args, **kwargs)

    return stand_in


FAILURES = [
    (call, n, old) for old in (False, True) for call, count in (("fsync", 8), ("rename", 1 + old)) for n in range(count)
]


@pytest.mark.parametrize(("call", "number", "old"), FAILURES)
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, call, number, old):
    model, out = load_model(GOLDEN / "qwen3"), tmp_path / "out"
    if old:
        out.mkdir()
        (out / "config.json").write_text("x")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space") as error:
        patch.setattr(os, call, failing(getattr(os, call), number))
        save_model(model, out, GOLDEN / "qwen3", 100_000)
    assert error.value.filename == str(out)
    assert files_of(tmp_path) == ({"out/config.json": b"x"} if old else {})
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if old else [])


def test_a_failing_tensor_leaves_what_was_there(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "out") as stage:
        write_checkpoint(stage, {"w": (torch.float32, (1,))}, lambda name: torch.ones(1) / (1 // 0), GOLDEN / "qwen3")
    assert not list(tmp_path.iterdir())


def test_a_folder_moved_aside_by_a_crash_comes_back(tmp_path):
    (tmp_path / ".trash-out").mkdir()
    (tmp_path / ".trash-out" / "precious").write_text("x")
    (tmp_path / ".tmp-out").mkdir()
    with pytest.raises(KeyError), atomic_folder(tmp_path / "out"):
        raise KeyError
    assert files_of(tmp_path) == {"out/precious": b"x"}
