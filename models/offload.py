"""Inputs of checkpointed layers in pinned host memory, between the forward pass and the backward.

    forward     compute  0 1 2 3        the input of a layer leaves while the layer runs, and is let go with the next one
                copies   0 1 2 3
    backward    compute  3 2 1 0        while a layer runs, the input of the layer below comes back
                copies   2 1 0

So a GPU holds the inputs of two layers, not of all. Copies have a stream of their own. An input of 8192 tokens of a 7B
model is 59 MB; PCIe at 25 GB/s takes 2.4 ms for it. Not run on a GPU yet.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Moving(NamedTuple):
    """An input that is on its way, to the host or back."""

    number: int
    x: Tensor
    arrived: Any


class Offload:
    """The inputs of a stack of layers, in one forward pass and its backward."""

    def __init__(self, device: torch.device):
        self.device = device
        self.side = SideStream(device) if device.type == "cuda" else AtOnce()
        self.host: list[Tensor] = []
        self.moving: Moving | None = None

    def keep(self, x: Tensor) -> int:
        """Take the input of the next layer; its number."""
        if self.moving is not None:
            self.side.wait(self.moving.arrived)  # from here on, the memory of the input before may be another's
        number, x = len(self.host), x.detach()
        self.host.append(torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.is_cuda))
        self.moving = Moving(number, x, self.side.copy(self.host[number], x))
        return number

    def fetch(self, number: int) -> Tensor:
        """The input of that layer again; the one of the layer below sets out."""
        if self.moving is None or self.moving.number != number:
            self.moving = self._back(number)
        x = self.moving.x
        self.side.wait(self.moving.arrived)
        self.moving = self._back(number - 1) if number else None
        return x

    def _back(self, number: int) -> Moving:
        x = torch.empty_like(self.host[number], device=self.device, pin_memory=False)
        return Moving(number, x, self.side.copy(x, self.host[number]))


class SideStream:
    """Copies of a GPU beside its computing."""

    def __init__(self, device: torch.device):
        self.stream = _stream(device)

    def copy(self, to: Tensor, source: Tensor) -> Any:
        """Copy after all that was launched so far; gives the event of its end."""
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            to.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def wait(self, event: Any) -> None:
        """What is launched from now on comes after that event."""
        torch.cuda.current_stream(self.stream.device).wait_event(event)


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class AtOnce:
    """The same where there are no streams: on a CPU, for tests, and of tensors without data, which are counted."""

    def copy(self, to: Tensor, source: Tensor) -> None:
        if not source.is_meta:
            to.copy_(source)

    def wait(self, event: None) -> None:
        pass
