"""How the programs that read an adapter spell the paths of a model's linears, and what else they ask for.

    peft    PEFT on what AutoModelForCausalLM opens
    vllm    vLLM's class for the folder; also PEFT on AutoModelForImageTextToText

Most families are spelled as the checkpoint is. A key that is spelled otherwise finds no module there, and is left out with a warning
at most: the model answers as if it had no adapter. Of GLM's gate_up_proj, one matrix in the checkpoint and in PEFT, vLLM takes the
halves: each has the A of the whole, and its rows of B.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from minilora.models.layers import Linear

from ..lora import LoRALinear
from .expert_adapters import Half, Halves

CONSUMERS = ("peft", "vllm")
TEXT, VISION = (
    "model.layers.",
    "model.language_model.layers.",
)  # of a language model by itself, and of one with vision around it
# families that a consumer spells in another way than the checkpoint
PREFIXES = {"qwen3_5": {"peft": TEXT}, "qwen3_5_moe": {"peft": TEXT}}

HALVED = {"glm": "vllm", "glm4": "vllm"}  # whose gate_up_proj a consumer takes as gate_proj and up_proj
GATE_UP = ("gate_proj", "up_proj")
# the linears that vLLM's classes take adapters on, by their last names (supported_lora_modules and packed_modules_mapping)
DENSE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HYBRID = (*DENSE, "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
ROUTED = ("gate", "shared_expert_gate")
VLLM_MODULES = {
    "qwen2": DENSE, "qwen3": DENSE, "glm": DENSE, "glm4": DENSE, "glm4_moe": DENSE, "qwen": ("c_attn", "c_proj", "w1", "w2"),
    "chatglm2": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"), "qwen2_moe": (*DENSE, *ROUTED),
    "qwen3_moe": (*DENSE, *ROUTED), "qwen3_5": HYBRID, "qwen3_5_text": HYBRID, "qwen3_5_moe": (*HYBRID, *ROUTED),
    "qwen3_5_moe_text": (*HYBRID, *ROUTED), "qwen3_next": (*DENSE, *ROUTED, "in_proj_qkvz", "in_proj_ba", "out_proj"),
    # kv_b_proj loads and is never applied: attention multiplies by its weight without calling it (vllm issue 48974)
    "glm4_moe_lite": ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj", *DENSE[4:]),
}  # fmt: skip
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank can be


def paths_of(path: str, family: str, consumer: str) -> tuple[str, ...]:
    """A linear's path as a consumer spells it; of a gate_up_proj that it takes in halves, the two paths."""
    path = _with_prefix(path, PREFIXES.get(family, {}).get(consumer))
    layer, _, own = path.rpartition(".")
    halved = own == "gate_up_proj" and HALVED.get(family) == consumer
    return tuple(f"{layer}.{half}" for half in GATE_UP) if halved else (path,)


def vllm_rank(r: int) -> int:
    """The smallest --max-lora-rank of vLLM that holds rank r."""
    return next(rank for rank in VLLM_RANKS if rank >= r)


def as_in_file(paths: Iterable[str], keys: Iterable[str]) -> dict[str, str]:
    """The paths of a model's linears by the spelling that an adapter's keys have, whichever consumer it was written for."""
    found = {prefix for key in keys for prefix in (TEXT, VISION) if prefix in key}
    prefix = found.pop() if len(found) == 1 else None
    return {_with_prefix(path, prefix): path for path in paths}


def _with_prefix(path: str, prefix: str | None) -> str:
    own = next((p for p in (VISION, TEXT) if path.startswith(p)), None)
    return path if prefix is None or own is None else prefix + path.removeprefix(own)


def joined(found: Halves, paths: Iterable[str]) -> Halves:
    """The factors of a file with those of gate_proj and up_proj under the gate_up_proj among the paths that has both.

    Where each has an A of its own, it is an adapter of twice the rank, whose B is block-diagonal.
    """
    rest = dict(found)
    for path in paths:
        layer, _, own = path.rpartition(".")
        names = [f"{layer}.{half}" for half in GATE_UP]
        if own != "gate_up_proj" or not set(names) <= rest.keys():
            continue
        gate, up = parts = [rest[name] for name in names]
        shapes = [[p[half].shape for half in "AB" if half in p] for p in parts]
        if shapes[0] != shapes[1] or [len(shape) for shape in shapes[0]] != [2, 2]:
            continue
        same = torch.equal(gate["A"].read(), up["A"].read())
        (r, k), (n, _) = gate["A"].shape, gate["B"].shape
        r = r if same else 2 * r

        def a(parts=parts, same=same) -> Tensor:
            return torch.cat([p["A"].read() for p in (parts[:1] if same else parts)])

        def b(parts=parts, same=same) -> Tensor:
            factors = [p["B"].read() for p in parts]
            return torch.cat(factors) if same else torch.block_diag(*factors)

        rest[path] = {"A": Half((r, k), a, names[0]), "B": Half((2 * n, r), b, names[0])}
        for name in names:
            del rest[name]
    return rest


def split(wrapper: LoRALinear, count: int) -> list[LoRALinear]:
    """An adapter as those of `count` linears that share its rows: each has its A, and its rows of B."""
    if count == 1:
        return [wrapper]
    made, (a, b) = [], (t.detach() for t in wrapper.factors())
    alpha = wrapper.scale * (math.sqrt(len(a)) if wrapper.rslora else len(a))
    for rows in b.chunk(count):
        with torch.device("meta"):
            base = Linear(a.shape[1], len(rows), bias=False)
        part = LoRALinear(base, len(a), alpha, wrapper.dropout, wrapper.rslora)
        part.lora_A, part.lora_B = nn.Parameter(a), nn.Parameter(rows)
        made.append(part)
    return made


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
