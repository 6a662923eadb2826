"""Triton or torch: the one switch that every operation asks."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from minilora.kernels.lang import HAVE_TRITON, INTERPRETED

_on = True


def use_triton(*tensors: Tensor) -> bool:
    """Whether an operation on these tensors runs its Triton kernels: all on a GPU, or under Triton's interpreter."""
    return _on and HAVE_TRITON and (INTERPRETED or all(t.is_cuda for t in tensors))


@contextmanager
def force(on: bool) -> Iterator[None]:
    """Turn the kernels off, or on again, for the calls inside; a backward follows its own forward."""
    global _on
    before, _on = _on, on
    try:
        yield
    finally:
        _on = before
