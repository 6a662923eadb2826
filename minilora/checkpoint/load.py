"""A Hugging Face folder in, a Decoder out, and the way back.

config.json names the family and its sizes; the tensors of model.safetensors (or of the shards that
model.safetensors.index.json lists) carry the names of the Decoder's parameters and are copied into them one at a time. What
is missing, what is too much and what has another shape is told in one message. Nothing of a folder is executed, and pickle
is not read.
"""

import difflib
import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.kernels.attention import use_newest_flash
from minilora.kernels.fp8_rows import FP8RowsWeight
from minilora.kernels.quantized import QuantizedWeight, Weight, relative_error
from minilora.models import chatglm, chatglm2, glm, glm_moe, gpt2, qwen, qwen1, qwen3_5, qwen3_next, qwen_moe
from minilora.models.config import Config
from minilora.models.config_json import DTYPES, MOST
from minilora.models.config_keys import DROPOUTS, check_keys, unknown_keys
from minilora.models.decoder import Decoder
from minilora.models.gathered import GatheredWeight
from minilora.models.layers import pack_weights
from minilora.models.quantized import pack_codes, quantize_linears

from ..errors import ModelError, UsageError, quote
from ..files.model_folder import Folder, ModelFolder
from ..files.tensors import fold
from ..lora import base_parameters, linears
from ..machine.compute import choose
from .places import in_files
from .quantized import FORMS, QUANTS, Stored, format_of
from .refused import refusal
from .save import CARRIED

# by model_type; "chatglm2" is what a folder of ChatGLM2 and later is called here, its own model_type is "chatglm" too
FAMILIES = {
    "qwen2": qwen, "qwen3": qwen, "qwen": qwen1, "glm": glm, "glm4": glm, "chatglm2": chatglm2, "chatglm": chatglm,
    "qwen3_5": qwen3_5, "qwen3_5_text": qwen3_5,
    "qwen3_next": qwen3_next, "qwen3_5_moe": qwen3_next, "qwen3_5_moe_text": qwen3_next,
    "qwen2_moe": qwen_moe, "qwen3_moe": qwen_moe, "glm4_moe": glm_moe, "glm4_moe_lite": glm_moe,
    "gpt2": gpt2,
}  # fmt: skip
# the first of these that a folder has, in any layer, one tensor or two, tells its family: the order matters
SIGNATURES = {
    "glm4_moe_lite": "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
    "glm4_moe": "model.layers.0.mlp.gate.e_score_correction_bias",
    "qwen3_next": "model.layers.0.linear_attn.in_proj_qkvz.weight",
    "qwen3_5_moe": "model.language_model.layers.0.mlp.gate.weight",
    "qwen3_5_moe_text": "model.layers.0.linear_attn.in_proj_qkv.weight model.layers.0.mlp.gate.weight",
    "qwen2_moe": "model.layers.0.mlp.shared_expert_gate.weight",
    "qwen3_moe": "model.layers.0.mlp.gate.weight",
    "chatglm2": "transformer.encoder.layers.0.self_attention.query_key_value.weight",
    "chatglm": "transformer.layers.0.attention.query_key_value.weight",
    "gpt2": "transformer.wpe.weight",
    "qwen": "transformer.h.0.attn.c_attn.weight",
    "glm4": "model.layers.0.post_self_attn_layernorm.weight",
    "glm": "model.layers.0.mlp.gate_up_proj.weight",
    "qwen3_5": "model.language_model.layers.0.linear_attn.in_proj_qkv.weight",
    "qwen3_5_text": "model.layers.0.linear_attn.in_proj_qkv.weight",
    "qwen3": "model.layers.0.self_attn.q_norm.weight",
    "qwen2": "model.layers.0.self_attn.q_proj.bias",
}
QUANTIZED = re.compile(r".*\.(weight_scale|weight_scale_inv|qweight|qzeros|scales|g_idx|absmax|quant_map|SCB)")
QUANT = ("keep", "off", *QUANTS, FP8RowsWeight.name)
MODEL_TYPES = [family for family in FAMILIES if family != "chatglm2"]
MOST_EXPERTS = 1 << 16  # of all layers
FIRST = 16  # values of a weight by which a base model is recognised


