"""What a user meant by a word: the name it misspells, or a switch turned on or off."""

import difflib
from collections.abc import Iterable

HARMFUL = {"--overwrite", "--any-base", "--allow-partial"}  # suggested only for nearly the same word
SWITCH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def nearest(word: str, names: Iterable[str]) -> str:
    """The name that a word misspells; "" if it is a word of its own, such as one whose first part differs."""
    for name in difflib.get_close_matches(word, list(names), n=3, cutoff=0.7):
        first, other = (text.replace("_", "-").lstrip("-").split("-")[0] for text in (word, name))
        if (first.startswith(other) or alike(first, other) >= 0.7) and (
            name not in HARMFUL or alike(word, name) >= 0.9
        ):
            return name
    return ""


def alike(a: str, b: str) -> float:
    """How similar two words are: 0 with no letter in common, 1 for the same word."""
    return difflib.SequenceMatcher(None, a, b).ratio()
