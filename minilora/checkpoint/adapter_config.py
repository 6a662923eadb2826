"""PEFT's adapter_config.json: what of it is read, what is refused, and which linears its names and patterns mean."""

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from minilora.models.moe import ExpertLinear

from ..errors import ModelError, quote
from ..files.model_folder import ADAPTER_CONFIG as CONFIG
from ..lora import Base
from ..patterns import MOST_WAYS, simple, ways_of
from .consumers import GATE_UP

# keys of a PEFT config that change what an adapter computes beyond LoRA as it is here, and how
REFUSED = {
    "bias": "trains biases of the base", "lora_bias": "adds a bias to B", "modules_to_save": "holds whole modules that were trained",
    "layer_replication": "repeats layers of the base",
    "trainable_token_indices": "trains rows of the embedding", "alora_invocation_tokens": "works from a word of the prompt on",
    "use_qalora": "pools the input", "use_bdlora": "has block-diagonal factors", "arrow_config": "mixes several adapters",
    "megatron_config": "is split over cards", "kasa_config": "is another method", "velora_config": "is another method",
    "monteclora_config": "is another method",
}  # fmt: skip
READ = (
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform",
    "use_dora", "rank_pattern", "alpha_pattern", "init_lora_weights", "base_model_name_or_path", "target_parameters",
    "lora_B_layout",
)  # fmt: skip
COPIED = (*READ, "fan_in_fan_out", "task_type", "inference_mode")  # into the config of an adapter made of another
MOST_PATTERNS = 10_000
# how an adapter began or was run, and what the names of its tensors, or the base, say as well
HARMLESS = (
    "fan_in_fan_out",  # the base's weights lie transposed in files
    "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "layers_pattern", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying",
    "unsloth_fused_expert_lora",
)  # fmt: skip


def refuse_what_is_not_lora(folder: Path, j: dict[str, Any]) -> None:
    kind = j.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{folder / CONFIG}: peft_type is {kind!r}", "Only LORA adapters can be read.")
    start = j.get("init_lora_weights")
    exact = start == "pissa" and not j.get("use_dora")  # what was taken out of the base can be found again
    if (
        isinstance(start, str)
        and not exact
        and start.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))
    ):
        raise ModelError(
            f"{folder / CONFIG}: init_lora_weights {start[:40]!r} changes the base weights",
            "Convert the adapter with PEFT (path_initial_model_for_weight_conversion) to plain LoRA.",
        )
    names = j.get("target_parameters") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"{folder / CONFIG}: target_parameters is {quote(str(names))}", "Names belong there.")
    mapping = j.get("auto_mapping")
    older = bool(names) and isinstance(mapping, dict) and "unsloth_fixed" in mapping
    layout = j.get("lora_B_layout") or ("" if older else "rank_major")
    if layout != "rank_major":  # Unsloth 2026.9.5 and older wrote none
        raise ModelError(
            f"{folder / CONFIG}: lora_B_layout is not rank_major: B of experts lies as Unsloth 2026.9.5 and older laid it",
            "Open it with a newer Unsloth, which lays it as PEFT does, and save it again.",
        )
    used = [f"{key}, which {how}" for key, how in REFUSED.items() if j.get(key) and (key, j[key]) != ("bias", "none")]
    if used:
        hint = "Only plain LoRA can be read: merge it with PEFT (merge_and_unload), and give the result with --model."
        raise ModelError(f"{folder / CONFIG} uses {'; '.join(used)}", hint)
    unknown = [
        quote(key) for key in j if key not in {*READ, *HARMLESS, *REFUSED} and j[key] not in (None, False, "", [], {})
    ]
    if unknown:
        raise ModelError(
            f"{folder / CONFIG} has keys that are not known here: {', '.join(unknown[:6])}",
            "Take them out if they mean nothing; else merge the adapter with what it was made by.",
        )
    if j.get("use_rslora") not in (None, True, False):
        raise ModelError(f"{folder / CONFIG}: use_rslora is {j['use_rslora']!r}", "true or false belongs there.")
    dropout = j.get("lora_dropout") or 0.0
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise ModelError(f"{folder / CONFIG}: lora_dropout is {dropout!r}", "A number from 0 to below 1 belongs there.")
    for key, pattern, kinds in (("r", "rank_pattern", (int,)), ("lora_alpha", "alpha_pattern", (int, float))):
        patterns = j.get(pattern) or {}
        if not isinstance(patterns, dict):
            raise ModelError(
                f"{folder / CONFIG}: {pattern} is {patterns!r}", "An object of patterns and numbers belongs there."
            )
        if len(patterns) > MOST_PATTERNS:
            what = f"{folder / CONFIG}: {pattern} has {len(patterns):,} patterns"
            raise ModelError(what, f"Up to {MOST_PATTERNS:,} are read.")
        for p in patterns:
            if simple(p) is None:
                what = f"{folder / CONFIG}: {pattern} has a pattern that is broken or too complex: {quote(p)}"
                raise ModelError(what, "Use the modules' names.")
        if sum(map(ways_of, patterns)) > 20 * MOST_WAYS:
            what = f"{folder / CONFIG}: {pattern} has patterns that are too complex together"
            raise ModelError(what, "Use the modules' names.")
        values: dict[str, Any] = {key: j.get(key)} | {f"{pattern} {k!r}": v for k, v in patterns.items()}
        for name, value in values.items():
            if type(value) not in kinds or not 0 < value < 1e30:
                raise ModelError(f"{folder / CONFIG}: {name} is {value!r}", "A positive number belongs there.")


