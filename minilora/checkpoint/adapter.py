"""Adapters in PEFT's layout, both ways: adapter_config.json and adapter_model.safetensors.

Since our modules carry the checkpoint's names, a key is `base_model.model.` + path + `.lora_A.weight`. Loading is strict:
every key must find its linear, every shape must fit, and what would change the mathematics and is not done here (trained
biases, whole modules) is refused, not ignored. DoRA adds a vector to each linear; the other methods of methods/ have
folders of their own kind (method_folder.py).
"""

import json
import math
import re
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from minilora.models.decoder import Decoder
from minilora.models.gpt2 import Conv1D
from minilora.models.moe import ExpertLinear

from ..errors import ModelError, quote
from ..files.atomic import atomic_folder, require_own
from ..files.model_folder import ADAPTER_CONFIG as CONFIG
from ..files.model_folder import ADAPTER_WEIGHTS as WEIGHTS
from ..files.model_folder import Folder, ModelFolder
from ..files.safetensors import SafetensorsFile, write_tensors
from ..lora import HEADS, Base, LoRALinear, adapters, linears, require_no_adapters, wrap
from ..methods.dora import DoRALinear
from ..methods.pissa import PiSSALinear, set_starts
from ..methods.table import PEFT_TYPES
from ..text.template import jinja_text
from .adapter_config import as_parameter, by_pattern, meant, named_by, refuse_what_is_not_lora
from .consumers import as_in_file, joined
from .expert_adapters import Half, Halves, files_of, gathered
from .load import check_finite, fold
from .method_folder import (
    PREFIX,
    about_base,
    check_base,
    fill_method_folder,
    load_method_folder,
    template_hash,
    weights_of,
)
from .quantized import FORMS, described, quant_of

MAGNITUDE = "lora_magnitude_vector"
KINDS = 3  # of mismatches that are shown


def save_adapter(model: nn.Module, folder: str | Path, base: str | Path = "", single: bool = False) -> None:
    """Write a model's adapters as a PEFT folder, fp32; `base` is noted as base_model_name_or_path.

    single: adapters of experts under the keys of the single experts, as vLLM takes them (expert_adapters.py). An older adapter in
    the folder is replaced; OutputInUse if the folder holds anything else.
    """
    require_own(Path(folder), {CONFIG, WEIGHTS}.__contains__)
    with atomic_folder(Path(folder)) as stage:
        fill_adapter_folder(model, stage, str(base), single)


def fill_adapter_folder(model: nn.Module, folder: Path, base: str = "", single: bool = False) -> None:
    """The two files of an adapter, into a folder that the caller makes durable."""
    wrapped = dict(adapters(model))
    if not wrapped:
        fill_method_folder(model, folder, base)
        return
    write_adapter(folder, wrapped, linears_without(model), base, about_base(model, base), single)


def write_adapter(
    folder: Path, wrapped: dict[str, LoRALinear], without: list[str], base: str, about: dict[str, str], single: bool
) -> None:
    """The files of adapters by the paths that their keys have; without: paths of linears that have none."""
    tensors = {}
    for path, wrapper in wrapped.items():
        (a, b), linear = (t.detach().float().cpu() for t in wrapper.factors()), wrapper.base
        if isinstance(wrapper, DoRALinear):
            tensors[f"{PREFIX}{path}.{MAGNITUDE}"] = wrapper.lora_magnitude_vector.detach().float().cpu()
        if isinstance(linear, ExpertLinear):
            both = sum(p.rpartition(".")[0] == path.rpartition(".")[0] for p in wrapped) == 2
            tensors |= {PREFIX + key: t for key, t in files_of(path, linear, a, b, single, both).items()}
            about["minilora_dropout"] = str(wrapper.dropout)
            if 1 in (len(a), len(b)):
                about["minilora_shared_outer"] = "true"
        else:
            tensors |= {f"{PREFIX}{path}.lora_A.weight": a, f"{PREFIX}{path}.lora_B.weight": b}
    if any(wrapper.loftq for wrapper in wrapped.values()):
        about["minilora_init"] = "loftq"
    write_tensors(folder / WEIGHTS, tensors, about)
    (folder / CONFIG).write_text(json.dumps(_config(wrapped, without, base, single), indent=2) + "\n")


def trained_quant(folder: str | Path) -> str | None:
    """The quant of the base that an adapter was trained on, off for a plain one; None for an adapter of other tools."""
    said = metadata_of(folder).get("minilora_quant")
    return said if said in ("off", *FORMS) else None


def needed_quant(folder: str | Path) -> str | None:
    """The quant of the only base that an adapter fits, which began as the error of that base (LoftQ); else None."""
    return trained_quant(folder) if "minilora_init" in metadata_of(folder) else None


