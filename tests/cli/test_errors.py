"""What goes wrong from the command line: the exit code of DESIGN.md, a few lines on stderr, and nothing half-written."""

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import ROWS, make_model, make_rows

import minilora.train
from minilora.__main__ import COMMANDS, main
from minilora.cli.next_commands import next_commands
from minilora.config import TrainConfig, to_yaml
from minilora.errors import MiniloraError, UsageError
from minilora.files.atomic import verify_manifest
from minilora.files.safetensors import SafetensorsFile, write_tensors
from minilora.files.tensors import INDEX
from minilora.run.snapshot import rotate, snapshots, step_of
from minilora.settings import read_yaml, resolve
from minilora.terminal import shell
from minilora.train import micro_batch

ROOT = Path(__file__).parents[2]
SHORT = [
    "--lora-r",
    "4",
    "--max-steps",
    "4",
    "--save-every",
    "1",
    "--keep-checkpoints",
    "3",
    "--batch-size",
    "4",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return make_rows(tmp_path_factory.mktemp("rows") / "rows.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model, rows) -> Path:
    """A run of four steps with its last three checkpoints."""
    run = tmp_path_factory.mktemp("run") / "run"
    assert main(["train", "--model", str(model), "--data", str(rows), "--output", str(run), *SHORT]) == 0
    return run


@pytest.fixture
def run(tmp_path, finished) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "run", symlinks=True)


@pytest.fixture
def cli(capsys):
    """Run a command line in this process: (exit code, standard output, standard error)."""

    def call(*argv) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(a) for a in argv])
        except SystemExit as end:  # --help
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def check(result: tuple[int, str, str], code: int, *parts: str) -> None:
    """An error as it should be: the code, the parts in it, what and hint and little more, no traceback."""
    found, _, err = result
    assert found == code, err
    err = "\n".join(
        line for line in err.splitlines() if not line.startswith("note: ")
    )  # of flags that tests give again
    assert err.startswith("error: ") != (code == 75) and "Traceback" not in err
    assert 2 <= len(err.splitlines()) <= 8 and len(err) < 2000
    for part in parts:
        assert part in err


def tree(folder: Path) -> dict[str, bytes | str]:
    """Every file and link under a folder, but the lock."""
    paths = [p for p in folder.rglob("*") if p.name != ".lock" and (p.is_symlink() or not p.is_dir())]
    return {str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes() for p in paths}


def intact(run: Path) -> list[int]:
    """The steps of a run's checkpoints, all of which must verify; no leftovers."""
    assert not list(run.rglob(".tmp-*")) and not list(run.rglob(".trash-*"))
    assert all(verify_manifest(folder) is None for folder in snapshots(run / "checkpoints"))
    return sorted(map(step_of, snapshots(run / "checkpoints")))


# what is typed

