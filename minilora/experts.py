"""LoRA on the experts of a mixture: one adapter for each expert, stacked, A [E, R, in] and B [E, out, R].

In the shared-outer form the factor on the side of the hidden state, A of gate_up and B of down, is one for all experts:
A [1, R, in] or B [1, out, R] (miles, tinker).
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from minilora.models.decoder import Decoder
from minilora.models.moe import ExpertLinear, Experts, MoEConfig


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


def experts_note(model: Decoder) -> str | None:
    """A line on the experts of a model, how many have an adapter, and its routers; None for a model without."""
    c, linears = model.config, expert_linears(model)
    if not isinstance(c, MoEConfig):
        return None
    inside = {
        n.rpartition(".")[0] for n, m in model.named_modules() if n.endswith(".base") and isinstance(m, ExpertLinear)
    }
    matrices = sum(m.experts * len(m.parts) for path, m in linears.items() if path in inside)
    layers = {path.rpartition(".")[0] for path in linears}
    adapted = {path.rpartition(".")[0] for path in inside}
    frozen = not any(p.requires_grad for n, p in model.named_parameters() if ".gate." in n)
    return (
        f"{c.experts} in each of {len(layers)} layers, {c.chosen} for a token; adapters on {c.experts * len(adapted):,} of "
        f"{c.experts * len(layers):,} ({matrices:,} matrices); routers {'frozen' if frozen else 'trained'}, no auxiliary loss"
    )


def seen_note(model: nn.Module) -> str | None:
    """A line on the experts that had tokens in training, of a model that has experts."""
    layers = [m.seen for m in model.modules() if isinstance(m, Experts)]
    if not layers:
        return None
    seen = torch.stack(layers).sum(1).tolist()
    if sum(seen) == layers[0].numel() * len(layers):
        return f"all {sum(seen):,} experts saw tokens"
    return (
        f"{sum(seen):,} of {layers[0].numel() * len(layers):,} experts saw tokens (of {layers[0].numel()} in a layer "
        f"{min(seen)} to {max(seen)}) in this process; the adapters of others are as they were"
    )
