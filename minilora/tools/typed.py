"""What is typed on a terminal: lines that can be edited, a pasted text in one piece, and a history that stays."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ..errors import DataError
from ..files.regular import read_file
from ..files.strict_json import parse_json

MOST, LONGEST = 1000, 10_000  # messages in the history, characters of one of them


def typed(prompt: str) -> Iterator[str]:
    """The texts that are typed or pasted, each ended by Enter, up to Ctrl-D or Ctrl-C."""
    try:
        import readline
    except ImportError:  # a Python without it: the terminal's own editing of a line
        readline = None
    history = history_file()
    if readline:
        if os.environ.get("TERM") != "dumb":  # it would show the codes
            readline.parse_and_bind("set enable-bracketed-paste on")
        for text in recall(history) if history else []:
            with suppress(ValueError):  # NUL
                readline.add_history(text)
    while True:
        try:
            text = input(prompt)
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if history and text.strip():
            remember(history, text)
        yield text


def history_file() -> Path | None:
    """Where the history lies; None for a user without a home."""
    state = os.path.expanduser(os.environ.get("XDG_STATE_HOME") or "~/.local/state")
    return Path(state, "minilora", "chat_history") if os.path.isabs(state) else None


def recall(path: Path) -> list[str]:
    """The last texts of a history, the oldest first, each a line of JSON; older ones leave the file."""
    try:
        lines = read_file(path, DataError).decode("utf-8", "replace").splitlines()
    except (OSError, DataError):
        return []
    if len(lines) > MOST:
        lines = lines[-MOST:]
        with suppress(OSError):
            stage = path.with_name(f".tmp-{path.name}")
            with open(stage, "w", encoding="utf-8", opener=_private) as file:
                file.writelines(line + "\n" for line in lines)
            os.replace(stage, path)
    texts = []
    for line in lines:
        with suppress(ValueError):
            texts.append(parse_json(line))
    return [text for text in texts if isinstance(text, str)]


def remember(path: Path, text: str) -> None:
    """Add a text to a history that only its user can read; a place that cannot be written keeps none."""
    if len(text) > LONGEST:
        return
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8", opener=_private) as file:
            file.write(json.dumps(text) + "\n")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