def read_config(folder: Folder) -> Config:
    """The Config of a checkpoint folder; ModelError says which key, and what is supported."""
    folder = ModelFolder.of(folder)
    path, j = folder / "config.json", folder.language
    family = _family(path, j)
    try:
        format_of(j)
    except ValueError as error:
        raise ModelError(f"{path}: {error}", "Use the bf16 or fp16 release of this model.") from None
    if j.get("pre_seq_len"):
        raise ModelError(
            f"{path}: pre_seq_len says that this folder holds a P-tuning prefix",
            "Give it with --adapter, and its base with --model; or take the key out of config.json for the base alone.",
        )
    try:
        check_keys(j | {"quantization_config": None}, family)
        return _of_some_size(FAMILIES[family].config(j))
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        reason = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise ModelError(
            f"{path}: {reason}",
            f"The file is damaged, or not of a {family} model, or the model uses a feature that minilora does not support.",
        ) from None


def _of_some_size(c: Config) -> Config:
    """ValueError for numbers that are out of all proportion together, though each of them may stand."""
    widest = max(c.heads * c.head_size, getattr(c, "value_heads", 0) * getattr(c, "value_size", 0))
    if widest > MOST:
        raise ValueError(f"all heads have {widest:,} values together; up to {MOST:,} are supported")
    experts = c.layers * getattr(c, "experts", 0)
    if experts > MOST_EXPERTS:
        raise ValueError(f"all layers have {experts:,} experts together; up to {MOST_EXPERTS:,} are supported")
    return c


# how classes of language models are called; ChatGLM's own code has ChatGLMModel
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ChatGLMModel")


def classes_of(j: dict[str, Any]) -> list[str]:
    """What a config.json holds under architectures, as texts."""
    given = j.get("architectures") or []
    return [str(name) for name in (given if isinstance(given, list) else [given])]


def keys_not_read(folder: Folder) -> str | None:
    """A line with the keys of a folder's config.json that are not known here, if there are any."""
    folder = ModelFolder.of(folder)
    path, j = folder / "config.json", folder.language
    every = unknown_keys(j, _family(path, j))
    names, dropouts = ([n for n in every if (n in DROPOUTS) == wanted] for wanted in (False, True))
    told = ", ".join(quote(name, 40) for name in names[:6]) + (f" and {len(names) - 6} more" if names[6:] else "")
    lines = [f"keys that are not known, and not read: {told}"] if names else []
    lines += [f"dropouts of the base, which are not applied: {', '.join(dropouts)}"] if dropouts else []
    heads = [name for name in classes_of(j) if not name.endswith(LANGUAGE_MODELS)]
    if heads:
        lines.append(f"architectures names {quote(heads[0], 60)}; it is taken as a language model")
    return "; ".join(lines) or None


def _family(path: Path, j: dict[str, Any]) -> str:
    """The key in FAMILIES of a config.json; ModelError that names the nearest if it has none."""
    kind = j.get("model_type")
    if kind == "chatglm" and ("multi_query_attention" in j or "padded_vocab_size" in j):
        return "chatglm2"
    if isinstance(kind, str) and kind in FAMILIES and kind != "chatglm2":
        return kind
    known = refusal(str(kind), j)
    if known is not None:
        missing, hint = known
        raise ModelError(f"{path}: model_type {str(kind)[:40]!r} is not supported: {missing}", hint)
    nearest = difflib.get_close_matches(str(kind), MODEL_TYPES, 1)
    raise ModelError(
        f"{path}: model_type {str(kind)[:40]!r} is not supported{f' (the nearest is {nearest[0]})' if nearest else ''}",
        f"Supported are {', '.join(MODEL_TYPES)}.",
    )


def empty_model(c: Config, dtype: torch.dtype | None = None, quant: str = "off") -> Decoder:
    """The Decoder of a Config without memory: its parameters lie on the meta device, laid together as a loaded model's.

    quant nf4 or int8 is that of its linears.
    """
    with torch.device("meta"):
        model = FAMILIES[c.family].decoder(c).to(dtype or c.dtype)
    if quant in FORMS:
        shapes = {
            f"{path}.weight": linear.weight.shape
            for path, linear in linears(model).items()
            if not path.endswith(".gate")
        }
        quantize_linears(model, {name: FORMS[quant].empty(shape, "meta") for name, shape in shapes.items()})
    pack_weights(model)
    pack_codes(model)
    return model


