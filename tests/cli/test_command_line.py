"""How words become settings: switches, names of other tools, hints, a yaml file by itself, a run folder as an adapter, the help."""

import json
import re
from argparse import BooleanOptionalAction
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from tiny import make_model, make_rows

from minilora.__main__ import COMMANDS, main
from minilora.cli import chat, compare, inspect_model, sweep, train
from minilora.cli import eval as eval_command
from minilora.cli.arguments import add_arguments, keywords
from minilora.cli.parser import Parser
from minilora.config import TrainConfig
from minilora.errors import UsageError
from minilora.settings import ALIASES, GROUPS, NOT_NEEDED, REFUSED, read_yaml, resolve
from minilora.spelling import HARMFUL, nearest

NAMES = {f.name for f in fields(TrainConfig)}
SWITCHES = [f.name for f in fields(TrainConfig) if f.type is bool]
SAMPLES = {int: "3", float: "0.5", str: "x", dict: "a=b", bool: "on"}


def parsed(*words: str, command=train) -> dict:
    """What a command is called with for its words."""
    parser = Parser(prog="minilora", allow_abbrev=False)
    add_arguments(parser, command.run)
    return keywords(command.run, vars(parser.parse_args(words)))


def settings(*words: str, command=train) -> dict:
    """The settings of a run among them."""
    return {name: value for name, value in parsed(*words, command=command).items() if name in NAMES}


def said(capsys, *words: object) -> tuple[int, str, str]:
    try:
        code = main([str(w) for w in words])
    except SystemExit as end:  # --help
        code = int(end.code or 0)
    return code, *capsys.readouterr()


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_has_one_spelling_and_the_older_ones_are_read(name: str):
    flag = name.replace("_", "-")
    for on in (f"--{flag}", f"--{flag} on", f"--{flag} True", f"--{flag}=yes", f"--{name}", f"--no-{flag} off"):
        assert settings(*on.split(), "--lr", "1") == {name: True, "lr": "1"}
    for off in (f"--no-{flag}", f"--{flag} off", f"--{flag} false", f"--{flag}=0", f"--no-{name}"):
        assert settings(*off.split(), "--lr", "1") == {name: False, "lr": "1"}
    with pytest.raises(UsageError, match=f"--{flag} or --no-{flag}"):
        settings(f"--{flag}=maybe")


def test_a_switch_does_not_swallow_the_word_behind_it():
    found = parsed("--checkpointing", "run.yaml", "--rslora", "--lr", "1")
    assert found == {"recipe": "run.yaml", "checkpointing": True, "rslora": True, "lr": "1"}


def test_eval_has_the_switch_of_train():
    words = ["--model", "m", "--data", "d"]
    for more, on in ([], True), (["--train-end"], True), (["--no-train-end"], False), (["--train-end", "off"], False):
        assert parsed(*words, *more, command=eval_command)["settings"].train_end is on


@pytest.mark.parametrize("name", ["eval", "chat", "merge", "sweep", "inspect_data", "data_split"])
def test_every_switch_of_a_command_has_the_spelling_of_a_setting(name: str):
    parser = Parser(prog="minilora", allow_abbrev=False)
    add_arguments(parser, import_module(f"minilora.cli.{name}").run)
    switches = [a for a in parser._actions if a.nargs == 0 and a.dest != "help"]
    assert switches and all(isinstance(a, BooleanOptionalAction) for a in switches)


def test_a_command_is_called_with_what_is_given_and_no_more():
    words = ["--model", "m", "--prompt", "a", "--prompt", "b", "--think", "on", "--no-any-base", "--top-k", "3"]
    found = parsed(*words, command=chat)
    assert found == {"model": "m", "prompt": ["a", "b"], "think": True, "any_base": False, "top_k": 3}
    assert parsed("a", "b", command=compare) == {"runs": ["a", "b"]}
    assert parsed("d", "--targets", "x", command=inspect_model) == {"folder": "d", "lora_targets": "x"}
    with pytest.raises(UsageError, match="required: --model"):
        parsed(command=chat)


