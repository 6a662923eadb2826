"""Load a base that is sharded: each rank reads its own bytes of the files, and no rank ever has the whole."""

from collections.abc import Iterator
from itertools import count
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minilora.kernels.quantized import QuantizedWeight, Weight
from minilora.models.decoder import Decoder
from minilora.models.gathered import GatheredWeight

from ..checkpoint.load import FIRST, check_finite, described_model, fill, ready
from ..checkpoint.quantized import Stored
from ..errors import UsageError
from ..experts import expert_linears
from ..files.model_folder import ModelFolder
from ..lora import LoRALinear, adapters, base_parameters
from ..ranks.gather import Shards
from ..ranks.ranks import Ranks
from ..ranks.shard import Unit, span


def load_sharded(
    folder: ModelFolder,
    dtype: torch.dtype,
    device: torch.device,
    compute: str,
    quant: str,
    ranks: Ranks,
    passes: tuple[bool, ...] = (True,),
    ahead: bool | None = None,
) -> Decoder:
    """load_model, where each rank reads and keeps its part of the base; ranks.shards gathers what computes.

    passes: over a stream of training, in turn: whether each has a backward.
    ahead: gather a unit while the one before computes, in a second buffer; None: on a GPU, which computes meanwhile. Raises ModelError, RankLost.
    """
    model, stored = described_model(folder, dtype, quant)
    if expert_linears(model):
        raise UsageError(
            "--shard on does not split experts",
            "Leave it out: with --quant nf4 every rank holds the whole base, in 4 bits.",
        )
    ahead = device.type == "cuda" if ahead is None else ahead
    ranks.shards = Shards(model, ranks, device, passes, ahead)
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_meta:  # of no unit
                module._parameters[name] = nn.Parameter(torch.empty_like(p, device=device))
                fill(module.get_parameter(name), stored, f"{path}.{name}")
    fill_parts(ranks.shards, stored)
    return ready(model, device, compute)


def fill_parts(shards: Shards, stored: Stored) -> None:
    """Read this rank's part of every unit.

    Where a weight is kept as it is stored, or in another floating-point dtype, a rank reads its own bytes. One that is quantised, or was, follows
    from all its values: one rank reads and makes it, each rank another one, and sends it to the others.
    """
    ranks, turn = shards.ranks, count()
    for unit in shards.units.each:
        weights = {f"{unit.path}.{name}": w for name, w in base_parameters(unit.module).items()}
        made = {n: w for n, w in weights.items() if isinstance(w, QuantizedWeight) or n in stored.parts}
        makers = {name: next(turn) % ranks.count for name in made}
        for name, weight in made.items():
            if makers[name] == ranks.rank:
                fill(weight, stored, name)
        for name, weight in made.items():
            _send_weight(ranks, unit, weight, makers[name])
        for name, weight in weights.items():
            if name not in made:
                _read(unit, cast(GatheredWeight, weight), stored, name)


def _read(unit: Unit, weight: GatheredWeight, stored: Stored, name: str) -> None:
    """Read what is this rank's of a weight."""
    start, end = span(weight)
    low, high = unit.owned(start, end)
    with stored.reading(name, weight.shape) as value:
        assert isinstance(value, Tensor), name
        flat = value.reshape(-1)
        weight.first = flat[:FIRST].to(weight.dtype, copy=True)
        if low < high:
            mine = unit.own[low - unit.start : high - unit.start].view(weight.dtype)
            mine.copy_(flat[(low - start) // weight.itemsize : (high - start) // weight.itemsize])
            check_finite(mine, f"{stored.tensors.folder}: {name}")


def _send_weight(ranks: Ranks, unit: Unit, weight: Weight, maker: int) -> None:
    """Send a weight from the rank that made it to all, which keep their parts of it."""
    for part in weight.buffers() if isinstance(weight, QuantizedWeight) else [weight]:
        start, end = span(part)
        _send(ranks, unit.whole[start:end], maker)
        unit.keep(start, end)
    if isinstance(weight, GatheredWeight):
        weight.first = weight.detach().flatten()[:FIRST].to("cpu", copy=True)
    elif isinstance(weight, QuantizedWeight):  # what is known of the values that it was made from
        told = torch.empty(1 + min(FIRST, weight.numel()), dtype=torch.float64)
        if maker == ranks.rank:
            told[0], told[1:] = torch.nan if weight.error is None else weight.error, weight.first_values(FIRST)
        _send(ranks, told, maker)
        weight.error, weight.first = None if told[0].isnan() else told[0].item(), told[1:].to(torch.bfloat16)


def _send(ranks: Ranks, tensor: Tensor, maker: int) -> None:
    with ranks.exchanging():
        ranks.wait([dist.broadcast(tensor, maker, async_op=True)], tensor.device)


def starts(shards: Shards) -> Iterator[tuple[str, LoRALinear]]:
    """The adapters whose start this rank makes (loftq_init), while their base is gathered; then every rank has those of all."""
    ranks, turn = shards.ranks, count()
    for unit in shards.units.blocks:
        with ranks.exchanging():
            ranks.wait(unit.gather(), shards.device)
        wrapped = [(f"{unit.path}.{path}", wrapper) for path, wrapper in adapters(unit.module)]
        makers = [next(turn) % ranks.count for _ in wrapped]
        yield from (pair for pair, maker in zip(wrapped, makers, strict=True) if maker == ranks.rank)
        for (_, wrapper), maker in zip(wrapped, makers, strict=True):
            weight = cast(QuantizedWeight, wrapper.base.weight)
            left = torch.tensor(weight.error_left or 0.0, dtype=torch.float64)
            for t in (wrapper.lora_A.data, wrapper.lora_B.data, left):
                _send(ranks, t, maker)
            weight.error_left = left.item()
