"""argparse as every command has it: a complaint is a UsageError that says what is allowed, a switch is --name or --no-name."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from ..errors import UsageError
from ..spelling import SWITCH, nearest
from ..terminal import say

LISTS = {"data", "val", "lora_targets", "ignore_keys", "columns", "model", "adapter"}  # nobody means one of two
# what LLaMA-Factory calls them
FOREIGN = {"--model-name-or-path": "--model", "--adapter-name-or-path": "--adapter"}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser for the word minilora, a command, or what stands after a command."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, f"See {self.prog} --help.")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As argparse, but that nothing may be left over; True, False, on, off, ... may stand after a switch."""
        words, known = self._plain_switches(args or []), self._option_string_actions
        self._refuse_twice(words)
        if self._subparsers is None:
            # before argparse says that something is missing which stands there under another name
            flags = [w for w in words[: words.index("--") if "--" in words else None] if w[:2] == "--" and " " not in w]
            unknown = next((w for w in flags if w.partition("=")[0] not in known), None)
            if unknown is not None:
                raise self._unknown(unknown)
        found, rest = super().parse_known_args(words, namespace)
        if rest:
            raise self._unknown(rest[0])
        return found, rest

    def _plain_switches(self, args: Sequence[str]) -> list[str]:
        """Words with `--name on` as --name and `--name=off` as --no-name."""
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
        """UsageError for a list that is given in two words, of which one would be lost; a note for any other setting."""
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
        if "--lora-r" in known:  # a command that takes the settings of a run
            from ..config import refusal

            refused = refusal(word)
            if refused is not None:
                return refused
        near = FOREIGN.get(flag)
        near = near if near in known else nearest(flag, [name for name in known if "_" not in name])
        if not near:
            return UsageError(f"unknown argument {word!r}", f"See {self.prog} --help.")
        # the name that is shown of a thing with several
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
