"""Are our ids those of the folder's own chat template? The Jinja text is rendered in a process without rights, and compared."""

from collections.abc import Sequence
from typing import NamedTuple

from ..errors import ModelError
from ..files.model_folder import Folder, ModelFolder
from .own_template import Order, render
from .template import Message, has_thought, jinja_text
from .tokenizer import Tokenizer

AROUND = 6  # tokens shown on each side of a difference


class Difference(NamedTuple):
    """The first place where the ids part: the chat's number, the token's number, and text and ids from there on each side."""

    chat: int
    token: int
    before: str
    ours: str
    theirs: str
    our_ids: list[int]
    their_ids: list[int]


class TemplateCheck(NamedTuple):
    """What came of a comparison; error: why the folder's template gave no text, if it did not."""

    chats: int
    same: int
    first: Difference | None
    error: str | None


def check_template(folder: Folder, tokenizer: Tokenizer, chats: Sequence[list[Message]]) -> TemplateCheck:
    """Compare the ids of whole chats, and of the prompt of each one's last answer, with those of the folder's template.

    Raises ModelError if the folder has no template, or it does not end in time.
    """
    folder = ModelFolder.of(folder)
    text = jinja_text(folder)
    if text is None:
        raise ModelError(f"{folder} has no chat template of its own", "There is nothing to compare with.")
    wanted = [(number, messages, False) for number, messages in enumerate(chats)]
    wanted += [(number, messages[:-1], True) for number, messages in enumerate(chats) if len(messages) > 1]
    form = tokenizer.template.tools
    orders = [Order(messages, prompt, not prompt and has_thought(messages), form) for _, messages, prompt in wanted]
    rendered = render(folder, text, orders)
    good, first, error = set(range(len(chats))), None, None
    for (number, messages, prompt), (theirs, refused) in zip(wanted, rendered, strict=True):
        if theirs is None:
            good.discard(number)
            error = error or refused
            continue
        mine = tokenizer.render(messages, prompt=prompt)[0]
        other = tokenizer.encode(theirs, specials=True)
        # the token that closes the last turn is ours to learn; some templates leave it to the next turn
        closed = not prompt and mine[:-1] == other and mine[-1] in tokenizer.stop_ids
        if mine != other and not closed:
            good.discard(number)
            first = first or _difference(number, mine, other, tokenizer)
    return TemplateCheck(len(chats), len(good), first, error)


def _difference(number: int, mine: list[int], other: list[int], tokenizer: Tokenizer) -> Difference:
    at = next((i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), min(len(mine), len(other)))
    before, ours, theirs = mine[max(at - AROUND, 0) : at], mine[at : at + AROUND], other[at : at + AROUND]
    texts = [tokenizer.decode(ids, specials=True) for ids in (before, ours, theirs)]
    return Difference(number, at, texts[0], texts[1], texts[2], ours, theirs)
