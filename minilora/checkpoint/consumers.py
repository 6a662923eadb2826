"""How the programs that read an adapter spell the paths of a model's linears, and what else they ask for.

    peft    PEFT on what AutoModelForCausalLM opens
    vllm    vLLM's class for the folder; also PEFT on AutoModelForImageTextToText

Most families are spelled as the checkpoint is. A key that is spelled otherwise finds no module there, and is left out with a warning
at most: the model answers as if it had no adapter.
"""

from collections.abc import Iterable

import torch
from torch import nn

from ..lora import LoRALinear

CONSUMERS = ("peft", "vllm")
TEXT, VISION = (
    "model.layers.",
    "model.language_model.layers.",
)  # of a language model by itself, and of one with vision around it
# families that a consumer spells in another way than the checkpoint
PREFIXES = {"qwen3_5": {"peft": TEXT}, "qwen3_5_moe": {"peft": TEXT}}

WITHOUT_LORA = {"vllm": ("gpt2",)}  # families whose class there takes no adapters (vLLM: no SupportsLoRA)


def spelled(path: str, family: str, consumer: str | None) -> str:
    """A path as a consumer spells it; None: as the checkpoint does."""
    return _with_prefix(path, PREFIXES.get(family, {}).get(consumer or ""))


def as_in_file(paths: Iterable[str], keys: Iterable[str]) -> dict[str, str]:
    """The paths of a model's linears by the spelling that an adapter's keys have, whichever consumer it was written for."""
    found = {prefix for key in keys for prefix in (TEXT, VISION) if prefix in key}
    prefix = found.pop() if len(found) == 1 else None
    return {_with_prefix(path, prefix): path for path in paths}


def _with_prefix(path: str, prefix: str | None) -> str:
    own = next((p for p in (VISION, TEXT) if path.startswith(p)), None)
    return path if prefix is None or own is None else prefix + path.removeprefix(own)


@torch.no_grad()
def make_alike(wrapped: dict[str, LoRALinear]) -> bool:
    """Give all adapters one rank and one scale, since vLLM reads no rank_pattern; whether one had another.

    Smaller ones are filled up with zeros, and B is multiplied by the ratio of the scales.
    """
    every = list(wrapped.values())
    r, scale = max(w.r for w in every), every[0].scale
    if all(w.r == r and w.scale == scale for w in every):
        return False
    for w in every:
        more = r - w.r
        w.lora_B = nn.Parameter(nn.functional.pad(w.lora_B * (w.scale / scale), (0, more)))
        w.lora_A = nn.Parameter(nn.functional.pad(w.lora_A, (0, 0, 0, more)))
        w.alpha, w.rslora = scale * r, False
    return True
