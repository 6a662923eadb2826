"""Writing a checkpoint as a Hugging Face folder: tensors in shards, and the small files that belong to the model."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from minilora.kernels.quantized import weight_as
from minilora.models.decoder import Decoder
from minilora.models.layers import Adapted

from ..errors import UsageError
from ..files.atomic import atomic_folder, require_own
from ..files.hub_cache import check_namesake, lies_in
from ..files.model_folder import MAX_JSON, ModelFolder
from ..files.safetensors import write_safetensors
from ..files.tensors import INDEX
from ..lora import base_parameters
from .places import by_weight, in_files, places
from .quantized import Stored, plain_config

WIDE = re.compile(r".*\.(A_log|dt_bias)")  # in fp32 whatever the dtype of a model
# what a folder holds beside its language model, which a merged folder has as well: vision, and the prediction of several tokens
CARRIED = re.compile(r"(model\.visual|mtp)\..+")
About = tuple[torch.dtype, tuple[int, ...]]  # dtype and shape
SHARD_BYTES = 5_000_000_000
# what a folder holds beside weights and belongs to the model
COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "LICENSE", "MODEL_LICENSE", "tokenizer.model",
    "ice_text.model", "qwen.tiktoken",
)  # fmt: skip
# the names of the files of a model's folder, beside its own code
OF_A_MODEL = re.compile("|".join(map(re.escape, (*COMPANIONS, INDEX))) + r"|model(-\d+-of-\d+)?\.safetensors")


def write_checkpoint(
    folder: Path,
    shapes: dict[str, About],
    tensor: Callable[[str], Tensor],
    companions: Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Fill an empty folder with a checkpoint: the tensors in shards of at most shard_bytes, and the companion files.

    `tensor(name)` is asked for one tensor at a time. The small files (config, tokenizer) are copied from `companions`.
    """
    shards: list[list[str]] = [[]]
    sizes = {name: dtype.itemsize * torch.Size(shape).numel() for name, (dtype, shape) in shapes.items()}
    for name in shapes:
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + sizes[name] > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shapes, tensor)
    else:
        places = {}
        for i, names in enumerate(shards, 1):
            file = f"model-{i:05}-of-{len(shards):05}.safetensors"
            write_safetensors(folder / file, {n: shapes[n] for n in names}, tensor)
            places |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    copy_companions(companions, folder)
    j = ModelFolder(companions).config
    if j.keys() != plain_config(j).keys():
        (folder / "config.json").write_text(json.dumps(plain_config(j), indent=2) + "\n")


def copy_companions(source: Path, target: Path) -> None:
    """Copy the small files of a model's folder, and its own Python code as data: it is never run or imported here."""
    for name in [*COMPANIONS, *own_code(source)]:
        # what nothing here reads could be anybody's file that a link makes public
        if (source / name).is_file() and (Path(name).suffix or lies_in(source, source / name)):
            check_namesake(source, source / name)
            shutil.copyfile(source / name, target / name)


def own_code(folder: Path) -> list[str]:
    """The names of the Python files directly in a folder; links only within it, or within its Hugging Face cache."""
    files = [p for p in sorted(folder.glob("*.py")) if p.is_file() and lies_in(folder, p)]
    return [p.name for p in files if p.stat().st_size <= MAX_JSON]


def save_model(model: Decoder, folder: str | Path, companions: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a model without adapters as a Hugging Face folder, in the dtype that its config.json names.

    The config and tokenizer files, and tensors beside the language model, are copied from the folder `companions`, the one the
    model was loaded from. An older model in `folder` is replaced; OutputInUse if it holds anything else.
    """
    source = ModelFolder(companions)
    code = own_code(source.path)
    require_own(Path(folder), lambda name: OF_A_MODEL.fullmatch(name) or name in code)
    parameters = base_parameters(model)
    if any(isinstance(m, Adapted) for m in model.modules()):
        raise UsageError("the model has adapters", "Call minilora.merge(model) first, or minilora.save_adapter.")
    own = model.config.dtype
    wide = torch.promote_types(own, torch.float32)
    shapes = {name: (wide if WIDE.fullmatch(name) else own, tuple(p.shape)) for name, p in parameters.items()}
    stored = Stored.of(source, model) if has_weights(source.path) else None
    beside, kept = (stored.tensors.shapes, carried(stored, own)) if stored else ({}, {})
    found = places(model, {name: shape for name, (_, shape) in beside.items()})

    def tensor(name: str) -> Tensor:
        if name in found:
            place = found[name]
            return place.tensor(weight_as(parameters[place.name], shapes[place.name][0], place.rows).detach())
        if name in parameters:
            return weight_as(parameters[name], shapes[name][0]).detach()
        assert stored, name
        return carried_tensor(stored, name, kept[name])

    with atomic_folder(Path(folder)) as stage:
        written = in_files(by_weight(found), shapes) | kept
        write_checkpoint(stage, written, tensor, source.path, shard_bytes)


def carried(stored: Stored, dtype: torch.dtype) -> dict[str, About]:
    """dtype and shape of what a folder holds beside its language model; what is quantised there is widened to `dtype`."""
    return {
        name: (dtype, stored.shape_of(name)) if name in stored.parts else about
        for name, about in stored.tensors.shapes.items()
        if CARRIED.fullmatch(name) and name not in stored.hidden
    }


def carried_tensor(stored: Stored, name: str, about: About) -> Tensor:
    """A tensor that `carried` tells of."""
    with stored.reading(name, torch.Size(about[1])) as value:
        return weight_as(value, about[0]).clone()


def has_weights(folder: str | Path) -> bool:
    return any((Path(folder) / name).is_file() for name in (INDEX, "model.safetensors"))
