"""What is wrong with a row, for its message and for the count of rows that were left out."""

from ..errors import DataError


class RowError(DataError):
    """One row cannot be used; `reason` is the short name under which such rows are counted."""

    def __init__(self, reason: str, what: str, hint: str):
        super().__init__(what, hint)
        self.reason = reason


def quote(text: str, limit: int = 80) -> str:
    """A stranger's text for a message: one line, short, control characters escaped."""
    return repr(text if len(text) <= limit else text[:limit] + "…")
