"""`minilora merge`: base and adapter in, one Hugging Face folder out, proven before it is there.

Each weight is summed in fp32 and rounded once to its own type. The folder is written under a hidden name and read back: every
tensor must have the bits of that sum, and the model's logits must be those of base + adapter up to rounding (verify.py). Only
then does it get its name.
"""

import gc
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.kernels.quantized import weight_as
from minilora.models.decoder import Decoder
from minilora.models.quantized import widen_linears

from ..adapted import adapted, require_mergeable, without_adapters
from ..errors import DiskError, ModelError
from ..files.atomic import new_folder, require_empty
from ..files.model_folder import Folder, ModelFolder
from ..files.tensors import Tensors
from ..lora import base_parameters
from ..machine.compute import name_of
from ..text.tokenizer import check_fits, load_tokenizer
from .adapter import load_adapter, needed_quant, trained_quant
from .load import load_model
from .open_model import folder_notes
from .places import Place, by_weight, in_files, places
from .quantized import QUANTS, Stored, described, quant_of
from .save import SHARD_BYTES, carried, carried_tensor, write_checkpoint
from .verify import Proof, largest_difference, logits_of, prompt_ids, prove, stored_logits_of, wide_logits_of


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

    A quantised base is widened first: the merged folder is plain. An adapter that was trained on a quantised base goes on the plain
    one as well, and `say` is told by how much the two differ; one that began by LoftQ goes on the base in its bits, widened. A
    tokenizer or chat template of the adapter's own goes into the new folder.
    """
    model, output = ModelFolder.of(model), Path(output)
    require_empty(output)
    decoder = load_model(model, device=device, compute=compute, quant=needed_quant(adapter) or "keep")
    load_adapter(decoder, adapter, any_base, allow_partial)
    require_mergeable(decoder)
    bits, was = quant_of(decoder), trained_quant(adapter)
    if bits != "off":
        dtype = name_of(decoder.head.dtype)
        say(f"quant   the {bits} weights are widened to {dtype}; the merged folder is not quantised")
        widen_linears(decoder, decoder.head.dtype)
    if was not in (None, bits, *QUANTS):
        say(f"quant   the adapter was trained on {described(was)}, and is merged into {described(bits)}")
    _no_narrower(decoder)
    decoder.eval()
    tokenizer = load_tokenizer(model, adapter)
    for name, note in folder_notes(model, tokenizer, adapter).items():
        say(f"{name:<8}{note}")
    check_fits(tokenizer, decoder.config.vocab, model)
    prompts = prompt_ids(tokenizer)
    changed = {f"{path}.{name}": (module, name) for path, module in adapted(decoder) for name in module.merges}
    stored, shapes, widened = Stored.of(model, decoder), model.tensors.shapes, {}
    beside = carried(stored, decoder.head.dtype)
    elsewhere = places(decoder, {name: shape for name, (_, shape) in shapes.items()})
    if bits != "off" or stored.parts:
        widened = base_parameters(decoder)
        own = {name: (w.dtype, tuple(w.shape)) for name, w in widened.items()}
        shapes = in_files(by_weight(elsewhere), own) | beside
    need = sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in shapes.values())
    free = shutil.disk_usage(output.parent if output.parent.exists() else ".").free
    if free < need:
        raise DiskError(
            f"{output} needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
            "Free some space, or give another --output.",
        )

    def tensor(name: str) -> Tensor:
        if name in beside:
            return carried_tensor(stored, name, beside[name])
        place = elsewhere.get(name) or Place(name, slice(None), shapes[name][1])
        with nullcontext() if place.name in widened else model.tensors.reading(name) as found:
            plain = (
                place.tensor(weight_as(widened[place.name], shapes[name][0], place.rows)) if found is None else found
            )
            if place.name not in changed:
                return plain.detach().clone()
            module, own_name = changed[place.name]
            return place.tensor(module.merged(own_name, place.matrix(plain), place.rows))

    with new_folder(output) as stage:
        write_checkpoint(stage, shapes, tensor, model.path, shard_bytes)
        for name, content in tokenizer.replaced.items():
            (stage / name).write_bytes(content)
        written = Tensors(stage)
        for name in shapes:
            with written.reading(name) as found:
                if not torch.equal(found, tensor(name).cpu()):
                    raise _not_proven(f"{name} was not read back as it was written")
        truth, plain = wide_logits_of(decoder, prompts), stored_logits_of(decoder, prompts)
        unmerged = logits_of(decoder, prompts)
        with without_adapters(decoder):
            base = logits_of(decoder, prompts)
        del decoder
        changed.clear()
        widened.clear()
        gc.collect()
        written_model = load_model(stage, device=device, compute=compute)
        _no_narrower(written_model)
        merged_logits = logits_of(written_model, prompts)
        proof = prove(truth, plain, merged_logits, unmerged, base)
        if not proof.holds:
            raise _not_proven(
                f"the merged model is off by {proof.merged:.3g} in a logit, {proof.allowed:.3g} would be rounding"
            )
        if was in QUANTS and was != bits:
            del written_model
            gc.collect()
            trained = load_model(model, device=device, compute=compute, quant=was)
            load_adapter(trained, adapter, any_base, allow_partial)
            off = largest_difference(merged_logits, logits_of(trained.eval(), prompts))
            say(f"trained on {described(was)}: a logit of that model and of the merged one differ by up to {off:.3g}")
    return proof


def _no_narrower(model: Decoder) -> None:
    """Compute in no narrower dtype than the weights': the proof's tolerance is their rounding alone."""
    if model.compute_dtype.itemsize <= model.head.dtype.itemsize:
        model.compute = None


def _not_proven(what: str) -> ModelError:
    return ModelError(f"{what}; nothing was written", "Check the disk and the memory of this machine, and report it.")