def test_a_text_with_a_comma_is_one_definition():
    words = ["--model", "m", "--data", "d", "--define", "author=A, B", "--columns", "prompt=q,response=a"]
    found = parsed(*words, command=eval_command)["settings"]
    assert found.define == {"author": "A, B"} and found.columns == {"prompt": "q", "response": "a"}


@pytest.mark.parametrize("alias", ALIASES)
def test_a_name_of_another_tool_is_a_flag(alias: str):
    f = next(f for f in fields(TrainConfig) if f.name == ALIASES[alias])
    kind = next((k for k in SAMPLES if f.type in (k, k | None)), str)
    for flag in (f"--{alias}", "--" + alias.replace("_", "-")):
        found = settings(flag, SAMPLES[kind])
        assert list(found) == [f.name] and found == settings(f"{flag}={SAMPLES[kind]}")
        assert f.name == "output" or settings("file", "--output", "o", flag, SAMPLES[kind], command=sweep).keys() == {
            "output",
            f.name,
        }


@pytest.mark.parametrize("name", [*NOT_NEEDED, *REFUSED])
def test_what_has_no_meaning_here_is_told_as_a_flag(name: str, capsys):
    for words in ([f"--{name}", "1"], [f"--{name.replace('_', '-')}"]):
        code, _, err = said(capsys, "train", *words)
        assert code == 2 and name in err.replace("-", "_") and "Did you mean" not in err


def test_a_hint_does_no_harm():
    flags = [*(f"--{f.name.replace('_', '-')}" for f in fields(TrainConfig)), *(f"--{a}" for a in ALIASES), *HARMFUL]
    assert not nearest("--adapter_name_or_path", flags) and not nearest("--lr_rate", flags)
    for word in ("--override", "--over-write-all", "--overview", "--no-overwrite", "--write", "--allow-partials-not"):
        assert nearest(word, flags) not in HARMFUL
    assert nearest("--overwrit", flags) == "--overwrite"  # nearly the same word
    slips = {
        "--lerning-rate": "--learning_rate",
        "--batchsize": "--batch-size",
        "--evalevery": "--eval-every",
        "--max-len": "--max-length",
    }
    assert {word: nearest(word, flags) for word in slips} == slips


HINTS = {
    "trian": "Did you mean train?", "inspect dta": "Did you mean data?", "chat --adapter_name_or_path x": "Did you mean --adapter?",
    "eval --model_name_or_path=x": "Did you mean --model?", "train --lerning_rate 1": "Did you mean --learning-rate (--lr here)?",
    "train --adapter_name_or_path x": "training starts from new adapters", "train --bf16": "not needed here",
    "plan --fp16": "not needed here", "sweep x --output y --quantization_bit 4": "quantised",
    "eval --compute fp16": "It can be auto, float32, bfloat16", "predict --batch 0": "a whole number from 1 to 4,096",
    "predict --seed x": "a whole number from 0 on", "train --lora-r 0": "a whole number above 0", "train --epochs x": "a number above 0",
    "train --keep most": "It can be best, last", "train --weight-decay -1": "a number from 0 on", "train --define x": "NAME=TEXT",
    "train none.yaml": "yaml file", "chat --prompt": "expected one argument",
}  # fmt: skip


@pytest.mark.parametrize("words", HINTS)
def test_an_error_says_what_is_allowed(words: str, capsys):
    code, _, err = said(capsys, *words.split())
    assert code == 2 and HINTS[words] in err


