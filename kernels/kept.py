"""What a block under activation checkpointing keeps of its first pass because it is small, though it takes long to make.

That is S = drop(x) A^T of every group of linears: R numbers a token, for which K would be read once more. A pass inside
`keeping` adds each S to a list; one inside `giving` takes them from there, in the same order, in the place of making
them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor


class _Kept:
    """What holds for the calls inside a context."""

    added: list[Tensor] | None = None
    taken: Iterator[Tensor] | None = None


@contextmanager
def keeping(tensors: list[Tensor]) -> Iterator[None]:
    """Every S that is made inside is added to a list."""
    _Kept.added = tensors
    try:
        yield
    finally:
        _Kept.added = None


@contextmanager
def giving(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Those of a list take the place of every S that would be made inside."""
    _Kept.taken = iter(tensors)
    try:
        yield
    finally:
        _Kept.taken = None


def keep(s: Tensor | None) -> Tensor | None:
    """s, which is added to the list."""
    if _Kept.added is not None and s is not None:
        _Kept.added.append(s)
    return s


def given() -> Tensor | None:
    """The next one of the list; None outside of `giving`."""
    return None if _Kept.taken is None else next(_Kept.taken)
