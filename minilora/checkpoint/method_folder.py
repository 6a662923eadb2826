"""The folder of a method beside LoRA, both ways: adapter_config.json and adapter_model.safetensors, as PEFT has them.

A method says which tensors its file holds (methods/table.py). Reading is strict: the same keys and the same shapes.
"""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from minilora.models.decoder import Decoder

from ..adapted import adapted
from ..errors import ModelError, quote
from ..files.mlx_adapter import WEIGHTS as MLX_WEIGHTS
from ..files.mlx_adapter import MLXAdapter
from ..files.model_folder import ADAPTER_CONFIG, ADAPTER_PICKLE, ADAPTER_WEIGHTS, ModelFolder, is_prefix_folder
from ..files.safetensors import SafetensorsFile, write_tensors
from ..lora import adapters, base_parameters, require_no_adapters, trained_parameters
from ..methods.dora import DoRALinear
from ..methods.table import PEFT_TYPES, method_of
from ..terminal import shell
from ..text.template import jinja_text
from .load import check_finite, empty_model, fingerprint
from .quantized import quant_of

PREFIX = "base_model.model."


def fill_method_folder(model: nn.Module, folder: Path, base: str = "") -> None:
    """The two files of what a method trained, into a folder that the caller makes durable."""
    method = method_of(model)
    assert method is not None, "the model has no adapters"
    tensors = {key: t.detach().float().cpu().contiguous() for key, t in method.tensors(model).items()}
    write_tensors(folder / ADAPTER_WEIGHTS, tensors, about_base(model, base))
    common = {"peft_type": method.PEFT_TYPE, "task_type": "CAUSAL_LM", "base_model_name_or_path": base}
    own = {"inference_mode": True, "revision": None} | method.settings(model)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(common | own, indent=2) + "\n")


def about_base(model: nn.Module, base: str) -> dict[str, str]:
    """What the file of an adapter keeps of its base: a fingerprint of the weights, their bits, and a hash of the chat template."""
    about = {"minilora_base": fingerprint(base_parameters(model)), "minilora_quant": quant_of(model)}
    with suppress(ModelError):  # a name that is no folder here
        about |= {"minilora_chat": template_hash(ModelFolder(base))} if base else {}
    return about


def template_hash(folder: ModelFolder) -> str:
    """A short name for the chat template of a folder; of none, of the empty text."""
    return hashlib.sha256((jinja_text(folder) or "").encode()).hexdigest()[:16]


def load_method_folder(model: Decoder, folder: Path, j: dict[str, Any], any_base: bool = False) -> None:
    """Put in what a folder describes and copy its tensors in. Raises ModelError with what does not fit."""
    method, file = PEFT_TYPES[j["peft_type"]], weights_of(folder)
    require_no_adapters(model)
    check_base(folder, file, model, any_base)
    model.requires_grad_(False)
    shapes = {key: entry.shape for key, entry in file.entries.items()}
    try:
        # on a model without memory first: a header can say any size
        check_fit(file, method.read(empty_model(model.config), j, shapes))
        places = method.read(model, j, shapes)
    except (ValueError, LookupError, TypeError, RuntimeError, AssertionError) as error:
        what = f"{folder} is no {j['peft_type']} adapter of this model: {quote(str(error))}"
        raise ModelError(what, "Make the adapter again, or merge it.") from None
    fill(file, places)


def fill(file: SafetensorsFile, wanted: dict[str, Tensor]) -> None:
    """Copy the tensors of an adapter's file; ModelError unless it has these keys and shapes and finite numbers."""
    check_fit(file, wanted)
    for key, p in wanted.items():
        value = file.tensor(key)
        check_finite(value, f"{file.path}: {key}")
        with torch.no_grad():
            p.copy_(value)


