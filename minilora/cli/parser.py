"""argparse for every command: an error is a UsageError that says what is allowed, a switch is --name or --no-name."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from ..errors import UsageError
from ..spelling import SWITCH, nearest
from ..terminal import say

LISTS = {"data", "val", "lora_targets", "ignore_keys", "columns", "model", "adapter"}  # given twice, one would be lost
# names that LLaMA-Factory uses
FOREIGN = {"--model-name-or-path": "--model", "--adapter-name-or-path": "--adapter"}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser for minilora itself, a command, or a subcommand."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, f"See {self.prog} --help.")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As argparse, but no word may be left over, and a switch may be followed by True, False, on, off, ..."""
        words, known = self._plain_switches(args or []), self._option_string_actions
        self._refuse_twice(words)
        if self._subparsers is None:
            # checked first: argparse would say that a flag is missing which is given under a wrong name
            flags = [w for w in words[: words.index("--") if "--" in words else None] if w[:2] == "--" and " " not in w]
            unknown = next((w for w in flags if w.partition("=")[0] not in known), None)
            if unknown is not None:
                raise self._unknown(unknown)
        found, rest = super().parse_known_args(words, namespace)
        if rest:
            raise self._unknown(rest[0])
        return found, rest

    def _plain_switches(self, args: Sequence[str]) -> list[str]:
        """The words with `--name on` replaced by --name and `--name=off` by --no-name."""
        words: list[str] = []
        for word in args:
            name, mark, value = word.partition("=")
            if not mark:
                name, value = words[-1] if words else "", word
            action = self._option_string_actions.get(name)
            on = SWITCH.get(value.lower())
            if not isinstance(action, argparse.BooleanOptionalAction) or (on is None and not mark):
                words.append(word)
                continue
            if on is None:
                raise UsageError(f"{name} is {value!r}", f"Say {' or '.join(action.option_strings[:2])}.")
            if not mark:
                words.pop()
            off = name.startswith("--no-") == on
            words.append(next(n for n in action.option_strings if n.startswith("--no-") == off))
        return words

    def _refuse_twice(self, words: Sequence[str]) -> None:
        """UsageError for a list that is given twice; for any other setting a note that the last one counts."""
        given: dict[str, str] = {}
        for word in words[: words.index("--") if "--" in words else None]:
            name = word.partition("=")[0]
            action = self._option_string_actions.get(name)
            if action is None or isinstance(action, (argparse._AppendAction, argparse._HelpAction)):
                continue
            if action.dest in given:
                first = given[action.dest]
                both = f"{name} is given twice" if first == name else f"{first} and {name} are one setting"
                if action.dest in LISTS:
                    raise UsageError(both, "Give several as one word, with commas.")
                say(f"note: {both}; the last one counts", quiet=True)
            given[action.dest] = name

    def _unknown(self, word: str) -> UsageError:
        word = word.partition("=")[0]
        flag, known = word.replace("_", "-"), self._option_string_actions
        if "--lora-r" in known:  # a command with the settings of a run
            from ..settings import refusal

            refused = refusal(word)
            if refused is not None:
                return refused
        near = FOREIGN.get(flag)
        near = near if near in known else nearest(flag, [name for name in known if "_" not in name])
        if not near:
            return UsageError(f"unknown argument {word!r}", f"See {self.prog} --help.")
        # of several names of a setting, the one in the help
        shown = (a for a in known.values() if a.dest == known[near].dest and a.help != argparse.SUPPRESS)
        own = next((a.option_strings[0] for a in shown), near)
        also = "" if own == near or own in known[near].option_strings else f" ({own} here)"
        return UsageError(f"unknown argument {word!r}", f"Did you mean {near}{also}?")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        allowed = [str(choice) for choice in action.choices]
        near = nearest(str(value), allowed)
        flag = next(iter(action.option_strings), "")
        what = f"{flag} is {value!r}" if flag else f"there is no command {f'{self.prog} {value}'!r}"
        raise UsageError(what, (f"Did you mean {near}? " if near else "") + f"It can be {', '.join(allowed)}.")
