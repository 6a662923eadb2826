"""`minilora merge`: base and adapter in, one Hugging Face folder out, proven before it is there.

Each weight is summed in fp32 and rounded once to its own type. The folder is written under a hidden name and read back: every
tensor must have the bits of that sum, and the model's logits must be those of base + adapter up to rounding (verify.py). Only
then does it get its name.
"""

import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.models.decoder import Decoder
from minilora.models.quantized import quantized_weights

from ..errors import DiskError, ModelError, OutputInUse
from ..files.atomic import atomic_folder
from ..files.model_folder import Folder, ModelFolder
from ..files.tensors import Tensors
from ..lora import adapters, without_adapters
from ..text.tokenizer import check_fits, load_tokenizer
from .adapter import load_adapter
from .load import SHARD_BYTES, load_model, write_checkpoint
from .open_model import folder_notes
from .verify import Proof, logits_of, prompt_ids, prove, stored_logits_of, wide_logits_of


def merge_folder(
    model: Folder,
    adapter: str | Path,
    output: str | Path,
    shard_bytes: int = SHARD_BYTES,
    any_base: bool = False,
    allow_partial: bool = False,
    device: str | None = None,
    compute: str = "auto",
    say: Callable[[str], Any] = lambda line: None,
) -> Proof:
    """Write the merged checkpoint and return the proof; ModelError, and no folder, if it does not hold.

    A tokenizer or chat template of the adapter's own goes into the new folder; `say` hears of it.
    """
    model, output = ModelFolder.of(model), Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputInUse(f"{output} is not empty", "Give another --output.")
    decoder = load_model(model, device=device, compute=compute)
    if quantized_weights(decoder):
        raise ModelError(
            f"{model}: its weights are quantised, and a sum with an adapter would be rounded to their few levels",
            "Give the bf16 release of this model: an adapter fits it, with --any-base.",
        )
    _no_narrower(decoder)
    load_adapter(decoder, adapter, any_base, allow_partial)
    decoder.eval()
    tokenizer = load_tokenizer(model, adapter)
    for name, note in folder_notes(model, tokenizer, adapter).items():
        say(f"{name:<8}{note}")
    check_fits(tokenizer, decoder.config.vocab, model)
    prompts = prompt_ids(tokenizer)
    tensors = model.tensors
    need = sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in tensors.shapes.values())
    free = shutil.disk_usage(output.parent if output.parent.exists() else ".").free
    if free < need:
        raise DiskError(
            f"{output} needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
            "Free some space, or give another --output.",
        )
    wrapped = {f"{path}.weight": wrapper for path, wrapper in adapters(decoder)}

    def tensor(name: str) -> Tensor:
        with tensors.reading(name) as stored:
            return wrapped[name].merged_weight(stored) if name in wrapped else stored.clone()

    with atomic_folder(output) as stage:
        write_checkpoint(stage, tensors.shapes, tensor, model.path, shard_bytes)
        for name, content in tokenizer.replaced.items():
            (stage / name).write_bytes(content)
        written = Tensors(stage)
        for name in tensors.shapes:
            with written.reading(name) as found:
                if not torch.equal(found, tensor(name).cpu()):
                    raise _not_proven(f"{name} was not read back as it was written")
        truth, plain = wide_logits_of(decoder, prompts), stored_logits_of(decoder, prompts)
        adapted = logits_of(decoder, prompts)
        with without_adapters(decoder):
            base = logits_of(decoder, prompts)
        del decoder
        wrapped.clear()
        gc.collect()
        written_model = load_model(stage, device=device, compute=compute)
        _no_narrower(written_model)
        merged = logits_of(written_model, prompts)
        proof = prove(truth, plain, merged, adapted, base)
        if not proof.holds:
            raise _not_proven(
                f"the merged model is off by {proof.merged:.3g} in a logit, {proof.allowed:.3g} would be rounding"
            )
    return proof


def _no_narrower(model: Decoder) -> None:
    """Compute in no narrower dtype than the weights': the proof's tolerance is their rounding alone."""
    if model.compute is not None and model.compute.itemsize <= model.head.dtype.itemsize:
        model.compute = None


def _not_proven(what: str) -> ModelError:
    return ModelError(f"{what}; nothing was written", "Check the disk and the memory of this machine, and report it.")
