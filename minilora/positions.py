"""Learned positions (GPT-2): a document can have no more tokens than its model has positions."""

import math

from minilora.models.decoder import Decoder

from .errors import DataError


def room(model: Decoder) -> float:
    """The most tokens of a document, infinite with rotary positions. Virtual tokens take up positions too."""
    return math.inf if model.config.rotary else model.config.max_positions - getattr(model.virtual, "count", 0)


def check_room(model: Decoder, what: str, tokens: int, hint: str = "") -> None:
    """DataError for a document, `what`, of more tokens than its model has room for."""
    most = room(model)
    if tokens > most:
        virtual = f", {model.config.max_positions - most} of them for virtual tokens" if model.virtual else ""
        raise DataError(
            f"{what} has {tokens:,} tokens, and the model has {model.config.max_positions:,} learned positions{virtual}",
            hint
            or f"--max-length {most} leaves longer rows out and counts them; with --truncate cut it shortens them.",
        )