def load_model(
    folder: Folder,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    compute: str = "auto",
    quant: str = "keep",
) -> Decoder:
    """The Decoder of a checkpoint folder, frozen and in evaluation mode.

    dtype is that of the weights in memory, None the checkpoint's own; compute names that of activations and products, auto the
    fastest one on this machine (compute.py). device None is the GPU if there is one. quant nf4 or int8 quantises the linears of the
    blocks, fp8-rows also what is multiplied with them (fp8_rows.py); a folder that is quantised already is taken as it is (keep) or
    widened to dtype (off). Beyond the model itself one tensor is in memory at a time. Raises ModelError with every mismatch between the folder and the model.
    """
    device = find_device(device)
    model, stored = described_model(ModelFolder.of(folder), dtype, quant)
    model = model.to_empty(device=device)
    pack_weights(model)
    pack_codes(model)
    for name, weight in base_parameters(model).items():
        fill(weight, stored, name)
    return ready(model, device, compute)


def described_model(folder: ModelFolder, dtype: torch.dtype | None, quant: str) -> tuple[Decoder, Stored]:
    """The Decoder of a folder on the meta device, with the weights that load_model gives it, and where they are read from."""
    c = read_config(folder)
    try:
        model = empty_model(c, dtype)
    except RuntimeError:
        raise ModelError(
            f"{folder / 'config.json'}: the sizes are larger than any memory", "The file is damaged."
        ) from None
    stored = Stored.of(folder, model)
    check_shapes(model, stored)
    quantize_linears(model, _empty_weights(model, stored, quant))
    pack_weights(model)
    pack_codes(model)
    return model, stored


@torch.no_grad()
def fill(weight: Weight, stored: Stored, name: str) -> None:
    """Read a weight of that name, in the form that it has in memory."""
    what = f"{stored.tensors.folder}: {name}"
    with stored.reading(name, weight.shape) as value:
        if isinstance(weight, QuantizedWeight):
            _quantize(weight, value, what)
        else:
            weight.copy_(value.weight_as(weight.dtype) if isinstance(value, QuantizedWeight) else value)
            check_finite(weight, what)


def ready(model: Decoder, device: torch.device, compute: str) -> Decoder:
    """A model whose weights are there, frozen, in evaluation mode, and with the dtype that it computes in."""
    model.compute = choose(model.config, model.head.dtype, device, compute).dtype
    use_newest_flash(device, model.config.head_size)
    return model.requires_grad_(False).eval()


def _empty_weights(model: Decoder, stored: Stored, quant: str) -> dict[str, QuantizedWeight]:
    """By name, the linears' weights that are quantised in memory, without what they hold."""
    if quant not in QUANT:
        raise UsageError(f"quant {quant[:40]!r} is not known", f"It can be {', '.join(QUANT)}.")
    shapes = {
        f"{path}.weight": linear.weight.shape for path, linear in linears(model).items() if not path.endswith(".gate")
    }
    kept = {name: shape for name, shape in shapes.items() if name in stored.parts and quant in ("keep", stored.form)}
    made = {name: shape for name, shape in shapes.items() if name not in kept and quant in FORMS}
    return {name: stored.empty(name, shape, "meta") for name, shape in kept.items()} | {
        name: FORMS[quant].empty(shape, "meta") for name, shape in made.items()
    }


def _quantize(weight: QuantizedWeight, value: Weight, what: str) -> None:
    """Fill a weight from a file's: as it is where that has the same format, else quantised from its values."""
    if isinstance(value, type(weight)):
        weight.copy_(value)
        return
    value = value.weight_as(torch.float32) if isinstance(value, QuantizedWeight) else value
    check_finite(value, what)
    value = value.to(weight.device)
    made = type(weight).of(value)
    made.error = relative_error(made, value)
    made.first = value.flatten()[:FIRST].to("cpu", torch.bfloat16, copy=True)
    weight.copy_(made)


def check_finite(t: Tensor, what: str) -> None:
    """ModelError for a tensor with NaN or infinity in it."""
    # one pass that stops nothing; only where the sum is not finite the values are looked at, which may just be large
    if not t.sum().isfinite() and not t.isfinite().all():
        raise ModelError(
            f"{what} holds values that are not finite (NaN or infinity)", "Download or make the file again."
        )


