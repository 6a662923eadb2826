"""`minilora export --for peft` and `--for vllm`: writes an adapter with the keys and ranks that its reader expects."""

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..errors import ModelError, UsageError
from ..files.atomic import new_folder, require_empty
from ..files.model_folder import Folder, ModelFolder
from ..lora import adapters
from ..methods.table import PEFT_TYPES
from ..text.tokenizer import load_tokenizer
from .adapter import linears_without, load_adapter, metadata_of, write_adapter
from .check_export import check_export
from .consumers import VLLM_MODULES, make_alike, paths_of, split
from .load import empty_model, read_config


class Exported(NamedTuple):
    """How many linears have an adapter, how many can have one, the rank, and whether ranks and scales were made equal."""

    adapted: int
    linears: int
    r: int
    made_alike: bool


def export_adapter(model: Folder, adapter: Folder, output: str | Path, consumer: str) -> Exported:
    """Write an adapter of the model in this folder as a consumer reads it (consumers.py); no weight of the model is read.

    Any base of the right shapes will do. Raises ModelError with every key that matches no linear of the model, and with what
    the consumer would not apply; UsageError for a family on which it takes no adapters.
    """
    c, adapter = read_config(model), ModelFolder.of(adapter)
    if consumer == "vllm" and c.family not in VLLM_MODULES:
        raise UsageError(f"vllm takes no adapters on {c.family}", "Merge it: minilora merge.")
    require_empty(Path(output))
    if adapter.adapter_config.get("peft_type") in PEFT_TYPES:
        raise ModelError(f"{adapter} is no LoRA: its keys are the same for every reader", "Give the folder itself.")
    if adapter.adapter_config.get("init_lora_weights") == "pissa":
        what = f"{adapter} is PiSSA as PEFT trains it: no reader applies it without the base that it began from"
        raise ModelError(what, "Merge it: minilora merge.")
    meta = empty_model(c)
    load_adapter(meta, adapter, any_base=True)
    wrapped = {}
    for path, wrapper in adapters(meta):
        theirs = paths_of(path, c.family, consumer)
        wrapped |= dict(zip(theirs, split(wrapper, len(theirs)), strict=True))
    without = [theirs for path in linears_without(meta) for theirs in paths_of(path, c.family, consumer)]
    alike = consumer == "vllm" and make_alike(wrapped)
    base = str(adapter.adapter_config.get("base_model_name_or_path") or "")
    with new_folder(Path(output)) as stage:
        write_adapter(stage, wrapped, without, base, metadata_of(adapter.path), single=consumer == "vllm")
        for name, content in _own_tokenizer(model, adapter).items():
            (stage / name).write_bytes(content)
        problems = check_export(model, stage, consumer).problems
        if problems:
            hint = "What a reader does not have, minilora merge puts into the weights."
            raise ModelError(
                f"{consumer} would not apply {adapter} as it was trained\n  " + "\n  ".join(problems), hint
            )
    r = max(wrapper.r for wrapper in wrapped.values())
    return Exported(len(wrapped), len(wrapped) + len(without), r, alike)


def _own_tokenizer(model: Folder, adapter: ModelFolder) -> dict[str, bytes]:
    """The files of a tokenizer or chat template of the adapter's own, which go before the model's."""
    with suppress(ModelError):  # a model without a tokenizer
        return load_tokenizer(model, adapter).replaced
    return {}
