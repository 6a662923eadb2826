"""What travels between the ranks of a planned training, and on which networks they wait for it."""

from typing import Any

from minilora.models.decoder import Decoder
from minilora.models.stream import Batch

from ..lora import trained_parameters
from ..machine.flops import PEAKS, step_flops
from ..ranks.cost import LINKS, MFU, Step, all_reduce_bytes
from ..ranks.deal import deal, imbalance
from ..ranks.shard import shard_bytes


def network_forecast(
    model: Decoder,
    streams: list[Batch],
    per_token: tuple[float, float],
    ranks: int,
    shard: bool,
    passes: tuple[bool, ...] = (True,),
) -> dict[str, Any]:
    """A step of these streams on so many ranks, as plain values for JSON; per_token from flops_per_token.

    shard: the ranks share the base out, and gather it for each stream of the one that has the most; passes: Objective.passes.
    """
    tokens = [len(batch.ids) for batch in streams]
    dealt = deal(tokens, ranks)
    flops = max(step_flops(model.config, [streams[i] for i in own], per_token) for own in dealt)
    # in one buffer with the gradients: the loss, and on how many ranks a signal came
    buffer = sum(p.nbytes for p in trained_parameters(model).values()) + 2 * 4
    most = max(map(len, dealt))
    parts = shard_bytes(model, ranks)
    gathered = most * sum(parts.training if backward else parts.evaluation for backward in passes) if shard else 0.0
    step = Step(flops, all_reduce_bytes(buffer, ranks), gathered)
    return {
        "count": ranks,
        "shard": shard,
        "streams": len(streams),
        "most_streams": most,
        "imbalance": imbalance(tokens, ranks),
        "buffer": buffer,
        "reduced": step.reduced,
        "gathered": step.gathered,
        "computing": {gpu: step.computing(gpu) for gpu in LINKS[-1].gpus},
        "links": [
            {"name": link.name, "rate": link.rate, "seconds": (step.reduced + step.gathered) / link.rate}
            | {gpu: step.efficiency(gpu, link.rate) for gpu in link.gpus}
            for link in LINKS
        ],
    }


def network_lines(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    shared = f"at most {found['most_streams']} a rank; the fullest has {found['imbalance']:.2f} of the mean's tokens"
    base = "a part of the base each" if found["shard"] else "each with the whole base"
    gathered = f"; {found['gathered'] / 1e9:,.1f} GB of other ranks' parts of the base" if found["shard"] else ""
    lines = [
        f"ranks   {found['count']}, {base}; {found['streams']} streams in a step, {shared}",
        f"wire    of each rank in a step: {found['reduced'] / 1e6:,.1f} MB to add up {found['buffer'] / 1e6:,.1f} MB of gradients{gathered}",
        f"network   GB/s each way{'seconds':>10}{'A100, A800':>13}{'H100, H800':>13}",
    ]
    for link in found["links"]:
        shares = "".join(f"{f'{100 * link[gpu]:.1f} %' if gpu in link else '':>13}" for gpu in found["computing"])
        lines.append(f"        {link['name']:<12}{link['rate'] / 1e9:>5,.3g}{link['seconds']:>10.2g}{shares}".rstrip())
    peaks = " and ".join(f"{PEAKS[gpu] / 1e12:.0f}" for gpu in found["computing"])
    seconds = " and ".join(f"{found['computing'][gpu]:,.2g} s" for gpu in found["computing"])
    lines.append(
        f"        of a step is computing, {seconds}, if that reaches {100 * MFU:.0f} % of {peaks} TFLOP/s; latency not counted"
    )
    return lines
