"""`minilora convert`: pickle weights become the same tensors as safetensors, and hostile pickles become nothing."""

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_model

import minilora
from minilora.__main__ import main
from minilora.checkpoint import convert, unpickle
from minilora.checkpoint.convert import BIN, BIN_INDEX
from minilora.checkpoint.unpickle import rewrite
from minilora.files.tensors import INDEX


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model folder whose weights are one pickle."""
    folder = make_model(tmp_path / "m", torch.float16)
    torch.save(load_file(folder / "model.safetensors"), folder / BIN)
    (folder / "model.safetensors").unlink()
    (folder / "modeling_own.py").write_text("1 / 0")
    return folder


def test_one_file(folder, tmp_path, capsys):
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 0
    assert "24 tensors" in capsys.readouterr().out
    before, after = torch.load(folder / BIN), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in before)
    assert (tmp_path / "out" / "modeling_own.py").read_text() == "1 / 0" and (
        tmp_path / "out" / "tokenizer.json"
    ).exists()
    assert minilora.load_model(tmp_path / "out", device="cpu").head.dtype == torch.float16


def test_shards_and_the_format_before_zip(folder, tmp_path, capsys):
    tensors = torch.load(folder / BIN)
    (folder / BIN).unlink()
    names = sorted(tensors)
    parts = {"a.bin": names[:9], "b.bin": names[9:]}
    for shard, members in parts.items():
        part = {n: tensors[n] for n in members}
        torch.save(part, folder / shard, _use_new_zipfile_serialization=shard == "b.bin")
    places = {n: shard for shard, members in parts.items() for n in members}
    (folder / BIN_INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 0
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    model = minilora.load_model(tmp_path / "out", device="cpu")
    assert all(torch.equal(p, tensors[n]) for n, p in model.named_parameters())
    capsys.readouterr()
    # an index of another checkpoint
    (folder / BIN_INDEX).write_text(json.dumps({"weight_map": places | {"model.other": "a.bin"}}))
    assert main(["convert", str(folder), str(tmp_path / "two")]) == 4
    assert "'model.other'" in capsys.readouterr().err and not (tmp_path / "two").exists()


def views(path: Path) -> None:
    """Tensors of one storage, and one that is not contiguous."""
    whole = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": whole[0], "b": whole.T, "c": whole}, path)


def test_views_are_written_as_what_they_show(tmp_path):
    views(tmp_path / "x.bin")
    assert rewrite(tmp_path / "x.bin", tmp_path / "x.safetensors") is None
    found, whole = load_file(tmp_path / "x.safetensors"), torch.arange(12.0).reshape(3, 4)
    assert torch.equal(found["b"], whole.T) and torch.equal(found["a"], whole[0]) and torch.equal(found["c"], whole)


# hostile pickles. Each would write a file named canary if what it asks for were done


class Call:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def zipped(path: Path, content: bytes, compress: int = zipfile.ZIP_STORED, storage: bytes = b"") -> None:
    """An archive as torch.save writes it, with a pickle of our own."""
    with zipfile.ZipFile(path, "w", compress) as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/byteorder", "little")
        file.writestr("archive/version", "3\n")
        file.writestr("archive/data/0", storage)


def runs_a_command(path: Path) -> None:
    zipped(path, pickle.dumps({"a": Call(os.system, "touch canary")}, 2))


def bare_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Call(os.system, "touch canary")))


def deletes_a_file(path: Path) -> None:
    torch.save({"a": torch.zeros(2), "b": Call(Path.touch, Path("canary"))}, path)


def whole_module(path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), path)


def no_tensor(path: Path) -> None:
    torch.save({"a": torch.zeros(2), "epoch": 3}, path)


def no_names(path: Path) -> None:
    torch.save([torch.zeros(2)], path)


def sparse(path: Path) -> None:
    torch.save({"a": torch.zeros(2, 2).to_sparse()}, path)


def huge_view(path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(1 << 42)}, path)


def larger_view(path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(1 << 26)}, path)


def cut_short(path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-900])


def a_name_with_a_newline(path: Path) -> None:
    torch.save({"a\nb": torch.zeros(2)}, path)


def not_a_pickle(path: Path) -> None:
    path.write_bytes(b"\x00" * 1000)


def lying_storage(path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(1000)}, buffer)
    with zipfile.ZipFile(buffer) as file:
        content = file.read(next(n for n in file.namelist() if n.endswith("data.pkl")))
    assert struct.pack("<H", 1000) in content
    zipped(path, content.replace(struct.pack("<H", 1000), struct.pack("<H", 60000)), storage=b"\0" * 4000)


def many_names_of_one_storage(path: Path) -> None:
    whole = torch.zeros(1 << 20)
    torch.save({f"t{i}": whole for i in range(60)}, path)


HOSTILE = [
    larger_view, many_names_of_one_storage, runs_a_command, bare_pickle, deletes_a_file, whole_module, no_tensor, no_names, sparse, huge_view, cut_short,
    a_name_with_a_newline, not_a_pickle, lying_storage,
]  # fmt: skip


@pytest.mark.parametrize("spoil", HOSTILE, ids=lambda f: f.__name__)
def test_hostile_pickles(tmp_path, monkeypatch, spoil):
    monkeypatch.chdir(tmp_path)
    spoil(tmp_path / "x.bin")
    wrong = rewrite(tmp_path / "x.bin", tmp_path / "x.safetensors")
    assert wrong and "\n" not in wrong
    assert not (tmp_path / "canary").exists()


def test_a_view_that_is_larger_than_its_storage_is_never_written_out(tmp_path, monkeypatch):
    """Nor read: what it would need is known before."""
    monkeypatch.setattr(unpickle, "most_written", lambda size: 1 << 62)
    for spoil in (larger_view, huge_view):
        spoil(tmp_path / "x.bin")
        assert "bytes, 4 are there" in str(rewrite(tmp_path / "x.bin", tmp_path / "x.safetensors"))
        assert not (tmp_path / "x.safetensors").exists()


@pytest.fixture
def in_this_process(monkeypatch):
    """A child would import torch again."""
    monkeypatch.setattr(convert, "_unpickle", rewrite)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("index", [False, True])
def test_an_index_that_lists_more_and_a_shard_that_lies_elsewhere(folder, tmp_path, capsys, index):
    tensors = torch.load(folder / BIN)
    places = dict.fromkeys(tensors, BIN) | ({"model.other": BIN} if index else {})
    (folder / BIN_INDEX).write_text(json.dumps({"weight_map": places}))
    if not index:
        (folder / BIN).rename(tmp_path / "secret.bin")
        (folder / BIN).symlink_to(tmp_path / "secret.bin")
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 4
    assert ("'model.other'" if index else "out of the folder") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("in_this_process")
def test_a_link_does_not_make_a_strangers_file_public(folder, tmp_path):
    """A license that links to another file is not copied with the model."""
    (tmp_path / "key").write_text("secret")
    (folder / "LICENSE").symlink_to(tmp_path / "key")
    (folder / "MODEL_LICENSE").write_text("free")
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 0
    (tmp_path / "adapter").mkdir()
    torch.save({"a": torch.ones(1)}, tmp_path / "adapter" / "adapter_model.bin")
    (tmp_path / "adapter" / "adapter_config.json").symlink_to(tmp_path / "key")
    assert main(["convert", str(tmp_path / "adapter"), str(tmp_path / "published")]) == 4
    assert not (tmp_path / "published").exists()
    assert not (tmp_path / "out" / "LICENSE").exists() and (tmp_path / "out" / "MODEL_LICENSE").read_text() == "free"


@pytest.mark.parametrize("spoil", [runs_a_command, larger_view], ids=lambda f: f.__name__)
def test_a_hostile_pickle_leaves_nothing(folder, tmp_path, monkeypatch, capsys, spoil):
    monkeypatch.chdir(tmp_path)
    spoil(folder / BIN)
    assert main(["convert", str(folder), "out"]) == 4
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 2 and error[0].startswith(f"error: {folder / BIN}: ")
    assert {p.name for p in tmp_path.iterdir()} == {"m"}


def test_a_small_pickle_gets_little_memory(folder, tmp_path, capsys):
    """What weights_only allows can be of any size."""
    torch.save({"a": torch.zeros(2), "b": Call(bytearray, 2 << 30)}, folder / "pytorch_model.bin")
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 4
    assert "it asks for more memory than a file of its size" in capsys.readouterr().err


def test_the_canary_sings():
    """The same bytes do harm to a reader that trusts them."""
    assert Call(len, "abc").__reduce__() == (len, ("abc",))
    assert pickle.loads(pickle.dumps({"a": Call(len, "abc")}, 2)) == {"a": 3}


def test_what_is_no_pickle_folder(folder, tmp_path, capsys):
    def told(*arguments) -> tuple[int, str]:
        code = main(["convert", *map(str, arguments)])
        return code, capsys.readouterr().err

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    assert told(folder, tmp_path / "full")[0] == 8
    (folder / BIN_INDEX).write_text(json.dumps({"weight_map": {"a": "../x.bin"}}))
    assert "'../x.bin'" in told(folder, tmp_path / "out")[1]
    (folder / BIN_INDEX).write_text(json.dumps({"weight_map": {"a": "x.bin"}}))
    assert "x.bin missing" in told(folder, tmp_path / "out")[1]
    config = folder / "config.json"
    config.write_text(config.read_text().replace("{", '{"quantization_bit": 4, ', 1))
    code, error = told(folder, tmp_path / "out")
    assert code == 4 and "quantised" in error
    assert told(make_model(tmp_path / "safe"), tmp_path / "out")[0] == 2
    assert not (tmp_path / "out").exists()


def test_pickle_stays_refused_and_the_command_is_named(folder, capsys):
    assert main(["inspect", "model", str(folder)]) == 4
    assert f"minilora convert {folder} OUT" in capsys.readouterr().out
