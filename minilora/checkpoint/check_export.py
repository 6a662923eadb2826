"""Checks from its files whether PEFT or vLLM would apply an adapter as it was trained, and whether it changes the logits.

Both find a linear by the path in its key. vLLM refuses a last name that its class does not know, but silently skips a path that it
does not find, and ignores rank_pattern and alpha_pattern: the answers are then those of the base model, or wrongly scaled.
"""

import re
from collections import Counter, defaultdict
from typing import NamedTuple

import torch

from minilora.models.decoder import Decoder

from ..adapted import without_adapters
from ..errors import ModelError
from ..files.model_folder import ADAPTER_WEIGHTS, Folder, ModelFolder
from ..files.safetensors import SafetensorsFile
from ..files.tensors import fold
from ..lora import adapters, linears
from ..text.tokenizer import load_tokenizer
from .adapter import load_adapter, needed_quant
from .consumers import VLLM_MODULES, VLLM_RANKS, paths_of
from .expert_adapters import SINGLE, STACKED
from .load import empty_model, load_model, read_config
from .verify import largest_difference, logits_of, prompt_ids

KEY = re.compile(r"base_model\.model\.(.+)\.(?:lora_[AB]\.weight|lora_magnitude_vector)")


class Check(NamedTuple):
    """Adapted linears by last name, how many the model has, the largest rank, how many have a zero B, and what is wrong."""

    found: Counter[str]
    linears: int
    r: int
    zero: int
    problems: list[str]


def check_export(model: Folder, adapter: Folder, consumer: str) -> Check:
    """How a consumer would take the files of an adapter of the model in this folder; no weight of the model is read.

    Raises ModelError for what is no LoRA of this model, whoever reads it: keys, shapes and ranks that do not fit.
    """
    c, adapter = read_config(model), ModelFolder.of(adapter)
    meta = empty_model(c)
    load_adapter(meta, adapter, any_base=True)
    wrapped = dict(adapters(meta))
    if not wrapped:
        raise ModelError(f"{adapter} is no LoRA", "Its files are the same for every reader.")
    own = linears(empty_model(c))
    problems: defaultdict[str, list[str]] = defaultdict(list)
    known = {theirs for path in own for theirs in paths_of(path, c.family, consumer)}
    accepted = VLLM_MODULES.get(c.family, ())
    paths = dict.fromkeys(_path(key) for key in SafetensorsFile(adapter / ADAPTER_WEIGHTS).entries)
    of_experts = SINGLE if consumer == "vllm" else STACKED
    for path in paths:
        if path not in known and not of_experts.fullmatch(path):
            problems[f"{consumer} finds no such module"].append(path)
        elif consumer == "vllm" and ".experts" not in path and path.split(".")[-1] not in accepted:
            problems[f"vLLM's class for {c.family} applies no adapter there"].append(path)
    lines = [f"{what}: {fold(found)}" for what, found in problems.items()]
    lines += _of_config(adapter, c.family) if consumer == "vllm" else []
    zero = sum(not w.factors()[1].any() for w in wrapped.values())
    names = Counter(path.rpartition(".")[2] for path in wrapped)
    return Check(names, len(own), max(w.r for w in wrapped.values()), zero, lines)


def _path(key: str) -> str:
    """The path in a key as PEFT and vLLM parse it; of any other key all of it."""
    match = KEY.fullmatch(key)
    return match[1] if match else key


def _of_config(adapter: ModelFolder, family: str) -> list[str]:
    """What vLLM ignores or refuses in an adapter_config.json."""
    j = adapter.adapter_config
    lines = [f"vLLM does not read {key}" for key in ("rank_pattern", "alpha_pattern") if j.get(key)]
    lines += ["vLLM has no DoRA"] if j.get("use_dora") else []
    lines += [f"vLLM takes ranks up to {VLLM_RANKS[-1]}, r is {j['r']}"] if j["r"] > VLLM_RANKS[-1] else []
    quant = needed_quant(adapter.path)
    lines += [f"it began as the error of a base in {quant} (LoftQ), and vLLM has the base itself"] if quant else []
    return lines + ([] if family in VLLM_MODULES else [f"vLLM takes no adapters on {family}"])


@torch.inference_mode()
def logits_moved(
    folder: Folder, adapter: Folder, any_base: bool = False, device: str | None = None
) -> tuple[float, float]:
    """The largest change of a logit by an adapter on one prompt, and the largest logit; the weights of the model are read.

    Raises ModelError for another base than the adapter's, unless any_base.
    """
    folder, adapter = ModelFolder.of(folder), ModelFolder.of(adapter)
    model: Decoder = load_model(folder, device=device, quant=needed_quant(adapter.path) or "keep")
    load_adapter(model, adapter, any_base)
    prompt = prompt_ids(load_tokenizer(folder))[:1]
    adapted = logits_of(model.eval(), prompt)
    with without_adapters(model):
        base = logits_of(model, prompt)
    return largest_difference(adapted, base), float(base[0].abs().max())
