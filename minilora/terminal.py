"""Lines for a terminal: text of a model, a row or a file name reaches it without control codes."""

import json
import os
import shlex
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import IO

STEERS = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control codes, text direction, lone surrogates, other line ends
JOINER = "\u200d"  # joins several emoji into one
LONGEST = 10_000  # characters of a line


def printable(text: str, whole: bool = False) -> str:
    r"""The text with control codes escaped, as in \u001b; line ends and tabs stay, and JSON keeps its meaning.

    Lines beyond all reason are cut, unless another program wants them whole.
    """
    if not whole and len(text) > LONGEST:
        text = "\n".join(
            line if len(line) <= LONGEST else f"{line[:LONGEST]}… and {len(line) - LONGEST:,} characters more"
            for line in text.split("\n")
        )
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c if c in "\n\t" or c == JOINER or unicodedata.category(c) not in STEERS else json.dumps(c)[1:-1] for c in text
    )


def prints() -> bool:
    """Whether this process says what it does: of the ranks that torchrun started, the first alone."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def say(line: str, quiet: bool = False, whole: bool = False) -> None:
    """Print a line at once; quiet: on standard error, where standard output is for another program; whole: however long it is."""
    if prints():
        stream = sys.stderr if quiet else sys.stdout
        try:
            print(printable(line, whole), file=stream, flush=True)
        except BrokenPipeError:
            without_reader(stream)


def without_reader(stream: IO[str]) -> None:
    """Whoever read the stream has gone: the work goes on, and what it says is read by nobody."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def clock(seconds: float) -> str:
    """Seconds as [hours:]minutes:seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def as_words(words: Iterable[object]) -> list[str]:
    """The words of a command; a path that begins with a dash would be taken for a flag, and gets ./ in front."""
    return [f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word) for word in words]


def shell(*words: object) -> str:
    """A minilora command as a user can type it; places are Paths."""
    return shlex.join(["minilora", *as_words(words)])
