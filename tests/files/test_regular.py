"""Every command refuses what is not a regular file, before a byte of it is read."""

import os
import shutil
import signal
import stat
from pathlib import Path

import pytest
from tiny import make_model, make_rows

from minilora.__main__ import main
from minilora.errors import DataError
from minilora.files.atomic import locked, write_file
from minilora.files.regular import open_file, read_file

KINDS = ("pipe", "device", "socket", "loop", "nothing", "folder")


@pytest.fixture(autouse=True)
def no_waiting():
    """A pipe that is opened after all fails the test instead of waiting for ever."""

    def waited(*_):
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, waited)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def make(path: Path, kind: str) -> Path:
    """Put something that is no regular file in the place of a path."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "loop": path.name, "nothing": "not-there"}[kind])
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_are_opened(tmp_path, kind):
    path = make(tmp_path / "file", kind)
    with pytest.raises(FileNotFoundError if kind == "nothing" else DataError) as caught:
        read_file(path, DataError)
    assert str(path) in str(caught.value)


def test_a_file_is_read_up_to_a_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    (tmp_path / "link").symlink_to(path)
    assert read_file(tmp_path / "link", DataError, 5) == b"12345"
    with pytest.raises(DataError, match="larger"):
        open_file(path, DataError, 4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A model, an adapter-like folder and a run-like folder, with the small files that commands look into first."""
    folder = tmp_path_factory.mktemp("folders")
    make_model(folder / "model")
    make_rows(folder / "rows.json")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text("lora_r: 4\n")
    (folder / "run" / "metrics.jsonl").write_text("")
    return folder


MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
               "model.safetensors", "model.safetensors.index.json", "added_tokens.json", "merges.txt", "tokenizer.model")  # fmt: skip
PLACES = [
    *((4, f"model/{name}", "inspect model model") for name in MODEL_FILES),
    (4, "model/pytorch_model.bin", "convert model out"),
    (4, "adapter/adapter_config.json", "chat --model model --adapter adapter"),
    (4, "adapter/tokenizer.json", "chat --model model --adapter adapter"),
    (3, "rows.jsonl", "inspect data --model model --data rows.jsonl"),
    (3, "rows.csv", "train --model model --data rows.csv --output out"),
    (2, "settings.yaml", "train -c settings.yaml"),
    (3, "run/metrics.jsonl", "report run"),
    (3, "run/data.json", "report run"),
]


@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "loop"])
def test_every_command_refuses_them(tmp_path, folders, kind, capsys, monkeypatch):
    """With the code of what the file was to be; of a run's record some are left out where they are not there."""
    for code, place, words in PLACES:
        here = shutil.copytree(folders, tmp_path / place.replace("/", "-"))
        monkeypatch.chdir(here)
        make(here / place, kind)
        found = main(words.split())
        told = capsys.readouterr()
        left_out = place == "run/metrics.jsonl" and kind == "loop" or place == "run/data.json"
        assert found == code or (left_out and found == 0), (place, kind, found, told.err)
        assert "Traceback" not in told.err


def test_nothing_is_written_through_a_link_that_lies_in_a_folder(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".tmp-metrics.jsonl").symlink_to(mine)
    write_file(tmp_path / "run" / "metrics.jsonl", "new")
    make(tmp_path / "run" / ".lock", "pipe")
    with pytest.raises(Exception, match="not a regular file"), locked(tmp_path / "run"):
        pass
    (tmp_path / "run" / ".lock").unlink()
    (tmp_path / "run" / ".lock").symlink_to(mine)
    with pytest.raises(Exception, match="not a regular file"), locked(tmp_path / "run"):
        pass
    assert mine.read_text() == "mine" and (tmp_path / "run" / "metrics.jsonl").read_text() == "new"


@pytest.mark.parametrize("path", ["loop", "x" * 300, "rows.json/x", "rows.json"])
def test_a_path_that_nothing_can_have_is_no_fault_of_the_disk(tmp_path, folders, monkeypatch, capsys, path):
    """A link to itself, a name that is too long, a file in the place of a folder."""
    monkeypatch.chdir(shutil.copytree(folders, tmp_path / "here"))
    make(Path("loop"), "loop")
    for words in (
        "chat --prompt x --model PATH", "chat --prompt x --model model --adapter PATH", "inspect model PATH", "convert PATH out", "convert model PATH",
        "train --model model --data PATH/x --output out", "train --model model --data rows.json --output PATH", "train -c PATH", "report PATH",
        "predict --model model --data rows.json --output PATH", "compare run PATH", "sweep PATH --output out", "data split --data rows.json --val 1 --output PATH",
        "export --model model --for gguf --output PATH", "plan --model PATH",
    ):  # fmt: skip
        code = main(words.replace("PATH", path).split())
        told = capsys.readouterr().err
        assert code in (0, 2, 3, 4, 8) and "Traceback" not in told, (words, code, told[-1500:])
