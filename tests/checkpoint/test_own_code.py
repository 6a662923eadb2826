"""The Python files of a remote-code folder travel with what is made of it, as data: they are never run, and no link leads out."""

import json
from pathlib import Path

import pytest
from tiny import make_model

import minilora
from minilora.checkpoint import save
from minilora.checkpoint.save import copy_companions, own_code
from minilora.errors import ModelError, OutputInUse
from minilora.text.tokenizer import load_tokenizer

CODE = "raise SystemExit('this was run')\n"


def test_the_folders_own_code_travels_with_a_saved_model_and_is_not_run(tmp_path: Path):
    folder = make_model(tmp_path / "m")
    (folder / "modeling_chatglm.py").write_text(CODE)
    for _ in range(2):  # the second time in the place of the first
        minilora.save_model(minilora.load_model(folder), tmp_path / "out", folder)
    minilora.load_tokenizer(tmp_path / "out")
    assert (tmp_path / "out" / "modeling_chatglm.py").read_text() == CODE
    (tmp_path / "out" / "mine.py").write_text(CODE)
    with pytest.raises(OutputInUse, match=r"mine\.py"):
        minilora.save_model(minilora.load_model(folder), tmp_path / "out", folder)


def test_only_files_of_the_folder_itself_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Beside those that are read anyway: a tokenizer may be a link to one of its name, and to nothing else."""
    monkeypatch.setattr(save, "MAX_JSON", len(CODE))
    folder, out = tmp_path / "m", tmp_path / "out"
    (folder / "inner").mkdir(parents=True)
    out.mkdir()
    (tmp_path / "secret").write_text("secret")
    (folder / "plain.py").write_text(CODE)
    (folder / "inner" / "deep.py").write_text(CODE)
    (folder / "folder.py").mkdir()
    (folder / "out.py").symlink_to(tmp_path / "secret")
    (folder / "dangling.py").symlink_to(tmp_path / "nothing")
    (folder / "within.py").symlink_to("plain.py")
    (folder / "large.py").write_text(CODE + "\n")
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    (tmp_path / "tokenizer.json").write_text(CODE)
    (folder / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    copy_companions(folder, out)
    assert sorted(p.name for p in out.iterdir()) == ["plain.py", "tokenizer.json", "within.py"]
    assert all(p.read_text() == CODE and not p.is_symlink() for p in out.iterdir())
    (folder / "merges.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="is a link to"):
        copy_companions(folder, out)


def test_the_links_of_a_hugging_face_cache_are_followed(tmp_path: Path):
    cache = tmp_path / "models--THUDM--chatglm2-6b"
    folder = cache / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "blobs" / "123").write_text(CODE)
    (folder / "modeling_chatglm.py").symlink_to("../../blobs/123")
    assert own_code(folder) == ["modeling_chatglm.py"]


def test_what_is_copied_is_no_link_to_a_file_of_another_name(tmp_path: Path):
    """A key that a folder of strangers points at as its merges.txt would be published with the merged model."""
    folder, other, out = make_model(tmp_path / "m"), make_model(tmp_path / "other"), tmp_path / "out"
    out.mkdir()
    (tmp_path / "key").write_text("secret")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(other / "tokenizer.json")  # a variant of another folder
    copy_companions(folder, out)
    assert (out / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()
    for name in ("merges.txt", "special_tokens_map.json"):
        (folder / name).symlink_to(tmp_path / "key")
        with pytest.raises(ModelError, match=f"{name} is a link to"):
            copy_companions(folder, out)
        (folder / name).unlink()
    (other / "special_tokens_map.json").symlink_to(tmp_path / "key")
    own = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(own).replace("<|endoftext|>", "<|end|>"))
    with pytest.raises(ModelError, match="is a link to"):
        load_tokenizer(make_model(tmp_path / "base"), other)