def test_a_yaml_file_stands_by_itself(tmp_path: Path, capsys):
    model, rows = make_model(tmp_path / "model"), make_rows(tmp_path / "rows.json")
    recipe = tmp_path / "run.yaml"
    recipe.write_text(yaml.safe_dump({"model": str(model), "data": str(rows), "lora_r": 4, "max_steps": 1}))
    for words in (["plan", recipe], ["plan", "-c", recipe]):
        code, out, err = said(capsys, *words, "--lora-alpha", "8", "--json")
        assert code == 0 and json.loads(out)["lora_r"] == 4, err
    code, _, err = said(capsys, "plan", recipe, "-c", recipe)
    assert code == 2 and "are two files" in err
    code, out, err = said(capsys, "train", "--lr", "1e-3", recipe, "--output", tmp_path / "run")
    assert code == 0 and out.count("minilora merge") == 1, err
    config = resolve(yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()))
    assert (config.lora_r, config.lr) == (4, 1e-3)

    # a run folder is its adapter
    test = ["--model", model, "--adapter", tmp_path / "run", "--data", rows, "--json"]
    losses = [
        json.loads(said(capsys, "eval", *w)[1])["loss"]
        for w in (test, [*test[:2], "--adapter", tmp_path / "run" / "adapter", *test[4:]])
    ]
    assert losses[0] == losses[1]
    code, out, err = said(capsys, "merge", *test[:4], "--output", tmp_path / "merged")
    assert code == 0 and (tmp_path / "merged" / "config.json").is_file(), err
    (tmp_path / "run" / "adapter").rename(tmp_path / "elsewhere")
    code, _, err = said(capsys, "eval", *test)
    assert code == 4 and f"{tmp_path / 'run' / 'checkpoints' / 'last'} is the newest adapter of this run" in err


def test_the_help_has_every_setting_once_and_in_groups(capsys):
    code, out, _ = said(capsys, "help", "train")
    assert code == 0 and out == said(capsys, "train", "--help")[1]
    groups = re.findall(r"^(\S.*):$", out, re.MULTILINE)
    assert [g for g in groups if g in GROUPS.values()] == list(GROUPS.values())
    for f in fields(TrainConfig):
        assert len(re.findall(rf"^  --{f.name.replace('_', '-')}[ ,]", out, re.MULTILINE)) == 1
    examples = out[out.index("examples:") :]
    assert examples.count("minilora train ") == 2
    assert all(line in said(capsys, "help")[1] for line in COMMANDS)
    assert said(capsys, "help", "trian")[0] == 2


def test_the_examples_of_the_help_are_right():
    for line in re.findall(r"^  minilora train (.*)$", train.EPILOG, re.MULTILINE):
        resolve(settings(*line.split()))


def test_an_older_run_s_keep_is_a_number_of_checkpoints():
    assert (resolve({"keep": 3}).keep, resolve({"keep": 3}).keep_checkpoints) == ("best", 3)


def test_a_setting_that_is_given_twice(capsys):
    """Two lists are not one; of anything else the last counts, which is said."""
    for words in (["--data", "a", "--data", "b"], ["--lora-targets", "q_proj", "--target_modules", "v_proj"]):
        code, _, err = said(capsys, "train", *words)
        assert code == 2 and "with commas" in err
    assert "are one setting" in err
    code, _, err = said(capsys, "plan", "--lr", "1e-4", "--learning_rate", "x")
    assert (
        code == 2
        and "note: --lr and --learning_rate are one setting; the last one counts" in err
        and "lr is 'x'" in err
    )
    assert "twice" not in said(capsys, "eval", "--model", "m", "--data", "d", "--define", "a=1", "--define", "b=2")[2]


def test_a_run_of_another_tool_goes_on_by_its_own_flag(capsys):
    assert "--resume" in said(capsys, "train", "--resume_from_checkpoint", "x")[2]
    assert resolve({"base_model": "m"}).model == "m"


def test_off_in_yaml_is_the_word(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("kernels: off\n")
    assert resolve(read_yaml(tmp_path / "run.yaml")).kernels == "off"
    with pytest.raises(UsageError, match="keep_checkpoints, keep are one setting"):
        resolve({"keep_checkpoints": 2, "keep": 3})
