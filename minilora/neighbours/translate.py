"""Translates a config of another tool key by key: each is translated, ignored or refused, and a line says which and why."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..config import FIELDS
from ..errors import UsageError, quote
from ..settings import ALIASES

LONGEST = 60  # characters of a value that a line shows


class Ignored(NamedTuple):
    """A key that does not change what is learned, and why."""

    why: str


class Refused(NamedTuple):
    """A key that is not supported, unless it is off: why, and what to do."""

    why: str
    hint: str = "Remove it to run without it."


Config = dict[str, Any]
# a setting's name, or what finds settings from a value and the whole config
Rule = str | Ignored | Refused | Callable[[Any, Config], Config | Ignored | Refused]


class Neighbour(NamedTuple):
    """Another tool: its name, whether a config was written for it, what each key means, and its defaults where they differ.

    The rule for "galore_*" applies to every key that begins so and has no rule of its own.
    """

    name: str
    wrote: Callable[[Config], bool]
    rules: dict[str, Rule]
    defaults: Callable[[Config], Config]


OFF = (None, False, 0, "", "none", "no", "off", [], {})
COMPUTE = Ignored("the compute dtype is measured; --compute sets it")
PACKED = Ignored("rows are always packed, and never see each other")
PLACES = Ignored("--gpus N and --shard say how several cards work together")
STREAMED = Ignored("rows are read as a stream")
OWN_KERNELS = Ignored("kernels of this project run wherever they can")
NEW_ADAPTERS = Refused(
    "training starts from new adapters",
    "Go on with a run by --resume, or merge the adapter (minilora merge) and train on it.",
)
FORMAT = Ignored("the chat format is read from the model's folder")


def translated(path: Path, config: Config, of: Neighbour, say: Callable[[str], Any]) -> Config:
    """The settings that a config of another tool means; `say` gets a line for each key. Raises UsageError that names what is refused."""
    settings: Config = {}
    refused: dict[str, Refused] = {}
    for key, value in config.items():
        found = _meant(key, value, config, of)
        if isinstance(found, dict):
            clash = next((name for name in found if name in settings and settings[name] != found[name]), None)
            if clash is not None:
                found = Refused(f"another key gave {clash} {_shown(settings[clash])} already", "Keep one of them.")
        if isinstance(found, Refused):
            refused[key] = found
        elif isinstance(found, dict):
            settings |= found
        say(f"{of.name:<15}{f'{key}: {_shown(value)}':<40} {_told(found)}")
    if refused:
        (first, *more), names = refused.values(), ", ".join(quote(name, 40) for name in refused)
        why = "; the lines above say why" if more else f": {first.why}"
        raise UsageError(f"{path}: {names} cannot be used here{why}", first.hint)
    try:
        defaults = {k: v for k, v in of.defaults(config).items() if k not in settings}
    except (TypeError, ValueError, OverflowError):
        what = f"{path}: the defaults of {of.name} for missing keys cannot be derived from the other keys"
        raise UsageError(what, "Write the model and the ranks, layers and steps into the file, as numbers.") from None
    if defaults:
        say(f"{of.name:<15}{'its defaults':<40} {_told(defaults)}")
    return defaults | settings


def _meant(key: str, value: Any, config: Config, of: Neighbour) -> Config | Ignored | Refused:
    rule = of.rules.get(key) or of.rules.get(f"{key.partition('_')[0]}_*")
    if rule is None and ALIASES.get(key, key) in FIELDS:  # a setting of ours among theirs
        rule = ALIASES.get(key, key)
    if rule is None:
        rule = Refused("it is not known", f"Remove it if the training does not need it: {quote(key, 40)}.")
    if value is None:
        return Ignored("empty")
    try:
        found = {rule: value} if isinstance(rule, str) else rule(value, config) if callable(rule) else rule
    except (TypeError, ValueError, OverflowError, AttributeError, KeyError):
        found = Refused("its value is not one that this tool takes", "Correct it.")
    return Ignored("off") if isinstance(found, Refused) and value in OFF else found


def _told(found: Config | Ignored | Refused) -> str:
    if isinstance(found, (Ignored, Refused)):
        return f"{type(found).__name__.lower()}: {found.why}"
    return "-> " + (", ".join(f"{name} {_shown(value)}" for name, value in found.items()) or "nothing: already so here")


def _shown(value: Any) -> str:
    """A value as yaml and flags write it, on one line."""
    plain = {True: "true", False: "false", None: "null"}
    text = " ".join(str(plain[value] if value is None or isinstance(value, bool) else value).split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def one_of(values: dict[Any, Config | Ignored | Refused], otherwise: Refused) -> Rule:
    """A rule that looks the value up."""
    return lambda value, config: values[value] if isinstance(value, str | int) and value in values else otherwise


def only(value_here: Any, why: str) -> Rule:
    """A rule for what has one value here: that one is ignored, and any other refused."""
    return lambda value, config: Ignored("always so here") if value == value_here else Refused(why)


def adamw(value: Any, config: Config) -> Ignored | Refused:
    """The optimizers that are AdamW, or Adam without decay, whatever the precision of their state."""
    name = str(value).lower().removeprefix("paged_")
    return Ignored("AdamW is the optimizer") if name.startswith("adam") else Refused("AdamW is the optimizer")
