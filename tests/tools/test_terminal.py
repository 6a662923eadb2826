"""The terminal: what is typed in a chat, lines that can be edited, and texts that cannot steer it."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path
from typing import Self

import pytest
from rich.table import Table
from tiny import make_model, make_rows

import minilora
from minilora.__main__ import main
from minilora.console import Console
from minilora.demo.show import MODEL
from minilora.tools import typed
from minilora.tools.chat import is_command

ROOT = Path(minilora.__file__).parent
# a terminal of its own, so that Ctrl-C reaches it, and heeded: a shell's background job ignores it, and so would its children
OWN_TERMINAL = (
    "import fcntl, signal, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "signal.signal(signal.SIGINT, signal.default_int_handler); "
)
LINES = "from minilora.tools.typed import typed; print([*typed('> ')])"
CHAT = "import sys; from minilora.__main__ import main; sys.exit(main(sys.argv[1:]))"
HANGS = 120  # seconds without a word


class Terminal:
    """A program in a terminal of 80 columns: send keys, wait for words."""

    def __init__(self, program: str, *words: str, **environment: str):
        self.master, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        there = os.environ | {"PYTHONPATH": str(ROOT.parent), "TERM": "xterm", "LANG": "C.UTF-8"} | environment
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWN_TERMINAL + program, *words],
            stdin=side, stdout=side, stderr=side, start_new_session=True, env=there,
        )  # fmt: skip
        os.close(side)
        self.unread = self.all = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def send(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def _more(self) -> bool:
        assert select.select([self.master], [], [], HANGS)[0], f"nothing comes after {self.all[-500:]!r}"
        try:
            came = os.read(self.master, 4096).decode(errors="replace")
        except OSError:  # the program has ended
            return False
        self.all, self.unread = self.all + came, self.unread + came
        return True

    def until(self, words: str) -> str:
        """What came up to and with these words."""
        while words not in self.unread:
            assert self._more(), f"it ended without {words!r} after {self.all[-500:]!r}"
        seen, mark, self.unread = self.unread.partition(words)
        return seen + mark

    def interrupt(self) -> None:
        """What Ctrl-C sends; a terminal also throws away what is written in the instant after, which no test can wait for."""
        os.killpg(self.process.pid, signal.SIGINT)

    def interrupted(self) -> int:
        """The exit code after Ctrl-C; sent again where it fell between readline's look at the signals and its wait for a key."""
        for _ in range(HANGS):
            self.interrupt()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
                break
        return self.end()

    def end(self) -> int:
        """The exit code, when everything has been read."""
        while self._more():
            pass
        return self.process.wait()


def test_lines_are_edited_and_a_paste_is_one_text(tmp_path):
    with Terminal(LINES, XDG_STATE_HOME=str(tmp_path)) as terminal:
        terminal.until("> ")
        terminal.send("你是谁\x1b[D\x1b[D\x7f他\r")  # two to the left, delete, write
        terminal.until("\n")
        terminal.until("> ")
        terminal.send("\x1b[200~one\rtwo\n\tthree\n\x1b[201~")
        terminal.until("three")
        terminal.send("!\r")
        terminal.until("!")
        terminal.until("> ")
        terminal.send("\x1b[A\x1b[A?\r")  # up, up: the first one again
        terminal.until("?\r")
        terminal.until("> ")
        terminal.send("\x04")
        said = ["他是谁", "one\ntwo\n\tthree\n!", "他是谁?"]
        assert terminal.end() == 0 and terminal.all.endswith(f"\r\n{said}\r\n")
    path = tmp_path / "minilora" / "chat_history"
    assert [json.loads(line) for line in path.read_text().splitlines()] == said
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o077 == 0
    with Terminal(LINES, XDG_STATE_HOME=str(tmp_path)) as terminal:  # the next chat remembers, a paste as one text
        terminal.until("> ")
        terminal.send("\x1b[A\x1b[A\r")
        terminal.until("> ")
        terminal.send("half a line")
        terminal.until("half a line")
        assert terminal.interrupted() == 0 and terminal.all.endswith(f"\r\n{said[1:2]}\r\n")


