"""What ranks send each other in a step, and the seconds that it takes beside the products.

    replicated   every rank has the whole base; a step adds up the gradients of the adapters, once
    sharded      every rank has 1/N of the base, and each stream gathers it twice: for its forward and for its backward pass

Both travel on a ring, in which each rank sends to one neighbour and receives from the other at the same time, so that the slowest link
between two ranks decides (Patarasu and Yuan, 2009, Bandwidth optimal all-reduce algorithms). The rates of cards and links are the published
ones. Latency is not counted.
"""

from typing import NamedTuple

from ..machine.flops import PEAKS

MFU = 0.4  # of a card's peak, assumed; a run writes its own to metrics.jsonl


class Link(NamedTuple):
    """A way between ranks: the bytes a second that it carries in each direction, and the cards that have it."""

    name: str
    rate: float
    gpus: tuple[str, ...] = ("A100", "H100")  # names of PEAKS; an A800 computes as an A100 does


# NVLink is published as the sum of both directions, PCIe and Ethernet for one. A lane of PCIe 4 moves 16e9 bits a second, 128 of 130 of them
# data. Ethernet is that of a machine, whose cards share it: a ring of all cards crosses it once in each direction. Where each of eight cards has
# its own, eight rings share the work.
LINKS = (
    Link("NVLink, A800", 400e9 / 2, ("A100",)),
    Link("NVLink, A100", 600e9 / 2, ("A100",)),
    Link("NVLink, H100", 900e9 / 2, ("H100",)),
    Link("PCIe 4 x16", 16 * 16e9 * 128 / 130 / 8),
    Link("8 x 400 Gb/s", 8 * 400e9 / 8),
    Link("400 Gb/s", 400e9 / 8),
    Link("200 Gb/s", 200e9 / 8),
    Link("100 Gb/s", 100e9 / 8),
)


def all_reduce_bytes(size: float, ranks: int) -> float:
    """What each rank sends to add up a buffer of `size` bytes on a ring: every part of it goes round almost twice."""
    return 2 * (ranks - 1) / ranks * size


def all_gather_bytes(size: float, ranks: int) -> float:
    """What each rank sends so that every one has `size` bytes, of which each began with a part."""
    return (ranks - 1) / ranks * size


class Step(NamedTuple):
    """A step of the rank that has the most to do: its operations, and the bytes that it sends."""

    flops: float
    reduced: float
    gathered: float = 0.0

    def computing(self, gpu: str, mfu: float = MFU) -> float:
        """Seconds of the operations on a card of PEAKS."""
        return self.flops / (mfu * PEAKS[gpu])

    def seconds(self, gpu: str, rate: float, mfu: float = MFU) -> float:
        """Of the whole step: blocks are gathered while others compute, gradients are added up when all is computed."""
        return max(self.computing(gpu, mfu), self.gathered / rate) + self.reduced / rate

    def efficiency(self, gpu: str, rate: float, mfu: float = MFU) -> float:
        """The share of a step in which the card computes."""
        return self.computing(gpu, mfu) / self.seconds(gpu, rate, mfu)
