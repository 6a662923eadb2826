"""Bytes and operations by arithmetic: what an operation needs at least, what ours moves, and what other formulations move.

Every tensor counts once for each time that a launch reads or writes it; a GEMM's operands count once a launch, as if its second
reads hit the cache. So this is what a formulation asks of the memory, and says nothing of how well a kernel does it. M tokens, K in,
N out (a sum over the members of a group), R rank, s bytes an element. Formulations: `peft` is base(x) + B(A(x)) * scale, term
by term, adapters in 16 bit; `unsloth` a GEMM and one accumulate a linear, x A^T computed again in the backward; `lorafusion` x A^T
apart, and the low-rank term inside the GEMM; `frozen` the GEMMs alone. Ours are in bench/proof/layer_bytes.py, from the launches
themselves.
"""

from typing import NamedTuple

from bench.shapes import Shape


class Cost(NamedTuple):
    """Operations and bytes of a forward, and of its backward."""

    flops: float
    bytes: float
    backward_flops: float
    backward_bytes: float

    def __add__(self, other: "Cost") -> "Cost":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def total_bytes(self) -> float:
        return self.bytes + self.backward_bytes

    @property
    def total_flops(self) -> float:
        return self.flops + self.backward_flops


def lora_group(m: int, k: int, outs: list[int], r: int, s: int = 2) -> dict[str, Cost]:
    """Several adapted linears of one x [m, k], with frozen weights: outs are their widths."""
    members, n = len(outs), sum(outs)
    x, y, w = s * m * k, s * m * n, s * k * n
    narrow, low = 4 * r * (k * members + n), s * m * r * members
    flops = 2 * m * k * n + 2 * m * r * (k * members + n)
    back = 2 * m * k * n + 4 * m * r * (k * members + n)
    base = x + w + y + narrow
    base_back = y + w + 2 * x + 2 * narrow
    return {
        "frozen": Cost(2 * m * k * n, x + w + y, 2 * m * k * n, y + w + x),
        "minimum": Cost(flops, base, back, base_back),
        "peft": Cost(flops, base + (2 * members - 1) * x + 6 * y, back, 5 * y + w + 6 * x * members),
        "unsloth": Cost(flops, base + (2 * members - 1) * x + 2 * y, back, 4 * y + w + 5 * x * members),
        "lorafusion": Cost(flops, base + (2 * members - 1) * x + 2 * low, back, 2 * y + w + 2 * x * members),
    }


def lorafusion_atomics(m: int, n: int, r: int) -> int:
    """Bytes that LoRAFusion (c48d7fd) reads and writes to add up dS and dB: tiles of both in fp32 for every 128 x 128 of dY.

    Above such a sum counts once, as if it were written once.
    """
    return -(-m // 128) * -(-n // 128) * 2 * (2 * 128 * r * 4)


def lora_layer(shape: Shape, m: int, r: int, s: int = 2) -> dict[str, Cost]:
    """All seven linears of one Qwen layer."""
    groups = [
        lora_group(m, shape.width, [shape.query, shape.kv, shape.kv], r, s),
        lora_group(m, shape.query, [shape.width], r, s),
        lora_group(m, shape.width, [shape.ffn, shape.ffn], r, s),
        lora_group(m, shape.ffn, [shape.width], r, s),
    ]
    none = Cost(0, 0, 0, 0)
    return {name: sum((g[name] for g in groups), none) for name in groups[0]}


def linear_cross_entropy(m: int, d: int, v: int, chunk: int, parts: int, s: int = 2) -> dict[str, Cost]:
    """Of m rows with a target and a frozen head [v, d], in chunks of rows, with `parts` log-sum-exps a row in fp32.

    Ours writes a logit, reads and writes it for the gradient, and reads it for dx; both GEMMs of a chunk read the head.
    """
    x, head, chunks = s * m * d, s * v * d, -(-m // chunk)
    flops, row = 4 * m * d * v, 4 * (1 + 2 * parts)  # the loss; each partial written and read
    # x for the logits and for the true one, whose rows of the head are other bytes than those of the GEMMs only by launch
    ours = 4 * s * m * v + 2 * chunks * head + 4 * x + m * (row + 16)
    return {"minimum": Cost(flops, x + head, 0, x), "minilora": Cost(flops, ours, 0, 2 * x)}