def check_fit(file: SafetensorsFile, wanted: dict[str, Tensor]) -> None:
    """ModelError unless a file has these keys and shapes, in floating point."""
    if odd := sorted(wanted.keys() ^ file.entries.keys()):
        which = "is missing" if odd[0] in wanted else "has no place in this model"
        more = f", and {len(odd) - 1} more do not fit" if len(odd) > 1 else ""
        raise ModelError(f"{file.path}: {odd[0]} {which}{more}", "It belongs to another base model.")
    for key, p in wanted.items():
        entry = file.entries[key]
        if entry.shape != tuple(p.shape) or not entry.dtype.is_floating_point:
            what = f"{file.path}: {key} is {list(entry.shape)} {entry.dtype}"
            raise ModelError(what, f"{list(p.shape)} fits: it belongs to another base model.")


def weights_of(folder: Path) -> SafetensorsFile:
    """The tensors of an adapter's folder; ModelError if it has none that can be read, or an empty one."""
    file = _weights_of(folder)
    if not file.entries:
        raise ModelError(f"{file.path} holds no adapter", "Give the folder of a trained adapter, such as RUN/adapter.")
    empty = next((key for key, entry in file.entries.items() if 0 in entry.shape), None)
    if empty is not None:
        what = f"{file.path}: {empty} is {list(file.entries[empty].shape)}, which holds nothing"
        raise ModelError(what, "Make the adapter again.")
    return file


def _weights_of(folder: Path) -> SafetensorsFile:
    if (folder / ADAPTER_WEIGHTS).exists():
        return SafetensorsFile(folder / ADAPTER_WEIGHTS)
    if (folder / MLX_WEIGHTS).exists():
        return MLXAdapter(folder / MLX_WEIGHTS)
    if is_prefix_folder(folder):
        if (folder / "model.safetensors").exists():
            return SafetensorsFile(folder / "model.safetensors")
        raise ModelError(f"{folder}: the prefix is pickle", f"{shell('convert', folder, 'OUT')}, and give OUT.")
    if (folder / ADAPTER_PICKLE).exists():
        what = f"the weights are pickle ({ADAPTER_PICKLE}), which can run code when it is read"
        raise ModelError(f"{folder}: {what}", f"{shell('convert', folder, 'OUT')}, and give OUT.")
    raise ModelError(f"{folder}: no {ADAPTER_WEIGHTS}", f"Give a folder with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}.")


def check_base(folder: Path, file: SafetensorsFile, model: nn.Module, any_base: bool) -> None:
    """ModelError if minilora saved the adapter on another base than this one, unless any_base."""
    base = file.metadata.get("minilora_base")
    if base is not None and not any_base and base != fingerprint(base_parameters(model)):
        raise ModelError(
            f"{folder} was trained on another base model than this one (same shapes, other weights)",
            "Give the base it was trained on, or --any-base to use it on this one.",
        )


def file_keys(model: nn.Module) -> dict[str, str]:
    """Trained parameter -> its key in the file of an adapter, for those that the file holds as they are."""
    trained, method = trained_parameters(model), method_of(model)
    if method is not None:
        keys = {id(t): key for key, t in method.tensors(model).items()}
        return {name: keys[id(p)] for name, p in trained.items() if id(p) in keys}
    found = {}
    for path, wrapper in adapters(model):
        if wrapper.factors()[0] is wrapper.lora_A:
            found |= {f"{path}.lora_{half}": f"{PREFIX}{path}.lora_{half}.weight" for half in "AB"}
        if isinstance(wrapper, DoRALinear):
            found[f"{path}.lora_magnitude_vector"] = f"{PREFIX}{path}.lora_magnitude_vector"
    return found


def state_beside(model: nn.Module) -> dict[str, Tensor]:
    """What a run goes on from that its adapter's file does not hold as it is: parameters, and buffers of what was put in."""
    keys = file_keys(model)
    found = {name: cast(Tensor, p) for name, p in trained_parameters(model).items() if name not in keys}
    for path, part in adapted(model):
        own = {name: b for name, b in part.named_buffers() if not name.startswith("base.")}
        found |= {f"{path}.{name}": b for name, b in own.items() if name in part.state_dict()}
    return found
