"""A model ready to answer: weights loaded, adapter on, threads and dtype as this machine likes them."""

from collections.abc import Callable
from pathlib import Path

import torch

from minilora.models.decoder import Decoder
from minilora.models.int8 import to_int8

from .adapter import load_adapter
from .checkpoint import load_model
from .compute import choose, choose_threads, name_of
from .errors import UsageError
from .lora import merge
from .text.tokenizer import Tokenizer, check_fits


def open_model(
    folder: str | Path, tokenizer: Tokenizer, adapter: str | Path | None = None, any_base: bool = False,
    device: str | None = None, compute: str = "auto", say: Callable[[str], object] = lambda line: None, int8: bool = False,
    allow_partial: bool = False,
) -> Decoder:  # fmt: skip
    """The Decoder of a folder with its adapter, in evaluation mode; `say` gets a line of how it computes.

    int8 merges the adapter into the weights and rounds them (models/int8.py). Raises ModelError, and UsageError for int8 on a GPU.
    """
    model = load_model(folder, device=device, compute=compute)
    check_fits(tokenizer, model.config.vocab, Path(folder))
    if adapter:
        load_adapter(model, adapter, any_base, allow_partial)
        model.eval()
    if model.head.device.type == "cpu":
        torch.set_num_threads(choose_threads(model.config))
    if not int8:
        say(computing(model, compute))
    else:
        if model.head.device.type != "cpu":
            raise UsageError("--int8 is for answering on a CPU", "Leave it out, or give --device cpu.")
        merge(model)
        to_int8(model)
        merged = ", the adapter merged first" if adapter else ""
        say(f"compute int8 products, float32 beside them: weights rounded by rows, activations by tokens{merged}")
    return model


def computing(model: Decoder, asked: str = "auto") -> str:
    """How a model computes and why, in a line."""
    device, stored = model.head.device, model.head.dtype
    dtype = name_of(model.compute or stored)
    threads = torch.get_num_threads()
    where = f" on {threads} thread{'s' if threads > 1 else ''}" if device.type == "cpu" else ""
    return f"compute {dtype}{where}: {choose(model.config, stored, device, asked).why}"
