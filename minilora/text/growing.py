"""The text of an answer as it grows, token by token."""

from collections.abc import Callable, Sequence

CONTEXT = 8  # tokens before those that are decoded: a piece may be written otherwise at the start of a text


class Growing:
    """The text that ids have after those of `before`, as more of them come: only the last few are decoded anew."""

    def __init__(self, decode: Callable[[list[int]], str], before: Sequence[int] = ()):
        self._decode, self._before = decode, [*before]
        self._count, self._text = 0, ""  # ids whose text stands, and their text

    def text(self, ids: list[int]) -> str:
        known = len(self._decode(self._before))
        text = self._text + self._decode(self._before + ids[self._count :])[known:]
        if len(ids) >= self._count + 2 * CONTEXT and not text.endswith("\ufffd"):  # half a character
            self._before, self._count, self._text = ids[-CONTEXT:], len(ids), text
        return text