def test_a_history_is_bounded_and_its_place_may_be_bad(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "history"
    for i in range(typed.MOST + 5):
        typed.remember(path, f"{i}\n")
    typed.remember(path, "x" * (typed.LONGEST + 1))
    with open(path, "ab") as file:
        file.write(b'[1]\nbroken\n\xff\n"last"\n')
    found = typed.recall(path)
    assert (
        found[-2:] == [f"{typed.MOST + 4}\n", "last"]
        and len(path.read_text(errors="replace").split("\n")) == typed.MOST + 1
    )
    assert path.stat().st_mode & 0o777 == 0o600 and [p.name for p in path.parent.iterdir()] == ["history"]
    for bad in (path / "no folder", tmp_path):
        typed.remember(bad, "x")
        assert typed.recall(bad) == []
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/user")
    assert typed.history_file() == Path("/home/user/.local/state/minilora/chat_history")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert typed.history_file() is None


def test_a_chat():
    """Ctrl-C ends an answer and not the chat; commands say what they did; the adapter's absence is told."""
    words = ["--temperature", "100", "--top-p", "1", "--top-k", "0", "--max-tokens", "99999", "--compute", "float32"]
    with Terminal(CHAT, "chat", "--model", str(MODEL), *words, XDG_STATE_HOME="/dev/null") as terminal:
        terminal.until("/help lists the commands")
        terminal.until("> ")
        terminal.send("Hello\r")
        terminal.until("Hello")
        while len(terminal.unread) < 60:  # an answer that does not end by itself
            assert terminal._more()
        terminal.interrupt()
        terminal.until("[stopped]")
        for keys, told in {
            "/new": "A new conversation begins.",
            "/greedy": "Each token is the likeliest one now.",
            "/greedy ": "Tokens are drawn now, with temperature 100.",
            "/base": "There is no adapter to switch off.",
            "/think": "The model's chat format has no place for thoughts: it answers as before.",
            "/system be kind": "A new conversation begins, with this system prompt.",
            "/help": "Ctrl-C stops it",
            "/x": "There is no command /x.",
        }.items():
            terminal.until("> ")
            terminal.send(f"{keys}\r")
            assert "cut at" not in terminal.until(told)
        assert terminal.until("> ").count("\x1b[2m") == 0
        terminal.send("\x04")
        assert terminal.end() == 0 and terminal.all.endswith("\n")


def test_lines_of_a_pipe_are_messages():
    words = ["--model", str(MODEL), "--greedy", "--max-tokens", "4", "--compute", "float32"]
    done = subprocess.run([sys.executable, "-m", "minilora", "chat", *words], input=b"Who are you?\n/greedy\n\nHi \xff\n", capture_output=True, check=False,
                          env=os.environ | {"PYTHONPATH": str(ROOT.parent)})  # fmt: skip
    lines = done.stdout.decode().splitlines()
    assert done.returncode == 0 and lines.count("[the answer was cut at 4 tokens: --max-tokens]") == 2
    assert lines[-3] == "Tokens are drawn now, with temperature 1, top_k 50."


def test_what_is_a_command():
    assert (
        is_command("/x")
        and is_command("/system a\nb")
        and not is_command("/usr/bin\nis a folder")
        and not is_command("a")
    )


def test_prompts_that_grow_too_long_are_told(capsys):
    words = ["chat", "--model", str(MODEL), "--greedy", "--device", "cpu", "--max-tokens"]
    assert main([*words, "1", "--prompt", "long " * 510]) == 0
    out = capsys.readouterr().out
    told = out.splitlines()[-3:]
    assert "tokens are more than the 512 positions" in told[0] and "cut at 1 tokens" in told[2]


def test_a_console_writes_no_control_codes_but_its_own(capsys):
    console = Console(force_terminal=True, color_system="standard", legacy_windows=False)
    console.print("a\x1b[2J\u202e\x9b\tb\x00", style="bold")
    assert re.sub(r"\x1b\[[01]m", "", capsys.readouterr().out) == "a\\u001b[2J\\u202e\\u009b    b\\u0000\n"


def test_no_columns_are_as_many_as_are_not_told(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "0")
    Console().print("hello")
    assert capsys.readouterr().out == "hello\n"


def test_names_are_shown_as_they_are_in_every_place_of_rich(capsys):
    console, name = Console(width=200), "[red]a[/q] :100: 1"
    table = Table(name, title=name, caption=name)
    table.add_row(name)
    for shown in (name, table):
        console.print(shown)
    console.say(name)
    console.rule(name)
    assert capsys.readouterr().out.count(name) == 1 + 4 + 1 + 1


@pytest.mark.parametrize(
    "command",
    [
        "data split --data rows.json --val 2 --output out",
        "train --model model --data rows.json --max-steps 1 --lora-r 2 --batch-size 4 --device cpu --output out",
        "predict --model model --data rows.json --max-tokens 1 --output out",
        "data score --model model --data rows.json --scores out",
    ],
)
def test_the_work_goes_on_when_its_reader_has_gone(tmp_path, monkeypatch, command):
    """As in `minilora train ... | head -1`."""
    make_model(tmp_path / "model", num_hidden_layers=1)
    make_rows(tmp_path / "rows.json")
    monkeypatch.chdir(tmp_path)
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(command.split()) == 0
        monkeypatch.undo()
    assert (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["inspect", "model"], ["chat", "--prompt", "x", "--model"]])
def test_names_of_files_do_not_steer_the_terminal(tmp_path, capsys, words):
    folder = tmp_path / "a\x1b[31m\u202e\x9bb"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "\\u001b[2J"}')
    assert main([*words, str(folder)]) == 4
    out, err = capsys.readouterr()
    assert not re.search("[\x1b\u202e\x9b]", out + err) and "\\u001b[31m\\u202e\\u009bb" in out + err


def test_there_is_one_door_to_the_terminal():
    """What prints by itself is known; all others go through terminal.say or console.Console."""
    printing = {
        str(p.relative_to(ROOT))
        for folder in (ROOT, ROOT / "kernels", ROOT / "models")
        for p in folder.rglob("*.py")
        if re.search(r"(?<!\.)\bprint\(|sys\.stdout\.write|rich\.console import Console", p.read_text())
    }
    assert printing == {
        "__main__.py",
        "checkpoint/unpickle.py",
        "cli/completion.py",
        "console.py",
        "rows/workbook_cells.py",
        "terminal.py",
        "tools/chat.py",
        "tools/typed.py",
    }
