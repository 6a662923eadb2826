"""The base model shared out among the ranks (`--shard on`): each keeps 1/N of its bytes, and gathers the layer that computes.

    unit        what is gathered together: the embedding, a block, the head. Its frozen tensors, of any dtype, lie one after
                the other in a row of bytes; those that one GEMM reads together lie side by side
    part        the N-th of these bytes that a rank keeps
    buffer      where units are gathered in turn (gather.py); the tensors of a unit are views of its buffer for good

A rank has its parts, a buffer for the largest unit and, if the next unit comes while one computes, a second buffer for the largest block.
Adapters stay whole on every rank: they are about a hundredth of the base, and their gradients travel in one buffer a step, with
shards as without. The final norm, D numbers, stays whole too.

FSDP2 (fully_shard of torch 2.13) was tried first. It gathers q, k and v into memory of their own, so that one GEMM cannot read them; it
leaves buffers whole, such as the codes of a quantised weight; and a run hangs where one rank has more streams than another.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minilora.models.decoder import Decoder
from minilora.models.gathered import GatheredWeight

all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name before torch 2.13
ALIGN = 128  # bytes, of the start of a tensor and of a part: no element lies in two parts


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def span(t: Tensor) -> tuple[int, int]:
    """From which byte of its storage to which a contiguous tensor lies."""
    start = int(t.storage_offset()) * t.itemsize
    return start, start + t.nbytes


class Place(NamedTuple):
    """A frozen tensor, the module that holds it and its name there, and the byte of its unit at which it begins."""

    module: nn.Module
    name: str
    tensor: Tensor
    start: int


class Unit:
    """The frozen tensors of a module, and how they lie; those of one storage (packed weights) keep their places in it."""

    def __init__(self, path: str, module: nn.Module, ranks: int):
        self.path, self.module, self.places, self.size = path, module, list[Place](), 0
        starts: dict[int, int] = {}
        for part in module.modules():
            for name, t in (part._parameters | part._buffers).items():
                if t is None or name.startswith("lora_"):
                    continue
                storage = t.untyped_storage()
                if storage._cdata not in starts:
                    starts[storage._cdata] = self.size
                    self.size += _aligned(storage.nbytes())
                self.places.append(Place(part, name, t, starts[storage._cdata] + span(t)[0]))
        self.part = _aligned(-(-self.size // ranks))

    def lay(self, buffer: Tensor, rank: int, ranks: int) -> None:
        """Make the tensors views of a buffer of bytes, and room for this rank's part of them."""
        self.buffer, self.whole = buffer, buffer[: self.part * ranks]
        self.start, self.end = rank * self.part, (rank + 1) * self.part
        self.own = torch.empty(self.part, dtype=torch.uint8, device=buffer.device)
        for module, name, t, start in self.places:
            # data: a write to the buffer is no new version of what autograd saved
            view = buffer.data.view(t.dtype).as_strided(t.shape, t.stride(), start // t.itemsize)
            setattr(module, name, GatheredWeight(view, False) if isinstance(t, nn.Parameter) else view)
        self.places.clear()

    def owned(self, start: int, end: int) -> tuple[int, int]:
        """The bytes of this rank's part among these bytes of the unit: from, to; none where from >= to."""
        return max(start, self.start), min(end, self.end)

    def keep(self, start: int, end: int) -> None:
        """Copy what is this rank's of these bytes from the buffer into its part."""
        low, high = self.owned(start, end)
        if low < high:
            self.own[low - self.start : high - self.start].copy_(self.whole[low:high])

    def gather(self) -> list[Any]:
        """Begin to gather the unit in its buffer; what to wait for."""
        if self.whole.is_cuda:
            return [all_gather(self.whole, self.own, async_op=True)]
        # gloo's all_gather has a buffer of its own, as large as the unit
        self.whole[self.start : self.end].copy_(self.own)
        return [dist.broadcast(part, rank, async_op=True) for rank, part in enumerate(self.whole.split(self.part))]


class Units(NamedTuple):
    """The units of a model; a head that is the embedding is one unit with it."""

    embedding: Unit
    blocks: list[Unit]
    head: Unit

    @staticmethod
    def of(model: Decoder, ranks: int) -> "Units":
        names = model.names
        embedding = Unit(names.embedding, model.embedding, ranks)
        blocks = [Unit(f"{names.layers}.{i}", block, ranks) for i, block in enumerate(model.blocks)]
        head = embedding if model.config.tied else Unit(names.head, model.get_submodule(names.head), ranks)
        return Units(embedding, blocks, head)

    @property
    def each(self) -> list[Unit]:
        return list(dict.fromkeys([self.embedding, *self.blocks, self.head]))

    def order(self, backward: bool) -> list[Unit]:
        """The units in the order in which the pass of a stream needs them: in the backward, the blocks that it goes through."""
        first = next(
            (i for i, u in enumerate(self.blocks) if any(p.requires_grad for p in u.module.parameters())), None
        )
        back = self.blocks[first:][::-1] if backward and first is not None else []
        return [self.embedding, *self.blocks, self.head, *back]

    def buffers(self, ranks: int, ahead: bool) -> list[int]:
        """Bytes of the buffers: one that each unit fits, and if units are gathered ahead one more that each block fits."""
        sizes = [max(u.part for u in units) * ranks for units in (self.each, self.blocks)]
        return sizes if ahead else sizes[:1]

    def bytes(self, ranks: int, ahead: bool, whole: int) -> "ShardBytes":
        """What these units take of each rank, beside `whole` bytes that every rank has."""
        base, kept = (sum(sizes) + whole for sizes in ((u.size for u in self.each), (u.part for u in self.each)))
        training, evaluation = (sum(u.part for u in self.order(backward)) * (ranks - 1) for backward in (True, False))
        buffers, block = sum(self.buffers(ranks, ahead)), max(u.size for u in self.blocks)
        return ShardBytes(base, kept, buffers, block, training, evaluation)


class ShardBytes(NamedTuple):
    """Bytes of one rank.

    base: all that is frozen        kept: its parts of it, and what every rank has whole
    buffers: to gather units in     block: the largest one, gathered
    training, evaluation: what it receives in a pass of a stream, forward and backward or forward alone
    """

    base: int
    kept: int
    buffers: int
    block: int
    training: int
    evaluation: int


def shard_bytes(model: Decoder, ranks: int, ahead: bool = True) -> ShardBytes:
    """What a model shared out among so many ranks takes of each; it may lie on the meta device, with adapters or without.

    ahead: whether a unit is gathered while the one before computes, as on a GPU.
    """
    units = Units.of(model, ranks)
    return units.bytes(ranks, ahead, whole_bytes(model, units))


def whole_bytes(model: Decoder, units: Units) -> int:
    """The bytes of what is frozen and belongs to no unit: the last norm."""
    shared = {id(place.tensor) for unit in units.each for place in unit.places}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return sum(t.nbytes for name, t in tensors.items() if id(t) not in shared and ".lora_" not in name)
