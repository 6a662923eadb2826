"""`minilora completion`: what bash offers, by bash itself; zsh and fish where they are installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

from minilora.__main__ import COMMANDS, SUBCOMMANDS, main
from minilora.cli.completion import commands

ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
_minilora
echo "${COMPREPLY[*]}"
"""


@pytest.fixture(scope="module")
def known() -> dict:
    return commands()


def test_every_command_is_known(known: dict):
    both = {f"{name} {kind}" for name, kinds in SUBCOMMANDS.items() for kind in kinds}
    assert known.keys() == COMMANDS.keys() - SUBCOMMANDS.keys() | both


def test_flags_are_those_of_the_help(known: dict):
    flags = {f.name: f for f in known["train"]}
    assert flags["--lr"].value and not flags["--rslora"].value and "--no-rslora" in flags
    assert flags["--kernels"].choices == ("auto", "off") and flags["--val"].choices == ()
    assert "--learning-rate" not in flags  # an alias, which the help does not show


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("tr", "train"),
        ("inspect ''", "adapter data model"),
        ("inspect data --sam", "--samples"),
        ("train --no-rsl", "--no-rslora"),
        ("train --quant n", "nf4"),
        ("train -c rows --kern", "--kernels"),
        ("data sc", "score"),
        ("completion ''", ""),
        ("train file", ""),  # a file's name, which bash itself completes
    ],
)
def test_what_bash_offers(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, offered: str):
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    typed = ["minilora", *(word.strip("'") for word in words.split())]
    done = subprocess.run(
        ["bash", "-c", ASK, "ask", str(tmp_path / "script"), *typed], capture_output=True, text=True, check=True
    )
    assert (done.stdout.strip(), done.stderr) == (offered, "")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_read_their_script(tmp_path: Path, capsys: pytest.CaptureFixture[str], shell: str):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("inspect data", "kernels", "samples"))
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(script)
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)
    if shell == "fish":
        ask = f'source {tmp_path / "script"}; complete -C "minilora inspect data --sam"; complete -C "minilora train --quant n"'
        done = subprocess.run(["fish", "--no-config", "-c", ask], capture_output=True, text=True, check=True)
        assert [line.split("\t")[0] for line in done.stdout.splitlines()] == ["--samples", "nf4"]
