"""`minilora export --for gguf`: a model, or an adapter beside it, for llama.cpp and Ollama.

A model's file has its weights under llama.cpp's names, its sizes, its tokenizer and its chat template. An adapter's has A and B of
each linear, fp32, and one alpha: llama.cpp scales by alpha / R, so B takes up what the scale of a linear is besides.
"""

import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minilora.kernels.quantized import QuantizedWeight, weight_as
from minilora.models.config import Config, Yarn
from minilora.models.decoder import Decoder

from ..errors import ModelError
from ..files.atomic import new_folder, require_empty
from ..files.gguf import KINDS, Value, write_gguf
from ..files.model_folder import Folder, ModelFolder
from ..files.safetensors import NAMES as DTYPE_NAMES
from ..lora import LoRALinear, adapters
from ..methods.table import PEFT_TYPES
from ..text.tokenizer import check_fits, load_tokenizer
from .adapter import load_adapter, needed_quant
from .gguf_tokenizer import tokenizer_metadata
from .load import check_finite, described_model, empty_model, read_config
from .modelfile import modelfile

ARCHITECTURES = {"qwen2": "qwen2", "qwen3": "qwen3", "glm": "chatglm", "glm4": "glm4"}  # llama.cpp's, by family
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
# in a layer; llama.cpp finds gate and up of GLM in one matrix, as GLM has them
INSIDE = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "self_attn.o_proj": "attn_output",
    "post_self_attn_layernorm": "post_attention_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "post_mlp_layernorm": "post_ffw_norm",
}  # fmt: skip
FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2}
MERGE = "Merge it, and export the merged folder: minilora merge."
GGUF_MODEL, GGUF_ADAPTER, MODELFILE = "model.gguf", "adapter.gguf", "Modelfile"


class Written(NamedTuple):
    """How many tensors of each kind a file has, and its bytes."""

    kinds: Counter[str]
    size: int


def export_model(folder: Folder, output: str | Path, kind: str | None = None) -> Written:
    """Write the model of a folder as output/model.gguf, with a Modelfile; one tensor is in memory at a time.

    kind is that of the weights (files/gguf.py), None the dtype in which the folder has them. Norms and biases are fp32; rows that
    are not whole blocks are fp16; beside q4_0, the head is q8_0. Raises ModelError for what llama.cpp does not compute.
    """
    folder = ModelFolder.of(folder)
    require_empty(Path(output))
    architecture = _architecture(folder)
    model, stored = described_model(folder, None, "off")
    c, tokenizer = model.config, load_tokenizer(folder)
    check_fits(tokenizer, c.vocab, folder)
    kind = kind or DTYPE_NAMES[c.dtype].lower()
    head = f"{model.names.embedding if c.tied else model.names.head}.weight"
    names = {gguf_name(name): name for name in dict(model.named_parameters())}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    tensors = {ours: (_kind(kind, shapes[name], name == head), shapes[name]) for ours, name in names.items()}

    def tensor(name: str) -> Tensor:
        with stored.reading(names[name], torch.Size(tensors[name][1])) as found:
            value = weight_as(found, torch.float32) if isinstance(found, QuantizedWeight) else found.clone()
        check_finite(value, f"{folder}: {names[name]}")
        if tensors[name][0] == "f16" and value.abs().max() > torch.finfo(torch.float16).max:
            raise ModelError(f"{folder}: {names[name]} has values that fp16 cannot hold", "Give --type bf16.")
        return value

    metadata = _metadata(architecture, folder.path.resolve().name, c, kind)
    metadata |= tokenizer_metadata(folder, tokenizer, c.vocab)
    with new_folder(Path(output)) as stage:
        write_gguf(stage / GGUF_MODEL, metadata, tensors, tensor)
        (stage / MODELFILE).write_text(modelfile(f"./{GGUF_MODEL}", tokenizer, folder))
        size = (stage / GGUF_MODEL).stat().st_size
    return Written(Counter(kind for kind, _ in tensors.values()), size)