def metadata_of(folder: str | Path) -> dict[str, str]:
    path = Path(folder) / WEIGHTS
    return SafetensorsFile(path).metadata if path.is_file() else {}  # load_adapter says what is there instead


def _config(wrapped: dict[str, LoRALinear], without: list[str], base: str, single: bool) -> dict[str, Any]:
    ranks = {path: w.factors()[0].shape[-2] for path, w in wrapped.items()}
    # where the product has a higher rank than what is trained, the scale stays
    alphas = {path: w.scale * (math.sqrt(ranks[path]) if w.rslora else ranks[path]) for path, w in wrapped.items()}
    alphas |= {path: w.alpha for path, w in wrapped.items() if w.r == ranks[path]}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    first = next(iter(wrapped.values()))
    modules, parameters = _targets(wrapped, without, single)
    names = {p: f"{p}.weight" if meant(parameters, f"{p}.weight", set()) else p for p in wrapped}
    stacked = any(isinstance(w.base, ExpertLinear) for w in wrapped.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": r,
        "lora_alpha": _number(alpha),
        "lora_dropout": 0.0 if stacked else first.dropout,  # PEFT has none on target_parameters
        "use_rslora": first.rslora,
        "target_modules": modules,
        "rank_pattern": {names[p]: n for p, n in ranks.items() if n != r},
        "alpha_pattern": {names[p]: _number(x) for p, x in alphas.items() if x != alpha},
        "bias": "none",
        "fan_in_fan_out": any(isinstance(w.base, Conv1D) for w in wrapped.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": isinstance(first, DoRALinear),
        "layers_to_transform": None,
        "layers_pattern": None,
        "revision": None,
    } | ({"target_parameters": parameters} if parameters else {})


def _targets(wrapped: dict[str, LoRALinear], without: list[str], single: bool) -> tuple[list[str], list[str]]:
    """PEFT's target_modules and target_parameters for the wrapped linears.

    The end of a path stands for all linears that have it; where only some are wrapped, they are named in full. In a model
    with experts PEFT takes gate_proj, up_proj and down_proj for those of experts, wherever they are: others are named as
    parameters too.
    """
    mixture = any(".experts." in path for path in (*wrapped, *without))

    def end(path: str) -> str:
        parts = path.split(".")
        return ".".join(parts[-2:]) if mixture and parts[-1] in MLP_LINEARS else parts[-1]

    bare, modules, parameters = {end(path) for path in without}, set(), set()
    for path, wrapper in wrapped.items():
        name, linear = path if end(path) in bare else end(path), wrapper.base
        if isinstance(linear, ExpertLinear) and single:
            modules |= {f"{name.rpartition('.')[0]}.{e}.{part}" for e in range(linear.experts) for part in linear.parts}
        elif isinstance(linear, ExpertLinear):
            parameters.add(name)
        elif mixture and not single and path.split(".")[-1] in MLP_LINEARS:
            parameters.add(f"{name}.weight")
        else:
            modules.add(name)
    return sorted(modules), sorted(parameters)


MLP_LINEARS = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")


def linears_without(model: nn.Module) -> list[str]:
    """Paths of the linears that carry no adapter."""
    inside = {f"{path}.base" for path, _ in adapters(model)}
    return [path for path in linears(model) if path not in inside]


def _number(x: float) -> float | int:
    return int(x) if x == int(x) else x


def load_adapter(model: nn.Module, folder: Folder, any_base: bool = False, allow_partial: bool = False) -> None:
    """Wrap the linears that a PEFT folder names and copy its tensors in.

    Raises ModelError with every key that does not fit, and with every linear that its config names and its file lacks,
    unless allow_partial. An adapter that minilora saved also knows its base, and one that began by LoftQ its bits:
    any_base lets it onto another one of the same shape.
    """
    folder = ModelFolder.of(folder)
    j, folder = folder.adapter_config, folder.path
    if j.get("peft_type") in PEFT_TYPES:
        load_method_folder(cast(Decoder, model), folder, j, any_base)
        return
    refuse_what_is_not_lora(folder, j)
    file = weights_of(folder)
    require_no_adapters(model)
    own = as_in_file(linears(model), file.entries)  # by the spelling of the file
    targets = {path: linears(model)[name] for path, name in own.items()}
    lengths = _magnitudes(folder, file) if j.get("use_dora") else {}
    halves, plan = _plan(targets, folder, j, file)
    if lengths and lengths.keys() != plan.keys():
        odd = min(lengths.keys() ^ plan.keys())
        raise ModelError(f"{folder / WEIGHTS}: {odd} has not all of a DoRA adapter", "Make the adapter again.")
    named = named_by(folder, j, targets, plan)
    lacking = [path for path in named if path not in plan]
    beyond = [path for path in plan if path not in named] if j.get("target_modules") is not None else []
    if beyond and not allow_partial:
        raise ModelError(
            f"{folder}: its file holds adapters on {len(beyond)} linears that its config leaves out ({', '.join(beyond[:3])}"
            f"{' ...' if beyond[3:] else ''})",
            "Take the files of one adapter, or take what the file holds with --allow-partial.",
        )
    if lacking and not allow_partial:
        raise ModelError(
            f"{folder}: its config names {len(lacking) + len(plan)} linears of this model, its file holds {len(plan)} (missing: "
            f"{', '.join(lacking[:3])}{' ...' if lacking[3:] else ''})",
            "The adapter is cut short: make it again, or take it as it is with --allow-partial.",
        )
    for key in file.entries:
        t = file.tensor(key)
        if not t.is_floating_point():
            raise ModelError(f"{folder / WEIGHTS}: {key} is {t.dtype}", "Floating-point numbers belong there.")
        check_finite(t, f"{folder / WEIGHTS}: {key}")
    check_base(folder, file, model, any_base)
    needed, here = needed_quant(folder), quant_of(model)
    if needed not in (None, here) and not any_base:
        raise ModelError(
            f"{folder} began as the error of a base in {needed} (LoftQ), and this is {described(here)}",
            f"Give --quant {needed}, or --any-base to use it on this one.",
        )
    model.requires_grad_(False)
    dropout = _dropout(folder, file, j)
    shared = "minilora_shared_outer" in file.metadata
    kind = DoRALinear if lengths else PiSSALinear if j.get("init_lora_weights") == "pissa" else LoRALinear
    dropout = 0.0 if kind is PiSSALinear else dropout
    for path, (r, alpha) in plan.items():
        wrapper = wrap(model, own[path], r, alpha, dropout, bool(j.get("use_rslora", False)), shared, kind=kind)
        values = {f"lora_{half}": halves[path][half].read() for half in "AB"}
        if isinstance(wrapper, DoRALinear):
            values["lora_magnitude_vector"] = length = file.tensor(lengths[path])
            if length.shape != wrapper.lora_magnitude_vector.shape:
                what = f"{folder / WEIGHTS}: the magnitudes of {path} are {list(length.shape)}"
                raise ModelError(what, f"[{wrapper.base.out_features}] fits.")
        for name, value in values.items():
            parameter = getattr(wrapper, name)
            if parameter.is_meta:  # an adapter without its model
                setattr(wrapper, name, nn.Parameter(value.float()))
            else:
                parameter.data.copy_(value)
        wrapper.loftq = needed is not None
    set_starts(model)


def _dropout(folder: Path, file: SafetensorsFile, j: dict[str, Any]) -> float:
    """The dropout of an adapter: that of experts stands in its file, as PEFT has none on target_parameters."""
    said = file.metadata.get("minilora_dropout") or j.get("lora_dropout") or 0.0
    try:
        dropout = float(said)
    except (TypeError, ValueError):
        dropout = math.nan
    if not 0 <= dropout < 1:
        what = f"{folder / WEIGHTS}: its dropout is {quote(str(said))}"
        raise ModelError(what, "A number from 0 to below 1 belongs there.")
    return dropout


def _magnitudes(folder: Path, file: SafetensorsFile) -> dict[str, str]:
    """path of a linear -> the key of DoRA's vector for it; ModelError if there is none."""
    matches = {
        key: re.fullmatch(rf"(?:base_model\.model\.)?(.+)\.{MAGNITUDE}(\.[^.]+)?(\.weight)?", key)
        for key in file.entries
    }
    found = {match[1]: key for key, match in matches.items() if match}
    if not found:
        raise ModelError(
            f"{folder / CONFIG} says use_dora, and {WEIGHTS} has no {MAGNITUDE}", "Make the adapter again."
        )
    return found


def base_note(adapter: ModelFolder, folder: ModelFolder) -> str | None:
    """A line where an adapter names another base than the folder, and its file cannot tell whether it is the same model."""
    named = str(adapter.adapter_config.get("base_model_name_or_path") or "").replace("\\", "/").rstrip("/")
    own = str(folder.config.get("_name_or_path") or "")
    names = {name.replace("\\", "/").rstrip("/").split("/")[-1].lower() for name in (folder.name, own) if name}
    if not named or named.split("/")[-1].lower() in names:
        return None
    if not (adapter / WEIGHTS).is_file() or "minilora_base" in SafetensorsFile(adapter / WEIGHTS).metadata:
        return None  # loading it will say more, or compare it with the weights
    return f"the adapter was made for {quote(named, 60)}; whether {folder} holds the same weights cannot be seen"


def template_note(adapter: ModelFolder, folder: ModelFolder) -> str | None:
    """A line where the folder's chat template is not the one that the adapter was trained with, and it brings none of its own."""
    then = metadata_of(adapter.path).get("minilora_chat")
    if then is None or jinja_text(adapter) is not None or then == template_hash(folder):
        return None
    return f"the adapter was trained with another chat template than {folder} has now: its answers may be worse"


def _plan(
    targets: dict[str, Base], folder: Path, j: dict[str, Any], file: SafetensorsFile
) -> tuple[Halves, dict[str, tuple[int, float]]]:
    """The factors, and path -> (r, alpha), of every linear that the file has both for; ModelError lists what does not fit."""
    problems: defaultdict[str, list[str]] = defaultdict(list)  # what is wrong -> paths
    halves, beyond = _halves(targets, folder, j, file)
    for path in halves:
        if path not in targets:
            problems["the model has no such linear"].append(path)
    if beyond:
        raise ModelError(
            f"{folder} holds more than adapters on the linears of blocks: {', '.join(beyond[:3])}{' ...' if beyond[3:] else ''} "
            "(an adapter on the head or the embedding, or a vocabulary that was trained or resized)",
            "Merge it into its base with PEFT, and use the result as --model.",
        )
    plan = {}
    shared, parameters = "minilora_shared_outer" in file.metadata, j.get("target_parameters") or []
    for path in halves.keys() & targets.keys():
        linear, found = targets[path], halves[path]
        stacks = linear.stacks(shared) if isinstance(linear, ExpertLinear) else ((), ())
        own_name = as_parameter(path, linear)
        name = own_name if meant(parameters, own_name, set()) else path
        name = found["A"].name or name if "A" in found else name
        r, alpha = (by_pattern(j, pattern, name, j[key]) for pattern, key in PATTERNS)
        if "A" in found and found["A"].name:
            # of gate or up, or of an expert; where gate and up have an A each, it is one of twice the rank, at the same scale
            times = found["A"].shape[-2] // r
            r, alpha = r * times, alpha * (times**0.5 if j.get("use_rslora") else times)
        wanted = {"A": (*stacks[0], r, linear.in_features), "B": (*stacks[1], linear.out_features, r)}
        for h in "AB":
            if h not in found:
                problems[f"lora_{h} is missing"].append(path)
            elif found[h].shape != wanted[h]:
                problems[f"lora_{h} is {list(found[h].shape)}, {list(wanted[h])} fits"].append(path)
        plan[path] = (r, alpha)
    if problems or not plan:
        kinds = [f"{what}: {fold(dict.fromkeys(paths))}" for what, paths in problems.items()]
        shown = "\n  ".join(kinds[:KINDS] or ["it holds no adapter"])
        more = f"\n  and {len(kinds) - KINDS} more kinds of mismatch" if len(kinds) > KINDS else ""
        base = str(j.get("base_model_name_or_path") or "")[:120]
        hint = f"It was made for {quote(base)}." if base else "It belongs to another base model."
        raise ModelError(f"{folder} does not fit this model:\n  {shown}{more}", hint)
    return halves, {path: plan[path] for path in targets if path in plan}


PATTERNS = (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))