TYPED = {
    "no command": ([], "COMMAND"),
    "unknown command": (["trian"], "no command 'minilora trian'", "Did you mean train?"),
    "unknown flag": (
        ["train", "--lerning-rate", "1"],
        "unknown argument '--lerning-rate'",
        "Did you mean --learning-rate (--lr here)?",
    ),
    "flag without value": (["train", "--learning-rate"], "expected one argument"),
    "own flag without value": (["train", "--lr"], "--lr"),
    "shortened flag": (["train", "--max-len", "5"], "Did you mean --max-length?"),
    "stray word": (["train", "now"], "unknown argument 'now'"),
    "number in words": (["train", "--lr", "fast"], "lr is 'fast'", "peak learning rate"),
    "nan": (["train", "--lr", "nan"], "lr is 'nan'"),
    "infinite": (["train", "--epochs", "inf"], "epochs is 'inf'"),
    "zero": (["train", "--batch-size", "0"], "batch_size is '0'"),
    "half": (["train", "--batch-size", "1.5"], "batch_size is '1.5'", "a whole number above 0"),
    "negative": (["train", "--lr", "-1"], "lr is '-1'"),
    "over one": (["train", "--lora-dropout", "1"], "lora_dropout is '1'", "from 0 to below 1"),
    "thirty digits": (["train", "--seed", "9" * 30], "seed is"),
    "endless epochs": (["train", "--epochs", "1e308"], "epochs is '1e308'", "up to 2,147,483,647: passes over"),
    "endless wait": (["train", "--rank-timeout", "1e308"], "rank_timeout is '1e308'", "up to 1,000,000"),
    "more than memory": (["train", "--lora-r", str(2**62)], "lora_r is '4611686018427387904'", "up to 2,147,483,647"),
    "choice": (["train", "--schedule", "wavy"], "schedule is 'wavy'", "cosine, linear, constant"),
    "switch": (["train", "--rslora=maybe"], "--rslora is 'maybe'", "--rslora or --no-rslora"),
    "nothing given": (["train"], "--model is missing"),
    "define": (["train", "--define", "name"], "define is 'name'", "NAME=TEXT"),
    "define for eval": (["eval", "--model", "{model}", "--data", "{rows}", "--define", "x"], "define is 'x'"),
    "define that no row has": (["{train}", "--define", "nme=Bo"], "no row of", "{{nme}}"),
    "resume and overwrite": (["train", "--resume", "--overwrite"], "exclude each other"),
    "resume nowhere": (["train", "--resume"], "--output is missing"),
    "resume nothing": (["train", "--resume", "--output", "{out}"], "config.yaml is not there"),
    "no yaml": (["train", "-c", "{out}"], "No such file"),
    "device": (["{train}", "--device", "gpu"], "device 'gpu' cannot be used"),
    "device that is not there": (["{train}", "--device", "cuda:77"], "device 'cuda:77' cannot be used"),
    "val": (["{train}", "--val", "some"], "val is 'some'"),
    "val nan": (["{train}", "--val", "nan"], "val is 'nan'"),
    "targets": (["{train}", "--lora-targets", "q_prj"], "no linear is called q_prj", "q_proj"),
    "broken regex": (["{train}", "--lora-targets", "("], "not a regular expression"),
    "chat flag": (["chat", "--model", "{model}", "--promt", "x"], "unknown argument '--promt'"),
    "chat without model": (["chat"], "--model"),
    "temperature": (
        ["chat", "--model", "{model}", "--temperature", "nan"],
        "--temperature: 'nan' is not a number from 0 to 100",
    ),
    "chat seed": (["chat", "--model", "{model}", "--seed", "9" * 30], "--seed"),
    "shard size": (
        ["merge", "--model", "x", "--adapter", "y", "--output", "{out}", "--shard-size", "0"],
        "--shard-size: '0' is not a number from 0.001 to 100,000",
    ),
}


@pytest.mark.parametrize("case", TYPED.values(), ids=TYPED)
def test_what_is_typed(tmp_path, cli, model, rows, case):
    argv, *parts = case
    places = {"{model}": [model], "{rows}": [rows], "{out}": [tmp_path / "out"],
              "{train}": ["train", "--model", model, "--data", rows, "--output", tmp_path / "out"]}  # fmt: skip
    check(cli(*(word for a in argv for word in places.get(a, [a]))), 2, *parts)
    assert not list(tmp_path.iterdir())


YAML = {
    "unknown key": ("lora_rnk: 8", "unknown setting 'lora_rnk'", "Did you mean 'lora_rank'?"),
    "key twice": ("lr: 1\nlr: 2", "duplicate key 'lr'"),
    "broken": ("lr: [1", "line"),
    "a list": ("- lr", "holds no settings"),
    "number keys": ("1: 2", "holds no settings"),
    "object": ("model: !!python/object/apply:os.system ['true']", "python/object"),
    "list for a number": ("lr: [1]", "lr is of the wrong type"),
    "map for a text": ("model: {a: b}", "model is of the wrong type"),
    "nothing for a text": ("data:", "data is empty"),
    "bool for a number": ("batch_size: true", "batch_size is True"),
    "aliases": (
        "model: [&a [x, x], &b [*a, *a, *a, *a], &c [*b, *b, *b, *b], [*c, *c, *c, *c]]",
        "model is of the wrong type",
    ),
    "deep": ("model: " + "[" * 10_000, ""),
    "latin": (b"model: \xe9", "utf-8"),
}


