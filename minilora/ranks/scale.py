"""What LoRA costs on a model of some size, by formula: operations, memory and bytes on the wire of each of N ranks.

For models and numbers of cards that are not here (docs/scale.md). What is counted on the model itself, `minilora plan` tells.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .cost import Step, all_gather_bytes, all_reduce_bytes

ADAPTER_BYTES = 16  # of a trained number: itself, its gradient and AdamW's two, in fp32
NF4_BITS = 4.13  # of a weight, with its scales


class Costs(NamedTuple):
    """Of one rank: the bytes of its base, of the buffers where a sharded one is gathered, of adapters with gradients and AdamW, and of
    the inputs of layers; and its step. The layer that is computed and the logits are not counted.
    """

    base: float
    buffers: float
    adapters: float
    inputs: float
    step: Step


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, dense or a mixture of experts, as published.

    ffn: of one expert; active: experts that a token goes through. Norms and biases are not counted.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    vocab: int
    experts: int = 1
    active: int = 1

    def _linears(self, targets: str = "all-linear") -> Iterator[tuple[int, int, int, int]]:
        """(inputs, outputs, copies, copies that a token goes through) of the linears of a layer."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        yield from ((self.width, n, 1, 1) for n in (q, kv, kv))
        yield q, self.width, 1, 1
        if targets == "all-linear":
            copies = self.experts, self.active
            yield from (
                (self.width, self.ffn, *copies),
                (self.width, self.ffn, *copies),
                (self.ffn, self.width, *copies),
            )

    @property
    def block(self) -> int:
        """Weights of the linears of a layer; a router is one of width x experts."""
        return sum(k * n * copies for k, n, copies, _ in self._linears()) + self._router

    @property
    def _router(self) -> int:
        return self.width * self.experts if self.experts > 1 else 0

    @property
    def parameters(self) -> int:
        return self.layers * self.block + 2 * self.vocab * self.width

    @property
    def used(self) -> int:
        """Weights of the linears of all layers that a token goes through."""
        return self.layers * (sum(k * n * used for k, n, _, used in self._linears()) + self._router)

    def trained(self, r: int, targets: str = "all-linear") -> int:
        """Numbers of the adapters."""
        return self.layers * sum(r * (k + n) * copies for k, n, copies, _ in self._linears(targets))

    def base_bytes(self, bits: float = 16) -> float:
        """Linears in so many bits; embedding and head in 16."""
        return self.costs(1, 0, 0, bits=bits).base

    def flops(self, tokens: int, r: int, targets: str = "all-linear", documents: int = 1) -> float:
        """Of a stream of equal documents, all trained, forward and backward; the terms are those of machine/flops.py."""
        adapters = self.layers * sum(r * (k + n) * used for k, n, _, used in self._linears(targets))
        each = 4 * (self.used + self.vocab * self.width) + 6 * adapters
        return tokens * (each + self.layers * 6 * self.heads * self.head_size * (tokens / documents + 1))

    def costs(
        self,
        ranks: int,
        tokens: int,
        r: int,
        targets: str = "all-linear",
        bits: float = 16,
        shard: bool = False,
        documents: int = 1,
    ) -> Costs:
        """A step of a rank that goes through one stream, with --checkpointing in 16 bits; bits: of the weights of the base."""
        ends, blocks = 2 * 2 * self.vocab * self.width, self.layers * self.block * bits / 8
        trained = self.trained(r, targets)
        gathered = all_gather_bytes(ends + 2 * blocks, ranks) if shard else 0.0
        return Costs(
            base=(ends + blocks) / (ranks if shard else 1),
            buffers=max(ends / 2, self.block * bits / 8) + self.block * bits / 8 if shard else 0.0,
            adapters=ADAPTER_BYTES * trained,
            inputs=2 * self.layers * tokens * self.width,
            step=Step(self.flops(tokens, r, targets, documents), all_reduce_bytes(4 * trained, ranks), gathered),
        )


SHAPES = {
    "Qwen2.5-7B": Shape(28, 3584, 28, 4, 128, 18944, 152064),
    "Qwen3-32B": Shape(64, 5120, 64, 8, 128, 25600, 151936),
    "Qwen3-235B-A22B": Shape(94, 4096, 64, 4, 128, 1536, 151936, experts=128, active=8),
}
