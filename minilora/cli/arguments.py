"""A command is one function. Its signature gives the arguments of the command line, and each is passed to it by name.

    def run(folder: Annotated[str, Arg("folder of a model", "DIR")], *, json: Annotated[bool, Arg("print JSON")] = False)

takes `[--json | --no-json] DIR`: a keyword-only parameter is a flag, and a parameter without a default is required. A parameter
whose type is a dataclass of settings adds a flag for each field, `**settings: Annotated[Any, Settings()]` one for every setting
of a run, and `**opening: Unpack[Opening]` one for each key of a TypedDict, which is passed on only if it is given.
"""

import argparse
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, is_dataclass
from inspect import Parameter, signature
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, Unpack, get_args, get_origin

METAVARS = {str: "TEXT", int: "N", float: "X", dict: "NAME=TEXT"}


@dataclass(frozen=True)
class Arg:
    """What the type of an argument does not say. `within`: the bounds of a number, both allowed; `aliases` are not in the help."""

    help: str
    metavar: str = ""
    group: str = "options"
    within: tuple[float, float] | None = None
    parse: Callable[[str], Any] | None = None
    short: str = ""
    aliases: Sequence[str] = ()


@dataclass(frozen=True)
class Settings:
    """The settings of a run that a parameter adds: those of these names, or all for which the command has no parameter."""

    names: tuple[str, ...] = ()
    shown: bool = True


def add_arguments(parser: argparse.ArgumentParser, command: Callable[..., Any]) -> None:
    """Give a parser the arguments of a command's signature."""
    parameters = signature(command).parameters
    for name, p in parameters.items():
        kind, about = _parts(p.annotation)
        if is_dataclass(kind):
            _add_settings(parser, about or Settings(tuple(f.name for f in fields(kind))))
        elif isinstance(about, Settings):
            _add_settings(parser, about, set(parameters))
        elif get_origin(kind) is Unpack:
            for key, hint in get_args(kind)[0].__annotations__.items():
                _add(parser, key, *_parts(hint))
        else:
            _add(parser, name, kind, about, p.default, p.kind is p.KEYWORD_ONLY)


def keywords(command: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a command: what was parsed, with settings put into their dataclass; UsageError for a wrong value."""
    given = dict(given)
    for name, p in signature(command).parameters.items():
        kind, _ = _parts(p.annotation)
        if isinstance(kind, type) and is_dataclass(kind):
            from ..settings import convert

            given[name] = kind(**{f.name: convert(f, given.pop(f.name)) for f in fields(kind) if f.name in given})
    return given


def group(parser: argparse.ArgumentParser, title: str) -> Any:
    """The group of a title in a command's help, made when it is first asked for."""
    return next((g for g in parser._action_groups if g.title == title), None) or parser.add_argument_group(title)


def between(kind: type, low: float, high: float) -> Callable[[str], Any]:
    """An argparse type: a number within bounds, both allowed."""
    what = "a whole number" if kind is int else "a number"
    bounds = f"from {low:,g} " + (f"to {high:,g}" if high < 2**31 else "on")

    def number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} {bounds}")
        return value

    return number


def _parts(hint: Any) -> tuple[Any, Any]:
    """The type of a parameter, without None, and its annotation."""
    if get_origin(hint) is Annotated:
        return _parts(hint.__origin__)[0], hint.__metadata__[0]
    if get_origin(hint) in (Union, UnionType):
        return _parts(next(kind for kind in get_args(hint) if kind is not NoneType))
    return hint, None


def _add(
    parser: argparse.ArgumentParser, name: str, kind: Any, arg: Arg, default: Any = None, flag: bool = True
) -> None:
    """Add one argument. Unless it is given it is not parsed at all: the default is the function's."""
    required, many = default is Parameter.empty, get_origin(kind) is list
    kind = get_args(kind)[0] if many else kind
    how: dict[str, Any] = {"default": argparse.SUPPRESS, "help": arg.help.replace("%", "%%")}
    if kind is bool:
        how["action"], default = argparse.BooleanOptionalAction, {True: "on", False: "off"}.get(default)
    elif get_origin(kind) is Literal and not arg.parse:
        how["choices"] = get_args(kind)
    else:
        how["type"] = arg.parse or (between(kind, *arg.within) if arg.within else kind)
        how["metavar"] = arg.metavar or METAVARS.get(kind) or "|".join(get_args(kind))
    if not required and default not in (None, "", {}) and arg.help != argparse.SUPPRESS:
        how["help"] += f" [{default}]"
    if not flag:
        parser.add_argument(name, nargs="+" if many else None if required else "?", **how)
        return
    how["dest"] = name
    if many:
        how["action"] = "append"
    names = [arg.short, "--" + name.rstrip("_").replace("_", "-")]  # for_ is --for
    group(parser, arg.group).add_argument(*filter(None, names), required=required, **how)
    if arg.aliases:
        how["help"] = argparse.SUPPRESS
        parser.add_argument(*arg.aliases, **how)


def _add_settings(parser: argparse.ArgumentParser, which: Settings, own: Collection[str] = ()) -> None:
    """Add a flag, with all its aliases, for each setting except the command's own; config.convert reads the values."""
    from ..config import defaults
    from ..settings import ALIASES, by_group

    default = defaults()
    for title, settings in by_group().items():
        for f in settings:
            if f.name in own or (which.names and f.name not in which.names):
                continue
            kind = list[str] if f.name == "define" else _parts(f.type)[0]
            names = [f.name, *(alias for alias, name in ALIASES.items() if name == f.name)]
            _, *aliases = dict.fromkeys(f"--{n}" for name in names for n in (name.replace("_", "-"), name))
            text = f.metadata["help"] if which.shown else argparse.SUPPRESS
            metavar = METAVARS[dict] if f.name == "define" else ""
            _add(parser, f.name, kind, Arg(text, metavar, title, parse=str, aliases=aliases), default[f.name])