def factors_of(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """The adapters of a folder that was written here, by the names of the model's parameters."""
    file = SafetensorsFile(folder / WEIGHTS)
    halves, _ = _halves(linears(model), folder, ModelFolder(folder).adapter_config, file)
    return {f"{path}.lora_{half}": factor.read() for path, found in halves.items() for half, factor in found.items()}


def _halves(
    targets: dict[str, Base], folder: Path, j: dict[str, Any], file: SafetensorsFile
) -> tuple[Halves, list[str]]:
    """The factors of a file by the paths of linears, and the keys that are none of a linear in a block."""
    found: Halves = {}
    beyond: list[str] = []
    for key, entry in file.entries.items():
        if j.get("use_dora") and MAGNITUDE in key:
            continue
        named = path_and_half(key)
        if named is None or named[0].split(".")[-1] in HEADS:
            beyond.append(key)
        elif named[1] in found.get(named[0], {}):
            raise ModelError(
                f"{folder / WEIGHTS}: {key} stands there a second time", "Keep the tensors of one adapter."
            )
        else:
            read = partial(file.tensor, key)
            found.setdefault(named[0], {})[named[1]] = Half(entry.shape, read)
    shared, parameters = "minilora_shared_outer" in file.metadata, j.get("target_parameters") or []
    experts = {path: linear for path, linear in targets.items() if isinstance(linear, ExpertLinear)}
    return joined(gathered(found, experts, parameters, shared), targets.keys() - experts.keys()), beyond


def path_and_half(key: str) -> tuple[str, str] | None:
    """(path of the linear, "A" or "B") of a key, with PEFT's prefix or without, with an adapter's name in it or without."""
    match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[^.]+)?\.weight", key)
    return (match[1], match[2]) if match else None
