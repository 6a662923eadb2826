"""Errors that a user can cause: what went wrong and where, what to do about it, and an exit code. Never a traceback."""


class MiniloraError(Exception):
    """Something that a user typed, or that a file holds, does not work. `what` says what and where, `hint` what to do."""

    code = 70

    def __init__(self, what: str, hint: str = ""):
        super().__init__(what)
        self.what, self.hint = what, hint

    def __str__(self) -> str:
        return f"{self.what}\n{self.hint}" if self.hint else self.what


class UsageError(MiniloraError):
    """A flag or a setting is wrong."""

    code = 2


class DataError(MiniloraError):
    """A file of rows cannot be used."""

    code = 3


class RowError(DataError):
    """A row that cannot be used; rows that are left out are counted under `reason`, a short name."""

    def __init__(self, reason: str, what: str, hint: str):
        super().__init__(what, hint)
        self.reason = reason


class ModelError(MiniloraError):
    """A model, adapter or tokenizer file cannot be used."""

    code = 4


class Diverged(MiniloraError):
    """A loss or a gradient is not finite."""

    code = 5


def not_finite(what: str) -> Diverged:
    """The error for what a model computed from weights that are finite."""
    hint = "Weights of the model or of the adapter are damaged, or too large for the dtype that it computes in (--compute float32)."
    return Diverged(f"{what} is not finite (NaN or infinity)", hint)


class DiskError(MiniloraError):
    """The disk is full, read-only or broken."""

    code = 6


class OutOfMemory(MiniloraError):
    """The machine or the GPU has too little memory."""

    code = 7


class OutputInUse(MiniloraError):
    """The output folder holds something already, or another run works in it."""

    code = 8


class CheckpointMismatch(MiniloraError):
    """The checkpoint does not belong to the run that resumes from it."""

    code = 9


class RankLost(MiniloraError):
    """Another rank died, hangs or ended; `code` is that rank's if it told one, and there are no words where it says them itself."""

    code = 10

    def __init__(self, code: int, what: str):
        super().__init__(what)
        self.code = code


class Stopped(MiniloraError):
    """A signal stopped the run; its state is saved."""

    code = 75


def quote(text: str, limit: int = 80) -> str:
    """Text from a file or a user for a message: one short line, control characters escaped."""
    return repr(text if len(text) <= limit else text[:limit] + "…")
