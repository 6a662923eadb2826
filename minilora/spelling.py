"""What a user meant by a word: the name that it is a slip of, and the words of a switch."""

import difflib
from collections.abc import Iterable

HARMFUL = {"--overwrite", "--any-base", "--allow-partial"}  # meant by nearly the same word alone
SWITCH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def nearest(word: str, names: Iterable[str]) -> str:
    """The name that a word is a slip of; "" where it is another word, such as one that begins with another part."""
    for name in difflib.get_close_matches(word, list(names), n=3, cutoff=0.7):
        first, other = (text.replace("_", "-").lstrip("-").split("-")[0] for text in (word, name))
        if (first.startswith(other) or alike(first, other) >= 0.7) and (
            name not in HARMFUL or alike(word, name) >= 0.9
        ):
            return name
    return ""


def alike(a: str, b: str) -> float:
    """From 0 for two words without a common letter to 1 for the same word."""
    return difflib.SequenceMatcher(None, a, b).ratio()