@pytest.mark.parametrize(("text", "parts"), [(c[0], c[1:]) for c in YAML.values()], ids=YAML)
def test_what_a_yaml_says(tmp_path, cli, text, parts):
    (tmp_path / "run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    check(cli("train", "-c", tmp_path / "run.yaml", "--output", tmp_path / "out"), 2, *parts)
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]


def test_settings_of_every_wrong_kind():
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
        float("nan"),
        10**400,
        "9" * 5000,
        [[1]],
        b"x",
    ]
    refused = 0
    for name in TrainConfig.__dataclass_fields__:
        for value in wrong:
            try:
                resolve({name: value})
            except UsageError as error:
                refused += name in error.what
    assert refused > 200


def test_known_names_and_lists_are_taken(tmp_path):
    (tmp_path / "x.yaml").write_text(
        "learning_rate: 1e-4\ntarget_modules: [q_proj, v_proj]\nlora_rank: 8\nuse_rslora: yes\n"
    )
    config = resolve(read_yaml(tmp_path / "x.yaml"), {"lora_rank": "2"})
    assert (config.lr, config.lora_targets, config.lora_r, config.rslora) == (1e-4, "q_proj,v_proj", 2, True)
    (tmp_path / "y.yaml").write_text(to_yaml(config))
    assert resolve(read_yaml(tmp_path / "y.yaml")) == config


# what the data holds

DATA = {
    "empty": ("", "no rows"),
    "broken line": (json.dumps(ROWS[0]) + '\n{"instruction": ', "line 2"),
    "empty answer": (json.dumps({"prompt": "q", "completion": ""}), "line 1", "the answer is empty"),
    "too long": (json.dumps({"prompt": "q", "completion": "a" * 3000}), "all 1 rows are too long"),
    "no shape": ('{"texts": "x"}', "of no known shape"),
}


@pytest.mark.parametrize("case", DATA.values(), ids=DATA)
@pytest.mark.parametrize("command", ["train", "eval"])
def test_what_the_data_holds(tmp_path, cli, model, command, case):
    text, *parts = case
    (tmp_path / "rows").write_text(text)
    more = ["--output", tmp_path / "out"] if command == "train" else []
    check(cli(command, "--model", model, "--data", tmp_path / "rows", *more), 3, *parts)
    assert [p.name for p in tmp_path.iterdir()] == ["rows"]


def test_more_validation_rows_than_rows(tmp_path, cli, model, rows):
    check(cli("train", "--model", model, "--data", rows, "--output", tmp_path / "out", "--val", "14"), 3, "of 14 rows")
    assert not list(tmp_path.iterdir())


# what the model folder holds


def cut(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1000])


def lie(folder: Path) -> None:
    raw = json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(8))


def lose_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}))


def change_config(**changes):
    def change(folder: Path) -> None:
        j = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(j))

    return change


