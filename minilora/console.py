"""rich's console as every command uses it."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console as RichConsole
from rich.segment import Segment

from .terminal import printable, prints, without_reader


class Console(RichConsole):
    """A console that shows a text as it is, in every place of rich: no markup, no names of emoji, no control codes but those of styles."""

    def __init__(self, **options: Any):
        super().__init__(highlight=False, markup=False, emoji=False, **options)
        self.quiet |= not prints()
        self._width, self._height = self._width or None, self._height or None  # COLUMNS=0 is unset, as elsewhere

    def say(self, text: str = "") -> None:
        """Print a text with line breaks only where it has them."""
        self.print(text, soft_wrap=True)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        without_reader(self.file)

    def render(self, *args: Any, **named: Any) -> Iterable[Segment]:
        for segment in super().render(*args, **named):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)
