"""Gather the layers of a sharded base as they compute (shard.py).

    forward     embedding 0 1 2 3 head        before a unit computes, its parts are gathered from all ranks
    backward                3 2 1 0           once more: a weight that the forward saved by reference holds its values again

Nothing is freed: the next unit overwrites the last one. A frozen base has no gradient, so nothing is reduced. The bits are those of a base that
is not sharded: the same kernels read the same values.
"""

from collections import deque
from typing import Any

import torch
from torch import Tensor

from minilora.models.decoder import Decoder

from .ranks import Ranks
from .shard import ShardBytes, Unit, Units, whole_bytes


class Shards:
    """The units of a model on this rank, gathered as its layers ask for them.

    All ranks gather the same units in the same order: a rank that has no stream while others have one serves them.
    """

    def __init__(self, model: Decoder, ranks: Ranks, device: torch.device, passes: tuple[bool, ...], ahead: bool):
        self.ranks, self.device, self.passes, self.ahead = ranks, device, passes, ahead
        self.units = Units.of(model, ranks.count)
        self._whole = whole_bytes(model, self.units)
        embedding, blocks, head = self.units
        sizes = self.units.buffers(ranks.count, ahead)
        buffers = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
        for i, unit in enumerate(dict.fromkeys([head, *reversed(blocks), embedding])):
            unit.lay(buffers[i % len(buffers)] if unit is not embedding else buffers[0], ranks.rank, ranks.count)
        self._coming: deque[Unit] = deque()
        self._here: Unit | None = None
        self._on_its_way: list[Any] | None = None

        model.embedding.register_forward_pre_hook(lambda *_: self.begin())
        for unit in blocks:
            unit.module.register_forward_pre_hook(lambda *_, unit=unit: self.need(unit))
            unit.module.register_forward_hook(lambda *args, unit=unit: self._before_backward(unit, args[-1]))
        model.norm.register_forward_hook(lambda *_: self.need(head))  # its weight is read after the norm, by no module

    @property
    def bytes(self) -> ShardBytes:
        """What this rank has and receives; of the backward, once it is known which linears have adapters."""
        return self.units.bytes(self.ranks.count, self.ahead, self._whole)

    def begin(self) -> None:
        """A pass begins, with a backward if gradients are recorded, and its first unit is needed."""
        assert not self._coming, [unit.path for unit in self._coming]
        self._coming.extend(self.units.order(torch.is_grad_enabled()))
        self._here = None
        self.need(self._coming[0])

    def need(self, unit: Unit) -> None:
        """What is computed from now on finds the unit in its buffer."""
        if unit is self._here:
            return
        assert self._coming[0] is unit, (self._coming[0].path, unit.path)
        with self.ranks.exchanging():
            if self._on_its_way is None:
                self._on_its_way = unit.gather()
            self.ranks.wait(self._on_its_way, self.device)
            self._here, self._on_its_way = self._coming.popleft(), None
            # all that reads the other buffer was launched before
            if self._coming and self._coming[0].buffer is not unit.buffer:
                self._on_its_way = self._coming[0].gather()

    def serve(self) -> None:
        """Take part in the passes of a stream of other ranks, while this one has none."""
        for backward in self.passes:
            with torch.set_grad_enabled(backward and torch.is_grad_enabled()):
                self.begin()
            while self._coming:
                self.need(self._coming[0])

    def _before_backward(self, unit: Unit, y: Tensor) -> None:
        if y.requires_grad:
            y.register_hook(lambda _: self.need(unit))

    def note(self) -> str:
        """What of the base a rank has, for people."""
        b, gathers = self.bytes, "the next one while one computes" if self.ahead else "one at a time"
        stream = sum(b.training if backward else b.evaluation for backward in self.passes)
        return (
            f"base sharded over {self.ranks.count} ranks: {_size(b.kept)} of {_size(b.base)} each; layers are gathered in {_size(b.buffers)}, "
            f"{gathers} ({_size(b.block)} a block); a stream brings each rank {_size(stream)}"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