def find_device(name: str | torch.device | None) -> torch.device:
    """The device of that name, None for the GPU if there is one; UsageError if it is not available."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UsageError(
            f"device {str(name)[:40]!r} cannot be used: {reason}", "Give cpu, or cuda on a machine with a GPU."
        ) from None
    return device


def check_shapes(model: Decoder, stored: Stored) -> None:
    """Raise ModelError with every tensor that is missing, too much, of another shape, or not of numbers."""
    tensors, wanted = stored.tensors, {name: (p.dtype, tuple(p.shape)) for name, p in model.named_parameters()}
    wanted = {name: shape for name, (_, shape) in in_files(stored.places, wanted).items()}
    found = {n: about for n, about in stored.logical(wanted).items() if not _after_the_last(n, model.config)}
    _check_kind(model.config.family, tensors.folder, found, stored)
    problems = []
    head, embedding = f"{model.names.head}.weight", f"{model.names.embedding}.weight"
    if model.config.tied and {head, embedding} <= found.keys():
        with tensors.reading(head) as one, tensors.reading(embedding) as other:
            if one.dtype != other.dtype or not torch.equal(one, other):
                problems.append(f"{head} differs from the embedding, though config.json ties them")
    if model.config.tied:
        found.pop(head, None)
    found = {name: entry for name, entry in found.items() if not CARRIED.fullmatch(name)}
    missing = sorted(wanted.keys() - found.keys())
    unexpected = sorted(found.keys() - wanted.keys())
    if missing:
        problems.append(f"missing: {fold(missing)}")
    if unexpected:
        problems.append(f"unexpected: {fold(unexpected)}")
    both = sorted(wanted.keys() & found.keys())
    problems += [
        f"{n} is {list(found[n][1])}, config.json makes it {list(wanted[n])}" for n in both if found[n][1] != wanted[n]
    ]
    problems += [f"{n} is {found[n][0]}" for n in both if found[n][0] not in DTYPES.values()]
    if problems:
        raise ModelError(
            f"{tensors.folder} does not fit its config.json:\n  " + "\n  ".join(problems),
            "Check that config.json and the weights are of one model.",
        )


def _after_the_last(name: str, c: Config) -> bool:
    """Whether a tensor is of GLM's layer for predicting several tokens at once, which follows the layers of the model."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return layer is not None and c.family.startswith("glm4_moe") and int(layer[1]) >= c.layers


def _check_kind(family: str, folder: Path, names: Iterable[str], stored: Stored) -> None:
    """ModelError for weights of another family or format than config.json says, and for P-tuning prefixes."""
    names = set(names)
    scale = next((name for name in sorted(names) if QUANTIZED.fullmatch(name)), None)
    if scale is not None:
        raise ModelError(
            f"{folder}: the weights are quantised ({scale}), and not as config.json says",
            "Use the bf16 or fp16 release of this model.",
        )
    if stored.form and not stored.parts:
        raise ModelError(
            f"{folder}: config.json says that the weights are quantised ({stored.form}), and none is",
            "Take config.json and the weights from one model.",
        )
    if any(".prefix_encoder." in name for name in names):
        raise ModelError(
            f"{folder}: the weights hold a P-tuning prefix (prefix_encoder), which is not supported",
            "Use the model without the prefix.",
        )
    first = {re.sub(r"\blayers\.\d+\.", "layers.0.", name) for name in names}
    told = next((family for family, needed in SIGNATURES.items() if first.issuperset(needed.split())), family)
    if told != family:
        raise ModelError(
            f"{folder}: config.json says {family}, the weights are of {told}",
            "Take config.json and the weights from one model.",
        )


def fingerprint(parameters: Mapping[str, Weight]) -> str:
    """A short name for a base model: a hash over the names, shapes and first values (as bf16) of its tensors."""
    digest = hashlib.sha256()
    for name, p in sorted(parameters.items()):
        digest.update(f"{name} {list(p.shape)}".encode())
        if isinstance(p, QuantizedWeight):
            first = p.first_values(FIRST)
        else:
            first = p.first if isinstance(p, GatheredWeight) else p.detach()[:FIRST].flatten()[:FIRST]
        digest.update(first.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