def export_lora(folder: Folder, adapter: Folder, output: str | Path, base: str | None = None) -> Written:
    """Write an adapter of the model in this folder as output/adapter.gguf, with a Modelfile; no weight of the model is read.

    base is what the Modelfile puts it on: a GGUF file of the model, a name of Ollama's, or None for a model.gguf beside it. Raises
    ModelError for what is no LoRA.
    """
    folder, adapter = ModelFolder.of(folder), ModelFolder.of(adapter)
    require_empty(Path(output))
    architecture, tokenizer = _architecture(folder), load_tokenizer(folder, adapter)
    wrapped = _linears_of(adapter, empty_model(read_config(folder)))
    if "tokenizer.json" in tokenizer.replaced:
        raise ModelError(f"{adapter} has a tokenizer of its own, and a GGUF adapter has none", MERGE)
    first = next(iter(wrapped.values()))
    alpha = first.scale * len(first.factors()[0])
    tensors: dict[str, Tensor] = {}
    for path, wrapper in wrapped.items():
        a, b = (t.detach().float() for t in wrapper.factors())
        name = gguf_name(f"{path}.weight")
        tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": b * (wrapper.scale * len(a) / alpha)}
    metadata: dict[str, Value] = {
        "general.architecture": architecture,
        "general.type": "adapter",
        "general.name": adapter.path.resolve().name,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    base = base or f"./{GGUF_MODEL}"
    base = os.path.relpath(base, output) if Path(base).is_file() else base
    with new_folder(Path(output)) as stage:
        shapes = {name: ("f32", tuple(t.shape)) for name, t in tensors.items()}
        write_gguf(stage / GGUF_ADAPTER, metadata, shapes, tensors.__getitem__)
        (stage / MODELFILE).write_text(modelfile(base, tokenizer, folder, f"./{GGUF_ADAPTER}"))
        size = (stage / GGUF_ADAPTER).stat().st_size
    return Written(Counter({"f32": len(tensors)}), size)


def gguf_name(name: str) -> str:
    """llama.cpp's name of a parameter."""
    module, _, leaf = name.rpartition(".")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    return f"blk.{layer[1]}.{INSIDE[layer[2]]}.{leaf}" if layer else f"{OUTSIDE[module]}.{leaf}"


def _architecture(folder: ModelFolder) -> str:
    """llama.cpp's name of the family; ModelError for a model that llama.cpp would compute otherwise, or not at all."""
    c = read_config(folder)
    refused = None
    if c.family not in ARCHITECTURES:
        refused = f"{c.family} is not written as GGUF; {', '.join(ARCHITECTURES)} are"
    elif any(c.window(i) for i in range(c.layers)):
        refused = f"llama.cpp has no sliding window for {c.family}"
    elif c.family in ("qwen2", "glm") and c.heads * c.head_size != c.width:
        refused = f"llama.cpp takes {c.family} with heads that make up the width, and here {c.heads} x {c.head_size} are not {c.width}"
    elif c.yarn is not None and c.yarn != _usual(c.yarn):
        refused = "llama.cpp computes YaRN with the usual beta_fast, beta_slow and attention_factor, and config.json has others"
    if refused:
        raise ModelError(f"{folder}: {refused}", "Serve it with minilora serve, or with vLLM: export --for vllm.")
    return ARCHITECTURES[c.family]


def _usual(yarn: Yarn) -> Yarn:
    """YaRN of the same lengths, as llama.cpp computes it."""
    return Yarn(yarn.factor, yarn.original_length, 32, 1, max(1.0, 0.1 * math.log(yarn.factor) + 1), True)


def _metadata(architecture: str, name: str, c: Config, kind: str) -> dict[str, Value]:
    sizes: dict[str, Value] = {
        "context_length": c.max_positions,
        "embedding_length": c.width,
        "block_count": c.layers,
        "feed_forward_length": c.ffn,
        "vocab_size": c.vocab,
        "attention.head_count": c.heads,
        "attention.head_count_kv": c.kv_heads,
        "attention.key_length": c.head_size,
        "attention.value_length": c.head_size,
        "attention.layer_norm_rms_epsilon": c.eps,
        "rope.dimension_count": c.rotary,
        "rope.freq_base": c.rope_theta,
    }
    if c.yarn:
        sizes["rope.scaling.type"] = "yarn"
        sizes["rope.scaling.factor"] = c.yarn.factor
        sizes["rope.scaling.original_context_length"] = c.yarn.original_length
    general: dict[str, Value] = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": name,
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": 2,
    }
    return general | {f"{architecture}.{key}": value for key, value in sizes.items()}


def _kind(wanted: str, shape: tuple[int, ...], head: bool) -> str:
    """The kind of a tensor of that shape in a file of the wanted kind."""
    if len(shape) == 1:
        return "f32"
    if shape[-1] % KINDS[wanted].block:
        return "f16"
    return "q8_0" if head and wanted == "q4_0" else wanted


def _linears_of(adapter: ModelFolder, meta: Decoder) -> dict[str, LoRALinear]:
    """The adapters of a folder, by their linears' paths; ModelError for what is more than B A on a plain linear."""
    if adapter.adapter_config.get("peft_type") in PEFT_TYPES or adapter.adapter_config.get("use_dora"):
        raise ModelError(f"{adapter} is no plain LoRA, and llama.cpp has no other adapters", MERGE)
    quant = needed_quant(adapter.path)
    if quant:
        raise ModelError(
            f"{adapter} began as the error of a base in {quant} (LoftQ), which llama.cpp does not have", MERGE
        )
    load_adapter(meta, adapter, any_base=True)
    found = dict(adapters(meta))
    if not all(w.scale for w in found.values()):
        raise ModelError(f"{adapter} has linears whose lora_alpha is 0, which llama.cpp takes for 1", MERGE)
    return found
