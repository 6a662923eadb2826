"""A model ready to answer: weights and adapter loaded, in the dtype and with the threads that are fastest on this machine."""

from collections.abc import Callable
from typing import TypedDict

import torch

from minilora.models.decoder import Decoder
from minilora.models.int8 import to_int8
from minilora.models.moe import MoEConfig

from ..adapted import merge
from ..errors import UsageError
from ..files.model_folder import ADAPTER_CONFIG, Folder, ModelFolder
from ..machine.compute import choose, choose_threads, name_of
from ..ranks.ranks import ALONE, Ranks
from ..sampling import generation_note
from ..text.tokenizer import Tokenizer, check_fits
from .adapter import base_note, load_adapter, template_note, trained_quant
from .load import keys_not_read, load_model
from .quantized import described, quant_of, quantized_note


class Opening(TypedDict, total=False):
    """The options of open_model, for a function that passes them on."""

    any_base: bool
    device: str | None
    compute: str
    int8: bool
    allow_partial: bool
    quant: str


def open_model(
    folder: Folder,
    tokenizer: Tokenizer,
    adapter: Folder | None = None,
    any_base: bool = False,
    device: str | None = None,
    compute: str = "auto",
    say: Callable[[str], object] = lambda line: None,
    int8: bool = False,
    allow_partial: bool = False,
    quant: str = "keep",
    ranks: Ranks = ALONE,
) -> Decoder:
    """The Decoder of a folder with its adapter, in evaluation mode; `say` is told how it computes, all ranks alike.

    int8 merges the adapter into the weights and rounds them to 8 bits (models/int8.py); quant is load_model's. Raises ModelError, and
    UsageError for int8 on a GPU or with quantised weights under an adapter.
    """
    model = load_model(folder, device=device, compute=compute, quant=quant)
    check_fits(tokenizer, model.config.vocab, folder)
    if not ranks.least(model.compute_dtype.itemsize == 2) and model.compute_dtype.itemsize == 2:
        model.compute = torch.float32
    if adapter:
        load_adapter(model, adapter, any_base, allow_partial)
        model.eval()
    if model.head.device.type == "cpu":
        torch.set_num_threads(choose_threads(model.config))
    if int8:
        round_to_int8(model)
    notes = [computing(model, compute) + (", the adapter merged first" if int8 and adapter else "")]
    note = quantized_note(model)
    notes += [f"{note}, widened for every token"] if note else []
    was = trained_quant(ModelFolder.of(adapter).path) if adapter else None
    if was is not None and was != quant_of(model):
        notes.append(f"the adapter was trained on {described(was)}, and is on {described(quant_of(model))}")
    say("; ".join(notes))
    return model


def folder_notes(folder: Folder, tokenizer: Tokenizer, adapter: Folder | None = None) -> dict[str, str]:
    """Lines for a header, by name: what minilora does not follow in the folder of a model or an adapter."""
    folder = ModelFolder.of(folder)
    found = {
        "config": keys_not_read(folder),
        "files": f"{ADAPTER_CONFIG} and its weights are not read: --adapter does that" if (folder / ADAPTER_CONFIG).is_file() else None,
        "answers": generation_note(folder),
        "base": base_note(ModelFolder.of(adapter), folder) if adapter else None,
        "template": template_note(ModelFolder.of(adapter), folder) if adapter else None,
    }  # fmt: skip
    return {name: note for name, note in found.items() if note} | tokenizer.notes


def round_to_int8(model: Decoder) -> None:
    """Merge a model's adapters and round its linears to int8, in place; UsageError on a GPU, and for a mixture of experts."""
    if model.head.device.type != "cpu":
        raise UsageError("--int8 is for answering on a CPU", "Leave it out, or give --device cpu.")
    if isinstance(model.config, MoEConfig):
        raise UsageError("--int8 takes no mixture of experts", "Leave it out; --quant int8 keeps them in 8 bits.")
    merge(model)
    to_int8(model)


def computing(model: Decoder, asked: str = "auto") -> str:
    """How a model computes and why."""
    device, stored = model.head.device, model.head.dtype
    threads = torch.get_num_threads()
    where = f" on {threads} thread{'s' if threads > 1 else ''}" if device.type == "cpu" else ""
    if model.int8_head is not None:
        return f"int8 products{where}, float32 beside them: weights rounded by rows, activations by tokens"
    choice = choose(model.config, stored, device, asked)
    why = choice.why if choice.dtype == model.compute_dtype else "another rank is fastest in it"
    return f"{name_of(model.compute_dtype)}{where}: {why}"
