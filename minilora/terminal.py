"""Lines for a terminal: no text of a model, a row or a file name can steer it."""

import json
import sys
import unicodedata

STEERS = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, direction, half characters, other line ends
JOINER = "\u200d"  # makes one picture of several


def printable(text: str) -> str:
    r"""A text with \u001b in place of what would steer a terminal; line ends and tabs stay, and JSON keeps its meaning."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c if c in "\n\t" or c == JOINER or unicodedata.category(c) not in STEERS else json.dumps(c)[1:-1] for c in text
    )


def say(line: str, quiet: bool = False) -> None:
    """Print a line at once; on standard error where standard output is for a program."""
    print(printable(line), file=sys.stderr if quiet else sys.stdout, flush=True)
