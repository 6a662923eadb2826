"""`minilora serve`: open the models, and answer until a signal comes."""

from pathlib import Path
from typing import Unpack

import torch

from ..checkpoint.open_model import Opening, folder_notes, open_model
from ..errors import OutOfMemory, UsageError
from ..files.model_folder import ModelFolder
from ..machine.cpu import free_gb
from ..run.signals import StopSignal
from ..sampling import read_generation
from ..terminal import say
from ..text.tokenizer import check_fits, load_tokenizer
from .app import Endpoint, Guards, application
from .bodies import Limits
from .engine import Engine
from .listening import listen, server_of
from .models import Models
from .page import page_routes
from .runs import run_routes

MOST_CONTEXT = 4096  # unless the user says otherwise: keys and values of every slot may become so long


def serve(
    model: str | None,
    adapters: dict[str, str],
    runs: str | None,
    host: str,
    port: int,
    guards: Guards,
    slots: int,
    queue: int,
    context: int | None,
    max_tokens: int,
    **opening: Unpack[Opening],
) -> None:
    """Serve a model with its adapters, the runs of a folder, or both, until a signal comes.

    Raises UsageError for a port that is taken, ModelError for what cannot be opened, OutOfMemory if the slots need too much.
    """
    with listen(host, port) as listening:  # before the model is loaded, which takes longer
        engine, routes = None, []
        if model is not None:
            models = open_models(ModelFolder(model), adapters, **opening)
            limits = _limits(models, ModelFolder(model), slots, context, max_tokens)
            engine = Engine(models, slots, queue)
            routes = Endpoint(models, engine, limits, guards).routes()
            say(f"models  {', '.join(models.all)}")
        routes += page_routes(guards) + run_routes(None if runs is None else Path(runs))
        url = f"http://{'[::1]' if ':' in host else host}:{listening.getsockname()[1]}"
        say(f"ready   {url}   Ctrl-C ends it")
        with StopSignal() as signal:  # uvicorn handles the signal, ends in good order, and passes it on to this
            server_of(application(routes, guards, engine)).run(sockets=[listening])
    answered = "" if engine is None else f" after {engine.answered:,} answers"
    say(f"ended   by {signal.name or 'itself'}{answered}")


def open_models(folder: ModelFolder, adapters: dict[str, str], **opening: Unpack[Opening]) -> Models:
    """The base of a folder under the folder's name, and its adapters under theirs; says how they compute."""
    tokenizer = load_tokenizer(folder)
    name = folder.name
    if name in adapters:
        raise UsageError(f"an adapter has the name of the model, {name}", "Give it another: --adapter NAME=DIR.")
    if opening.get("int8") and adapters:
        what = "--int8 rounds the merged weights, and cannot hold several models"
        raise UsageError(what, "Give --quant int8, or serve a folder that minilora merge wrote.")
    notes(folder_notes(folder, tokenizer))
    if opening.get("compute", "auto") == "auto" and not opening.get("int8") and _on_cpu(opening.get("device")):
        # oneDNN keeps machine code for every number of rows of a 16-bit product (machine/cpu.py): prompts have all lengths
        opening["compute"] = "float32"
        say(
            "memory  computes in float32, in which it stays flat; --compute bfloat16 may be faster, and grows with every new length"
        )
    decoder = open_model(folder, tokenizer, say=lambda how: say(f"compute {how}"), **opening)
    models = Models(decoder, name, tokenizer)
    for its, place in adapters.items():
        adapter = ModelFolder(place)
        own = load_tokenizer(folder, adapter)
        check_fits(own, decoder.config.vocab, adapter)
        notes(
            {
                k: v
                for k, v in folder_notes(folder, own, adapter).items()
                if k in ("base", "template", "tokens", "chat")
            },
            its,
        )
        models.add(its, adapter, own, bool(opening.get("any_base")), bool(opening.get("allow_partial")))
    return models


def _on_cpu(device: str | None) -> bool:
    return device.startswith("cpu") if device else not torch.cuda.is_available()


def notes(lines: dict[str, str], about: str = "") -> None:
    for name, note in lines.items():
        say(f"{name:<8}{about}{': ' if about else ''}{note}")


def _limits(models: Models, folder: ModelFolder, slots: int, context: int | None, max_tokens: int) -> Limits:
    """What requests may ask for; OutOfMemory if keys and values of so many tokens do not fit into the memory that is free."""
    c, dtype = models.decoder.config, models.decoder.compute_dtype
    tokens = context or min(c.max_positions, MOST_CONTEXT)
    if tokens > c.max_positions:
        raise UsageError(f"--context is {tokens:,}", f"The model was made for {c.max_positions:,} positions.")
    # as cache.py allocates: a quarter more than the longest
    needed = 2 * slots * (tokens * 5 // 4 + 64) * c.kv_heads * c.head_size * c.layers * dtype.itemsize / 1e9
    free = free_gb(models.decoder.head.device)
    say(f"slots   {slots} answers at a time of up to {tokens:,} tokens each: up to {needed:.2f} GB of keys and values")
    if needed > free:
        what = f"keys and values of {slots} slots with {tokens:,} tokens take {needed:.1f} GB, {free:.1f} GB are free"
        raise OutOfMemory(what, "Give fewer --slots, or a smaller --context.")
    sampling, stop = read_generation(folder)
    return Limits(tokens, max_tokens, sampling, frozenset(stop))
