"""A model by its name on a hub, in caches laid out as huggingface_hub and modelscope lay them; and a run in place of its adapter."""

import shutil
from pathlib import Path

import pytest
import torch
from oracle import IDS
from tiny import make_model, make_rows

from minilora import add_lora, load_adapter, load_model, load_tokenizer, save_adapter
from minilora.__main__ import main
from minilora.checkpoint.adapter import base_note
from minilora.errors import ModelError
from minilora.files.hub_cache import cached
from minilora.files.model_folder import ModelFolder

NAME, COMMIT = "Org/Tiny-0.5B", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
    monkeypatch.chdir(tmp_path)


def hugging_face(hub: Path) -> Path:
    """The folder models--Org--Tiny-0.5B of a cache: blobs, a snapshot of links into them, a reference."""
    root = hub / "models--Org--Tiny-0.5B"
    make_model(root / "files")
    snapshot = root / "snapshots" / COMMIT
    for folder in (snapshot, root / "blobs", root / "refs"):
        folder.mkdir(parents=True)
    for number, file in enumerate(sorted((root / "files").iterdir())):
        file.rename(root / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    (root / "files").rmdir()
    (root / "refs" / "main").write_text(COMMIT)
    return root


def test_a_name_is_found_in_the_hugging_face_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = hugging_face(tmp_path / "hub")
    folder = ModelFolder(NAME)
    assert (folder.path, folder.name) == (root / "snapshots" / COMMIT, "Tiny-0.5B")
    plain = load_model(root / "snapshots" / COMMIT, device="cpu").logits(IDS)
    assert torch.equal(load_model(NAME, device="cpu").logits(IDS), plain)
    assert load_tokenizer(NAME).encode("a")
    rows = make_rows(tmp_path / "rows.json")
    for command in ("plan", "inspect data", "eval"):
        assert main([*command.split(), "--model", NAME, "--data", str(rows)]) == 0
    assert main(["inspect", "model", NAME]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("variable", "place"),
    [("HF_HOME", "h/hub"), ("XDG_CACHE_HOME", "h/huggingface/hub"), ("HOME", "h/.cache/huggingface/hub")],
)
def test_the_hugging_face_cache_is_where_its_variables_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, place: str
):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "h"))
    root = hugging_face(tmp_path / place)
    assert cached(NAME) == root / "snapshots" / COMMIT


@pytest.mark.parametrize(
    "place",
    [
        "models/Org--Tiny-0.5B/snapshots/master",
        "models/Org/Tiny-0___5B",
        "hub/models/Org/Tiny-0___5B",
        "hub/Org/Tiny-0___5B",
        "Org/Tiny-0.5B",
    ],
)
def test_a_name_is_found_in_the_modelscope_cache_of_every_age(tmp_path: Path, place: str):
    make_model(tmp_path / "modelscope" / place)
    assert cached(NAME) == tmp_path / "modelscope" / place
    load_model(NAME, device="cpu")


def test_a_folder_of_that_path_goes_before_the_cache(tmp_path: Path):
    hugging_face(tmp_path / "hub")
    make_model(tmp_path / NAME)
    assert cached(NAME) == Path(NAME)


def test_what_no_cache_has_is_told_with_the_commands_that_fetch_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["chat", "--model", NAME]) == 4
    told = capsys.readouterr().err
    assert (
        f"hf download {NAME}" in told
        and f"modelscope download --model {NAME}" in told
        and str(tmp_path / "hub") in told
    )
    (tmp_path / "models").mkdir()
    for path in ("no-name-of-a-hub", "models/mistyped"):
        assert main(["chat", "--model", path]) == 4 and "hf download" not in capsys.readouterr().err


@pytest.mark.parametrize("target", ["/etc/passwd", "../../../outside.json", "../../../../up"])
def test_a_link_out_of_the_cache_is_refused(tmp_path: Path, target: str):
    root = hugging_face(tmp_path / "hub")
    (tmp_path / "hub" / "outside.json").write_text("{}")
    (root / "snapshots" / COMMIT / "added_tokens.json").symlink_to(target)
    with pytest.raises(ModelError, match="link out of the cache"):
        load_model(NAME, device="cpu")


def test_a_reference_that_is_no_commit_leads_nowhere(tmp_path: Path):
    root = hugging_face(tmp_path / "hub")
    (root / "refs" / "main").write_text("../../elsewhere")
    with pytest.raises(ModelError, match="is not a folder"):
        load_model(NAME, device="cpu")


def test_a_run_stands_for_what_it_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """In the API and in every command that takes an adapter."""
    hugging_face(tmp_path / "hub")
    run = tmp_path / "run"
    model = load_model(NAME, device="cpu")
    add_lora(model, r=2)
    save_adapter(model, run / "adapter", NAME)
    (run / "config.yaml").write_text("{}")
    for adapter in (run, run / "adapter"):
        load_adapter(load_model(NAME, device="cpu"), adapter)
        load_tokenizer(NAME, adapter)
    rows = str(make_rows(tmp_path / "rows.json"))
    both = ["--model", NAME, "--adapter", str(run)]
    for command in (["eval", *both, "--data", rows], ["export", *both, "--for", "peft", "--output", str(tmp_path / "peft")],
                    ["merge", *both, "--output", str(tmp_path / "merged")], ["inspect", "adapter", str(run)],
                    ["chat", *both, "--prompt", "a", "--max-tokens", "1"], ["explain", *both, "--data", rows],
                    ["predict", *both, "--data", rows, "--output", str(tmp_path / "p"), "--max-tokens", "1"],
                    ["data", "score", *both, "--data", rows]):  # fmt: skip
        assert main(command) == 0, capsys.readouterr().err
    shutil.copytree(tmp_path / "merged", tmp_path / "full" / "model")
    assert ModelFolder(tmp_path / "full").path == tmp_path / "full" / "model"
    capsys.readouterr()


def test_an_adapter_of_others_that_names_this_model_is_not_called_strange(tmp_path: Path):
    hugging_face(tmp_path / "hub")
    golden = Path(__file__).parents[1] / "golden" / "qwen2" / "adapter"
    shutil.copytree(golden, tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(
        config.read_text().replace('"base_model_name_or_path": null', f'"base_model_name_or_path": "{NAME}"')
    )
    assert base_note(ModelFolder(tmp_path / "a"), ModelFolder(NAME)) is None
    assert base_note(ModelFolder(tmp_path / "a"), ModelFolder(make_model(tmp_path / "other"))) is not None
