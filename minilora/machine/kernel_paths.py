"""Which path the operations of a model take on a device: this project's Triton kernels, or PyTorch's operations."""

from itertools import groupby

import torch
from torch import nn

from minilora.kernels.attention import attention_path
from minilora.kernels.dequantize import ROWS_IN_THE_LOOP
from minilora.kernels.dispatch import OLDEST, architecture, use_triton
from minilora.kernels.experts_on_triton import runs_on_triton as experts_on_triton
from minilora.kernels.fla import fla_path
from minilora.kernels.lang import HAVE_TRITON
from minilora.kernels.lora_linear import runs_on_triton
from minilora.kernels.quantized import QuantizedWeight
from minilora.kernels.rms_norm import MAX_WIDTH
from minilora.models.decoder import Decoder
from minilora.models.layers import RMSNorm, projection
from minilora.models.moe import Experts
from minilora.models.qwen3_5 import GatedDeltaNet

from ..methods.dora import DoRALinear
from ..methods.freeze import Trained
from ..targets import short
from .gemm import linear_children

QUANTIZED = f"widened by a kernel for PyTorch's product; up to {ROWS_IN_THE_LOOP} rows in the loop of Triton's"


def kernel_paths(model: Decoder, device: torch.device) -> list[str]:
    """Lines for people: what of each layer runs where; layers that agree stand on one line. The model may be without data."""
    probe = torch.empty(1, 1, dtype=model.compute_dtype, device=device)
    heads = probe.new_empty(1, 1, model.config.head_size)
    attends = [f"attention: {attention_path(heads)}"] if heads.is_cuda else []
    delta = next((m for m in model.modules() if isinstance(m, GatedDeltaNet)), None)
    if delta is not None and heads.is_cuda:
        attends.append(f"gated delta rule: {fla_path(probe.new_empty(1, 1, max(delta.key_size, delta.value_size)))}")
    if not use_triton(probe):
        return [f"PyTorch for every layer ({_why_not(probe)})", *attends]
    alike: dict[tuple[tuple[str, ...], tuple[str, ...]], list[int]] = {}
    for number, block in enumerate(model.blocks):
        alike.setdefault(_of_block(block, probe, bool(model.config.rotary)), []).append(number)
    lines = [
        f"{_layers(numbers)}: Triton {', '.join(triton)}; PyTorch {', '.join(library)}"
        for (triton, library), numbers in alike.items()
    ]
    lines += [*attends, "loss: Triton" + ("" if probe.element_size() == 2 else ", its products PyTorch")]
    weights = [getattr(m, "weight", None) for m in model.modules()]
    if formats := sorted({w.name for w in weights if isinstance(w, QuantizedWeight)}):
        experts = any(name.endswith("experts") for triton, _ in alike for name in triton)
        lines.append(f"{', '.join(formats)}: {QUANTIZED}" + ", those of experts always" * experts)
    return lines


def _layers(numbers: list[int]) -> str:
    """layer 3; layers 0 to 7; layers 0 to 2, 4 to 6, ..."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    told = [f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(told[:3])}{', ...' if told[3:] else ''}"


def _why_not(probe: torch.Tensor) -> str:
    """Why nothing runs on Triton where a tensor is."""
    if not probe.is_cuda:
        return "no GPU"
    if not HAVE_TRITON:
        return "triton is not installed"
    found = architecture(probe.device)
    return (
        f"a GPU of sm_{found}: the kernels are for sm_{OLDEST} and later" if found < OLDEST else "the kernels are off"
    )


def _of_block(block: nn.Module, probe: torch.Tensor, rope: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The operations of a block on Triton, and those on PyTorch."""
    found: dict[str, bool] = {}
    block = block.copy if isinstance(block, Trained) else block
    for path, module in block.named_modules():
        linears = linear_children(module)
        packed = getattr(module, "packed_modules", ())
        if not all(projection(linears[n]) for n in packed):
            packed = ()
        groups = [packed] if packed else []
        for names in [*groups, *((n,) for n in linears if n not in packed)]:
            label = path + "." + "/".join(map(short, names))
            alone = linears[names[0]]
            parts = [alone.product()] if isinstance(alone, DoRALinear) else [projection(linears[n]) for n in names]
            found[label] = None not in parts and runs_on_triton(probe, [p for p in parts if p])
        if isinstance(module, RMSNorm):
            found["rms_norm"] = module.weight.numel() <= MAX_WIDTH and found.get("rms_norm", True)
        elif isinstance(module, Experts):
            both = projection(module.gate_up_proj), projection(module.down_proj)
            on = None not in both and experts_on_triton(probe, [p for p in both if p])
            found[path if on else f"{path}, one after the other"] = on
        elif isinstance(module, nn.LayerNorm):
            found["layer_norm"] = False
    gelu = "layer_norm" in found  # ChatGLM-6B, GPT-2
    linear = any(isinstance(m, GatedDeltaNet) for m in block.modules())
    found |= {"rope": True} if rope and not linear else {}
    found["gated delta rule" if linear else "attention"] = False
    found["gelu" if gelu else "swiglu"] = not gelu
    return tuple(n for n, on in found.items() if on), tuple(n for n, on in found.items() if not on)
