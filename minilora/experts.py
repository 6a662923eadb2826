"""LoRA on the experts of a mixture: one adapter for each expert, stacked, A [E, R, in] and B [E, out, R].

In the shared-outer form the factor on the side of the hidden state, A of gate_up and B of down, is one for all experts:
A [1, R, in] or B [1, out, R] (miles, tinker).
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from minilora.models.moe import ExpertLinear, Experts


def factors(a: Tensor, b: Tensor, rows: slice) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(which of these rows of W, A [R, K], B [n, R]) of each expert that they are of; of a plain linear all at once."""
    if a.dim() == 2:
        yield slice(None), a, b[rows]
        return
    n, experts = b.shape[1], max(len(a), len(b))
    start, stop, step = rows.indices(experts * n)
    assert step == 1, rows
    for e in range(start // n, -(-stop // n)):
        low, high = max(start, e * n), min(stop, (e + 1) * n)
        own = b[e if len(b) > 1 else 0, low - e * n : high - e * n]
        yield slice(low - start, high - start), a[e if len(a) > 1 else 0], own


def expert_linears(model: nn.Module) -> dict[str, ExpertLinear]:
    """Those of a model, with adapters or without, by the path that they have in the checkpoint."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, ExpertLinear)}
    return {n.removesuffix(".base"): m for n, m in found.items()}


def seen_note(model: nn.Module) -> str | None:
    """A line on the experts that had tokens in training, of a model that has experts."""
    layers = [m.seen for m in model.modules() if isinstance(m, Experts)]
    if not layers:
        return None
    seen = torch.stack(layers).sum(1).tolist()
    return (
        f"{sum(seen):,} of {layers[0].numel() * len(layers):,} experts saw tokens (of {layers[0].numel()} in a layer "
        f"{min(seen)} to {max(seen)}); adapters of the others are as they began"
    )
