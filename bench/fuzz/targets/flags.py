"""A command line, one word a line, up to where the command would begin."""

import argparse
import contextlib
import errno
import io
from importlib import import_module
from random import Random
from typing import Any, NoReturn
from unittest import mock

from minilora import __main__ as command_line
from minilora.cli.arguments import add_arguments, keywords
from minilora.cli.parser import Parser
from minilora.config import FIELDS
from minilora.errors import UsageError
from minilora.settings import resolve

from ..mutator import TEXTS
from ..mutator import mutate as mutated

VALUES = (
    "m",
    "0",
    "1",
    "-1",
    "0.5",
    "1e400",
    "nan",
    "inf",
    "1e-4",
    "99999999999999999999",
    "a=b",
    "a=b,c",
    "on",
    "off",
    "true",
    "nf4",
    "q_proj,v_proj",
    "cpu",
    "",
    "--",
    "=",
    *TEXTS,
)
CODES = (8,)  # a file to write is there already, such as /dev/zero
FLAGS: dict[str, list[str]] = {}  # of each command, the words that go before them joined by line ends
SEEDS: list[bytes] = []


def prepare() -> None:
    """The flags of every command, from its signature, and a line with what it needs."""
    names = [name for name in command_line.COMMANDS if name not in command_line.SUBCOMMANDS]
    names += [f"{group}\n{name}" for group, found in command_line.SUBCOMMANDS.items() for name in found]
    for name in names:
        parser = Parser(allow_abbrev=False)
        add_arguments(parser, import_module(f"minilora.cli.{name.replace(chr(10), '_')}").run)
        FLAGS[name] = [word for word in parser._option_string_actions if word != "--help"]
        words = [name]
        for action in parser._actions:
            if isinstance(action, argparse._HelpAction):
                continue
            value = str(next(iter(action.choices))) if action.choices else "m"
            words += (
                [] if not action.required else [action.option_strings[0], value] if action.option_strings else [value]
            )
        SEEDS.append("\n".join(words).encode())
    SEEDS.extend([b"--help", b"--version", b"help\ntrain", b"train\n--help"])


class _Parsed(Exception):
    pass


def _seen(command: Any, given: dict[str, Any]) -> NoReturn:
    """In the place of what gives a command its arguments: the command itself is not run."""
    arguments = keywords(command, given)
    if "settings" in command.__annotations__:
        resolve({name: value for name, value in arguments.items() if name in FIELDS})
    raise _Parsed


def target(data: bytes) -> None:
    words = data.decode("utf-8", "surrogateescape").split("\n")
    told = io.StringIO()
    with (
        mock.patch.object(command_line, "keywords", _seen),
        contextlib.redirect_stdout(told),
        contextlib.redirect_stderr(told),
    ):
        try:
            command_line.run(words)
        except _Parsed:
            pass
        except OSError as error:
            if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
                raise
            raise UsageError(str(error)) from None  # as main tells it
        except SystemExit as end:  # --help and --version
            if end.code:
                raise UsageError(f"ended with {end.code}", "") from None


def mutate(data: bytes, random: Random, other: bytes) -> bytes:
    """Flags of the command with values, mostly; else any change."""
    text = data.decode("utf-8", "replace")
    name = next((name for name in FLAGS if text == name or text.startswith(f"{name}\n")), None)
    if name is None or random.random() < 0.15:
        return mutated(data, random, [*FLAGS, "--\n", "\n"], other)
    more = []
    for _ in range(random.randint(1, 5)):
        flag, value = random.choice(FLAGS[name]), random.choice(VALUES)
        more += random.choice(([flag, value], [flag, value], [f"{flag}={value}"], [flag], [value]))
    return "\n".join([text, *more]).encode("utf-8", "surrogatepass")