MODEL = {
    "family": (change_config(model_type="llama"), "config.json: model_type 'llama' is not supported"),
    "missing shard": (lose_a_shard, "a.safetensors missing (1 of 1 shards)"),
    "cut short": (cut, "cut short?"),
    "lying header": (lie, "cut short?"),
    "not its weights": (change_config(num_hidden_layers=4), "does not fit its config.json", "model.layers.*"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    "broken tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "is not a usable tokenizer"),
    "no folder": (shutil.rmtree, "is not a folder"),
}


@pytest.mark.parametrize("case", MODEL.values(), ids=MODEL)
def test_what_the_model_folder_holds(tmp_path, cli, model, rows, case):
    spoil, *parts = case
    spoil(shutil.copytree(model, tmp_path / "m"))
    check(cli("train", "--model", tmp_path / "m", "--data", rows, "--output", tmp_path / "out"), 4, *parts)
    assert {p.name for p in tmp_path.iterdir()} <= {"m"}


@pytest.mark.parametrize("command", ["train", "eval", "merge", "chat"])
def test_a_tokenizer_larger_than_the_model(tmp_path, cli, rows, finished, command):
    small = make_model(tmp_path / "m", vocab_size=258)
    more = {"train": ["--data", rows, "--output", tmp_path / "out"], "eval": ["--data", rows], "chat": ["--prompt", "x"],
            "merge": ["--adapter", finished / "adapter", "--any-base", "--output", tmp_path / "out"]}  # fmt: skip
    check(cli(command, "--model", small, *more[command]), 4, "the tokenizer has ids up to 258, the model 258 rows")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("command", ["chat", "merge"])
def test_an_adapter_of_another_base(tmp_path, cli, model, finished, command):
    other = shutil.copytree(model, tmp_path / "m")
    file = SafetensorsFile(model / "model.safetensors")
    (other / "model.safetensors").unlink()
    write_tensors(other / "model.safetensors", {n: file.tensor(n) + 1 for n in file.entries})
    more = ["--prompt", "x"] if command == "chat" else ["--output", tmp_path / "out"]
    check(
        cli(command, "--model", other, "--adapter", finished / "adapter", *more), 4, "another base model", "--any-base"
    )
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_size(tmp_path, cli, finished):
    other = make_model(tmp_path / "m", intermediate_size=40)
    check(
        cli("chat", "--model", other, "--adapter", finished / "adapter", "--prompt", "x"),
        4,
        "does not fit this model",
        "mlp.down_proj",
    )


ADAPTER = {
    "no folder": (shutil.rmtree, "is not a folder"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "dora": (lambda folder: change_adapter(folder, use_dora=True), "use_dora"),
    "not lora": (lambda folder: change_adapter(folder, peft_type="LOHA"), "peft_type is 'LOHA'"),
    "another method": (lambda folder: change_adapter(folder, peft_type="IA3"), "the model has no linear"),
    "rank": (lambda folder: change_adapter(folder, r="4"), "r is '4'"),
    "dropout": (lambda folder: change_adapter(folder, lora_dropout="x"), "lora_dropout is 'x'"),
    "patterns": (lambda folder: change_adapter(folder, rank_pattern=["q_proj"]), "rank_pattern is"),
    "alpha": (lambda folder: change_adapter(folder, alpha_pattern={"q_proj": "8"}), "alpha_pattern 'q_proj' is '8'"),
    "regex bomb": (lambda folder: change_adapter(folder, rank_pattern={"(a+)+$": 4}), "too complex"),
    "slow regex": (lambda folder: change_adapter(folder, rank_pattern={".*" * 12 + "x!": 4}), "too complex"),
    "changed base": (
        lambda folder: change_adapter(folder, init_lora_weights="pissa_niter_16"),
        "changes the base weights",
    ),
    "pickle": (lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"), "pickle"),
}


def change_adapter(folder: Path, **changes) -> None:
    j = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(j))


def change_metadata(folder: Path, **changes: str) -> None:
    file = SafetensorsFile(folder / "adapter_model.safetensors")
    file.path.unlink()  # it is mapped, and stays readable
    write_tensors(file.path, {key: file.tensor(key) for key in file.entries}, file.metadata | changes)


@pytest.mark.parametrize("said", ["abc", "nan", "inf", "-1", "1", "1e999"])
def test_a_dropout_in_the_metadata_of_an_adapter_that_is_none_is_refused(tmp_path, cli, model, finished, said):
    change_metadata(shutil.copytree(finished / "adapter", tmp_path / "a"), minilora_dropout=said)
    check(cli("chat", "--model", model, "--adapter", tmp_path / "a", "--prompt", "x"), 4, "its dropout is", repr(said))


def test_metadata_of_an_adapter_that_means_nothing_here_is_left_alone(tmp_path, cli, model, finished):
    changes = {"minilora_quant": "nf4\x1b[31m", "minilora_init": "[red]", "format": "x"}
    change_metadata(shutil.copytree(finished / "adapter", tmp_path / "a"), **changes)
    words = ("chat", "--model", model, "--prompt", "x", "--adapter")
    answer = cli(*words, finished / "adapter")
    assert answer[0] == 0 and cli(*words, tmp_path / "a") == answer


@pytest.mark.parametrize("case", ADAPTER.values(), ids=ADAPTER)
def test_what_the_adapter_folder_holds(tmp_path, cli, model, finished, case):
    spoil, *parts = case
    spoil(shutil.copytree(finished / "adapter", tmp_path / "a"))
    check(cli("chat", "--model", model, "--adapter", tmp_path / "a", "--prompt", "x"), 4, *parts)


# the output folder


def train(cli, run: Path, model: Path, rows: Path, *more) -> tuple[int, str, str]:
    return cli("train", "--model", model, "--data", rows, "--output", run, *SHORT, *more)


def test_an_output_that_is_not_empty(cli, model, rows, run):
    before = tree(run)
    check(train(cli, run, model, rows), 8, "is not empty", "--resume", "--overwrite")
    check(cli("merge", "--model", model, "--adapter", run / "adapter", "--output", run), 8, "is not empty")
    assert tree(run) == before


def test_an_output_that_is_a_file(tmp_path, cli, model, rows):
    (tmp_path / "out").write_text("precious")
    check(train(cli, tmp_path / "out", model, rows), 8, "is a file")
    assert (tmp_path / "out").read_text() == "precious"


def test_overwrite_deletes_nothing_but_runs(tmp_path, cli, model, rows):
    (tmp_path / "precious").write_text("x")
    check(train(cli, tmp_path, model, rows, "--overwrite"), 8, "holds no run")
    assert tree(tmp_path) == {"precious": b"x"}


def test_overwrite_without_an_output(tmp_path, cli, model, rows, monkeypatch):
    (tmp_path / "precious").write_text("x")
    monkeypatch.chdir(tmp_path)
    check(cli("train", "--model", model, "--data", rows, "--overwrite"), 2, "--output is missing")
    assert tree(tmp_path) == {"precious": b"x"} and not (tmp_path / ".lock").exists()


OUTPUTS = (
    "data score --model {m} --data {d} --scores", "data score --model {m} --data {d} --keep-below 9 --output",
    "data score --model {m} --data {d} --html", "inspect data --model {m} --data {d} --html", "inspect adapter {r} --html",
    "inspect adapter {r} --to-rank 1 --output", "merge --model {m} --adapter {r} --output",
    "export --model {m} --adapter {r} --for peft --output", "data split --data {d} --val 2 --output", "compare {r} {r} --output",
)  # fmt: skip


@pytest.mark.parametrize("command", OUTPUTS)
def test_an_output_that_cannot_be_written_is_told_before_the_work(
    tmp_path, cli, model, rows, run, monkeypatch, command
):
    def worked(*_):
        raise AssertionError

    for work in ("safetensors.SafetensorsFile.__init__", "strict_json.read_json_lines"):
        monkeypatch.setattr(f"minilora.files.{work}", worked)
    before, words = tree(tmp_path), command.format(m=model, d=rows, r=run).split()
    (tmp_path / "file").touch()
    check(cli(*words, tmp_path / "file" / "x.html"), 2, "is no folder")
    check(
        cli(*words, tmp_path / "new" / ("x" * 245 + ".html")), 2, "is too long a name"
    )  # with the .trash- that it may need
    monkeypatch.setattr(os, "access", lambda path, how: not (how & os.W_OK and Path(path) == tmp_path))
    check(cli(*words, tmp_path / "new" / "x.html"), 6, f"nothing can be written in {tmp_path}")
    (tmp_path / "file").unlink()
    assert tree(tmp_path) == before


def test_the_folder_of_an_output_is_made(tmp_path, cli, model, rows):
    score = ("data", "score", "--model", model, "--data", rows, "--keep-below", "1e300")
    new = {flag: tmp_path / "new" / f"{flag}.html" for flag in ("--scores", "--output", "--html")}
    assert cli(*score, *(word for given in new.items() for word in given))[0] == 0
    assert all(path.stat().st_size for path in new.values())


def test_an_output_in_use(cli, model, rows, run):
    before = tree(run)
    with open(run / ".lock", "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write("process 77\n")
        file.flush()
        for how in (["--resume"], ["--overwrite"], []):
            check(train(cli, run, model, rows, *how), 8, "in use by process 77")
    assert tree(run) == before


def test_overwrite_deletes_only_for_a_run_that_can_start(tmp_path, cli, model, rows, run):
    before = tree(run)
    check(train(cli, run, model, tmp_path / "absent", "--overwrite"), 3, "is not there")
    check(train(cli, run, tmp_path, rows, "--overwrite"), 4)
    check(train(cli, run, model, rows, "--overwrite", "--lora-targets", "nothing"), 2)
    assert tree(run) == before
    (run / "old").touch()
    assert train(cli, run, model, rows, "--overwrite")[0] == 0
    assert (run / "old").exists() and intact(run) == [2, 3, 4]  # a file that no run wrote is not a run's to delete


# resuming


def test_resume_with_other_settings(cli, rows, run):
    before = tree(run)
    check(
        cli("train", "--output", run, "--resume", "--lr", "0.5", "--seed", "1"),
        9,
        "lr: 0.0002 then, 0.5 now",
        "seed: 42 then, 1 now",
    )
    assert tree(run) == before


def test_resume_with_other_data(tmp_path, cli, run):
    before = tree(run)
    (tmp_path / "rows").write_text(json.dumps(ROWS[:9]))
    check(cli("train", "--output", run, "--resume", "--data", tmp_path / "rows"), 9, "data: ")
    assert tree(run) == before


def test_resume_with_nothing_to_resume(cli, run):
    shutil.rmtree(run / "checkpoints")
    before = tree(run)
    check(cli("train", "--output", run, "--resume"), 9, "has no checkpoint to go on from", "--overwrite")
    assert tree(run) == before


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


DAMAGE = {
    "bit": (lambda step: flip(step / "optimizer.safetensors"), "optimizer.safetensors was changed"),
    "length": (lambda step: os.truncate(step / "optimizer.safetensors", 100), "optimizer.safetensors has 100 of"),
    "empty": (lambda step: os.truncate(step / "MANIFEST.json", 0), "MANIFEST.json is damaged"),
    "file": (lambda step: (step / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "manifest": (lambda step: (step / "MANIFEST.json").unlink(), "MANIFEST.json is missing"),
}


@pytest.mark.parametrize("case", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_skipped(cli, run, finished, case):
    damage, part = case
    damage(run / "checkpoints" / "step-4")
    damage(run / "checkpoints" / "step-3")
    shutil.rmtree(run / "adapter")
    code, out, _ = cli("train", "--output", run, "--resume", "--keep-checkpoints", "1")
    assert code == 0 and f"skipped step-4: {part}" in out and f"skipped step-3: {part}" in out
    assert "step-2" in out
    assert tree(run / "adapter") == tree(finished / "adapter")
    assert intact(run) == [4]


def test_retention_counts_no_damaged_checkpoint(run):
    """A resumed run has just saved step 3; step 4 is a damaged one of before."""
    checkpoints = run / "checkpoints"
    flip(checkpoints / "step-4" / "state.json")
    (checkpoints / ".tmp-step-9").mkdir()
    rotate(checkpoints, keep=1, step=3, best=None)
    assert sorted(os.listdir(checkpoints)) == ["last", "step-3", "step-4"]
    assert os.readlink(checkpoints / "last") == "step-3" and verify_manifest(checkpoints / "step-3") is None


# while it runs


def test_diverged(tmp_path, cli, model, rows):
    result = train(cli, tmp_path / "run", model, rows, "--lr", "1e30")
    steps = intact(tmp_path / "run")
    check(result, 5, "loss nan", f"checkpoints/step-{steps[-1]} is the last good state", "Lower --lr")
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.fixture
def small_disk(tmp_path):
    """Mount a disk of so many KiB, or grow it."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(kib: int) -> Path:
        how = (
            ["-o", f"remount,size={kib}k", str(disk)]
            if disk.is_mount()
            else ["-t", "tmpfs", "-o", f"size={kib}k", "none", str(disk)]
        )
        done = subprocess.run(["mount", *how], check=False, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
        return disk

    yield mount
    if disk.is_mount():
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount")
def test_a_disk_that_fills_up(cli, model, rows, small_disk, monkeypatch):
    monkeypatch.setattr("minilora.run.folder.check_disk", lambda *_: None)  # it fills up later, by others
    run = small_disk(1800) / "run"
    more = ["--max-steps", "60", "--keep-checkpoints", "60"]
    check(train(cli, run, model, rows, *more), 6, str(run), "No space left", "What was there before is untouched")
    saved = intact(run)
    assert saved == list(range(1, saved[-1] + 1)) and 2 < saved[-1] < 60
    small_disk(20_000)
    assert cli("train", "--output", run, "--resume", "--keep-checkpoints", "60")[0] == 0
    assert intact(run) == list(range(1, 61))


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount")
def test_a_disk_that_is_too_small_from_the_start(cli, model, rows, small_disk):
    run = small_disk(900) / "run"
    check(train(cli, run, model, rows), 6, "checkpoints need")
    assert not run.exists()


MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried"),
    MemoryError(),
    RuntimeError("you can't allocate memory: 5 bytes"),
]


@pytest.mark.parametrize("error", MEMORY, ids=lambda e: type(e).__name__)
def test_out_of_memory(tmp_path, cli, model, rows, monkeypatch, error):
    monkeypatch.setattr(minilora.train, "make_plan", lambda *_: (_ for _ in ()).throw(error))
    check(train(cli, tmp_path / "out", model, rows), 7, "out of memory", "--checkpointing,")
    assert not list(tmp_path.iterdir())


def test_our_own_bug_is_the_only_traceback(tmp_path, cli, model, rows, monkeypatch):
    monkeypatch.setattr(minilora.train, "make_plan", lambda *_: 1 // 0)
    code, _, err = train(cli, tmp_path / "out", model, rows)
    assert code == 70 and "Traceback" in err and "ZeroDivisionError" in err and "this is a bug of minilora" in err
    assert not list(tmp_path.iterdir())


def test_every_error_has_a_code_of_its_own():
    codes = [kind.code for kind in MiniloraError.__subclasses__()]
    assert sorted(codes) == [2, 3, 4, 5, 6, 7, 8, 9, 10, 75]


@pytest.mark.parametrize("command", COMMANDS)
def test_help(cli, command):
    code, out, err = cli(command, "--help")
    assert code == 0 and out.startswith(f"usage: minilora {command}") and not err


# as processes of their own


def process(*argv, limit: str = "") -> subprocess.Popen:
    """`python -m minilora` under a bash that has set limits."""
    command = ["bash", "-c", f'{limit}exec "$0" -m minilora "$@"', sys.executable, *map(str, argv)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def end(child: subprocess.Popen) -> tuple[int, str, str]:
    out, err = child.communicate()
    return child.returncode, out, err


def test_the_exit_code_leaves_the_process(tmp_path, model):
    check(end(process("train", "--batch-sise", "4")), 2, "Did you mean --batch-size?")
    check(
        end(process("train", "--model", model, "--data", tmp_path / "absent", "--output", tmp_path / "out")),
        3,
        "is not there",
    )


def test_a_file_that_may_not_grow(cli, run, finished):
    """The limit on file sizes stands for a full disk where nothing can be mounted."""
    for step in (3, 4):
        shutil.rmtree(run / "checkpoints" / f"step-{step}")
    shutil.rmtree(run / "adapter")
    before = tree(run / "checkpoints" / "step-2")
    check(end(process("train", "--output", run, "--resume", limit="ulimit -f 16; ")), 6, "File too large", str(run))
    assert intact(run) == [2] and tree(run / "checkpoints" / "step-2") == before and not (run / "adapter").exists()
    assert cli("train", "--output", run, "--resume")[0] == 0
    assert tree(run / "adapter") == tree(finished / "adapter")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_resume_finishes(tmp_path, cli, model, rows, number):
    run, settings = tmp_path / "run", [*SHORT, "--max-steps", "400", "--save-every", "400"]
    child = process("train", "--model", model, "--data", rows, "--output", run, *settings)
    while (
        child.poll() is None and not (run / "metrics.jsonl").is_file() or len((run / "metrics.jsonl").read_text()) < 500
    ):
        time.sleep(0.01)
    child.send_signal(number)
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    check(end(child), 75, f"stopped by {name} at step", f"Go on with: minilora train --output {run} --resume")
    (step,) = intact(run)
    assert 0 < step < 400 and not (run / "adapter").exists()
    if number == signal.SIGINT:
        code, out, _ = cli("train", "--output", run, "--resume")
        assert code == 0 and f"step-{step}" in out
        lines = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert lines == list(range(1, 401)) and (run / "adapter").is_dir()


def test_two_names_of_one_setting():
    with pytest.raises(UsageError, match="warmup_ratio, warmup_steps are one setting"):
        resolve({"warmup_ratio": 0.1, "warmup_steps": 0})


def test_a_prompt_that_is_no_utf8(cli, model):
    check(cli("chat", "--model", model, "--prompt", "a\udcff"), 2, "is not UTF-8")


def test_memory_that_runs_out_in_a_step_leaves_the_step_before(tmp_path, cli, model, rows, monkeypatch):
    """The fourth backward pass fails; the three steps before it are saved."""
    step, calls = micro_batch, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("no more")
        return step(*args)

    monkeypatch.setattr("minilora.train.micro_batch", failing)
    more = ("--save-every", "100", "--batch-size", "1", "--max-steps", "6")
    check(train(cli, tmp_path / "out", model, rows, *more), 7, "out of memory")
    assert intact(tmp_path / "out") == [3]


def test_a_refusal_leaves_no_lock(tmp_path, cli, model, rows):
    (tmp_path / "precious").write_text("x")
    for how in ([], ["--overwrite"]):
        check(train(cli, tmp_path, model, rows, *how), 8)
    assert tree(tmp_path) == {"precious": b"x"} and not (tmp_path / ".lock").exists()


def test_commands_that_can_be_typed():
    command = """minilora chat --model 'a b' --define 'x=it'"'"'s'"""
    assert shell("chat", "--model", "a b", "--define", "x=it's") == command
    assert shell("train", "--output", Path("-run/--x"), "--resume") == "minilora train --output ./-run/--x --resume"


def test_a_run_whose_name_begins_with_a_dash_tells_commands_that_are_taken(tmp_path, cli, model, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run.rename("-run")
    config = resolve(read_yaml(Path("-run/config.yaml")), {"output": "-run"})
    chat, measure, merge = map(shlex.split, next_commands(config))
    assert cli(*measure[1:])[0] == cli(*merge[1:])[0] == cli(*chat[1:], "--prompt", "x", "--max-tokens", "1")[0] == 0


def test_the_next_command_measures_what_the_run_measured(tmp_path, cli, model, rows):
    """By the same settings, on the rows that were split off, or on the file of a folder."""
    more = ("--val", "4", "--loss-on", "last", "--no-train-end", "--max-length", "90")
    code, said, _ = train(cli, tmp_path / "out", model, rows, *more, "--max-steps", "1")
    assert code == 0
    measure = next(line for line in said.splitlines() if line.startswith("  minilora eval"))
    assert measure.endswith("data/val.jsonl --loss-on last --no-train-end --max-length 90")
    code, told, _ = cli(*shlex.split(measure)[1:])
    assert code == 0 and re.findall(r"validation loss ([0-9.]+)", said)[-1] == re.findall(r"loss +([0-9.]+)", told)[0]
    (tmp_path / "folder").mkdir()
    shutil.copy(rows, tmp_path / "folder" / "train.json")
    code, said, _ = train(cli, tmp_path / "other", model, tmp_path / "folder", "--max-steps", "1")
    assert code == 0 and f"--data {tmp_path / 'folder' / 'train.json'}" in said


@pytest.mark.parametrize(
    ("left", "missing"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_PORT is not set"),
    ],
)
def test_variables_that_a_job_system_left_are_told(tmp_path, cli, model, rows, monkeypatch, left, missing):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    check(cli("train", "--model", model, "--data", rows, "--output", tmp_path / "out"), 2, missing, "unset WORLD_SIZE")
    assert not (tmp_path / "out").exists()


def test_a_rank_alone_speaks(cli, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert "minilora" in cli("doctor")[1]
