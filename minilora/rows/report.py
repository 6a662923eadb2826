"""Counts of what became of the rows of a data set, and the lines of a header that say so."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .keys import ignored_notes


@dataclass
class Report:
    """What became of the rows of a data set."""

    rows: int = 0
    examples: int = 0  # more than the rows that were kept if raw texts were cut into pieces
    shapes: Counter = field(default_factory=Counter)
    dropped: Counter = field(default_factory=Counter)  # limit -> rows over it
    first_dropped: str = ""
    broken: Counter = field(default_factory=Counter)  # reason -> rows that could not be used
    first_broken: str = ""
    cut: Counter = field(default_factory=Counter)  # limit -> rows shortened to it
    tokens: int = 0
    trained: int = 0
    longest: int = 0
    defined: Counter = field(default_factory=Counter)  # {{key}} -> times it was filled
    undefined: Counter = field(default_factory=Counter)  # {{key}} -> rows that hold it unfilled
    ignored: Counter = field(default_factory=Counter)  # key -> rows that hold it and leave it out on request
    unanswered: int = 0  # rows whose last message no answer follows
    marked: int = 0  # rows whose texts hold marks of a chat format
    notes: list[str] = field(default_factory=list)  # how a file was read

    def add(self, other: "Report") -> None:
        """Take in the report on another file."""
        for name, theirs in vars(other).items():
            mine = getattr(self, name)
            if isinstance(mine, Counter):
                mine.update(theirs)
            elif isinstance(mine, str):
                setattr(self, name, mine or theirs)
            else:
                setattr(self, name, max(mine, theirs) if name == "longest" else mine + theirs)

    @property
    def kept(self) -> int:
        """Rows that are examples."""
        return self.rows - sum(self.dropped.values()) - sum(self.broken.values())

    def __str__(self) -> str:
        shapes = ", ".join(self.shapes)
        share = 100 * self.trained / max(self.tokens, 1)
        text = f"{self.kept:,} rows ({shapes})  {self.tokens:,} tokens, {self.trained:,} trained ({share:.0f} %)  longest {self.longest:,}"
        if self.examples > self.kept:
            text += f"\nraw text in {self.examples:,} pieces"
        for note in self.notes + ignored_notes(self.ignored):
            text += f"\n{note}"
        if self.dropped:
            text += f"\ndropped {sum(self.dropped.values()):,} of {self.rows:,} rows: {_over(self.dropped)} (first: {self.first_dropped})"
        if self.cut:
            text += f"\ncut {sum(self.cut.values()):,} of {self.rows:,} rows: {_over(self.cut)}"
        if self.broken:
            text += f"\nleft out {sum(self.broken.values()):,} of {self.rows:,} rows: {counted(self.broken)} (first: {self.first_broken})"
        if self.unanswered:
            text += f"\nnote: {self.unanswered:,} rows end with a message that no answer follows; it teaches nothing"
        if self.marked:
            text += f"\nnote: {self.marked:,} rows hold marks such as <|im_start|>, which are plain text to the model; inspect data shows them"
        for key, rows in self.undefined.items():
            text += f"\nnote: {rows:,} rows hold {{{{{key}}}}} as it is; --define {key}=TEXT fills it"
        return text


def _over(limits: Counter) -> str:
    return ", ".join(f"{n:,} over {limit}" for limit, n in limits.items())


def counted(reasons: Counter) -> str:
    """3 empty answer, 1 broken JSON."""
    return ", ".join(f"{n:,} {reason}" for reason, n in reasons.most_common())


def ending_note(trained: np.ndarray) -> str:
    """What a header says where the token that ends an answer is not trained; `trained` counts the trained tokens of rows."""
    one = int((trained == 1).sum())
    return f"the token that ends an answer is not trained; {one:,} of {len(trained):,} rows have one trained token"