def named_by(folder: Path, j: dict[str, Any], targets: dict[str, Base], held: Iterable[str]) -> list[str]:
    """The paths of the linears that a config's target_modules and layers_to_transform mean, as PEFT reads them.

    A pattern that is not simple enough to be tried is taken to mean every layer's linears of the names that the file holds.
    """
    wanted, layers, left_out = j.get("target_modules"), j.get("layers_to_transform"), j.get("exclude_modules")
    parameters = j.get("target_parameters") or []
    for key, value in (("target_modules", wanted), ("exclude_modules", left_out)):
        if value is not None and not isinstance(value, (str, list)):
            raise ModelError(
                f"{folder / CONFIG}: {key} is {quote(str(value))}", "Names of modules or a pattern belong there."
            )
    if layers is not None:
        layers = [layers] if isinstance(layers, int) else layers
        if not isinstance(layers, list) or not all(type(n) is int for n in layers):
            raise ModelError(
                f"{folder / CONFIG}: layers_to_transform is {quote(str(layers))}", "Numbers of layers belong there."
            )
    if wanted is None:
        return []
    leaves, found = {path.split(".")[-1] for path in held}, []
    # gate_proj means those of experts too only where the file has any: PEFT leaves them out in some families
    experts = any(isinstance(targets.get(path), ExpertLinear) for path in held)
    for path, linear in targets.items():
        stack = isinstance(linear, ExpertLinear)
        layer, _, own = path.rpartition(".")
        parts = [f"0.{part}" for part in linear.parts] if stack else GATE_UP if own == "gate_up_proj" else ()
        names = [path, *(f"{layer}.{part}" for part in parts)]
        module = (experts or not stack) and (wanted == "all-linear" or any(meant(wanted, n, leaves) for n in names))
        module &= layers is None or bool({int(part) for part in path.split(".") if part.isdigit()} & set(layers))
        # a pattern that cannot be tried leaves out what the file does not hold
        module &= left_out is None or not meant(left_out, path, {path.split(".")[-1]} - leaves)
        if module or meant(parameters, as_parameter(path, linear), leaves):  # which PEFT never leaves out
            found.append(path)
    return found


def as_parameter(path: str, linear: Base) -> str:
    """The name of a linear's weight in target_parameters and in patterns for it."""
    return path if isinstance(linear, ExpertLinear) else f"{path}.weight"


def meant(wanted: str | list[str], path: str, leaves: set[str]) -> bool:
    """Whether a linear is among those that names or a pattern stand for; leaves: last names that a pattern too complex to try means."""
    if isinstance(wanted, list):
        return any(path == name or path.endswith(f".{name}") for name in wanted)
    pattern = simple(wanted)
    return path.split(".")[-1] in leaves if pattern is None else pattern.fullmatch(path) is not None


@lru_cache
def _parts(path: str) -> list[int]:
    """Where the parts of a path begin."""
    return [0, *(dot.end() for dot in re.finditer(r"\.", path))]


def by_pattern(j: dict[str, Any], key: str, path: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a path, as PEFT reads rank_pattern and alpha_pattern."""
    for pattern, value in (j.get(key) or {}).items():
        plain = simple(pattern)
        assert plain is not None, pattern  # refuse_what_is_not_lora has looked
        # at the start, or after any dot
        if any(plain.fullmatch(path, at) for at in _parts(path)):
            return value
    return default
