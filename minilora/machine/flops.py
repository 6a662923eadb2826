"""How many floating-point operations a training step needs, and how many the machine can do: the two sides of MFU.

With frozen weights a token costs 2N forward and 2N backward (dX; there is no dW), so 4N and not the 6N of full training.
Adapters cost 6 per parameter. The head is paid for by the tokens that have a target. Attention costs 4 H E n^2 / 2 forward
for a causal document of n tokens and twice that backward. A gated delta rule reads, corrects and reads its state: 6 E U forward for
a head and token, and its convolution 2 for a tap and channel. Recomputation under activation checkpointing is not counted.
"""

import time
from collections import Counter
from functools import lru_cache

import torch
from torch import nn

from minilora.models.config import Config
from minilora.models.decoder import Decoder
from minilora.models.moe import ExpertLinear, MoEConfig
from minilora.models.qwen3_5 import HybridConfig
from minilora.models.stream import Batch, Documents

from ..lora import adapters, linears
from ..methods.freeze import Trained

# dense bf16 peak of the cards that the benchmarks name, in FLOP/s (vendor data sheets)
PEAKS = {"H100 PCIe": 756e12, "A100": 312e12, "A800": 312e12, "H100": 989e12, "H800": 989e12, "H200": 989e12}


def flops_per_token(model: Decoder, full: bool) -> tuple[float, float]:
    """(of every token, of every token with a target beside that) in the linears of a step, forward and backward.

    Of a mixture, the experts that a token has.
    """
    c = model.config
    active = c.chosen / c.experts if isinstance(c, MoEConfig) else 1.0

    def share(linear: nn.Module) -> float:
        return active if isinstance(linear, ExpertLinear) else 1.0

    # below a block that is trained whole no gradient flows; what it was copied from, and what makes a prefix, no token passes
    frozen = 2 if any(isinstance(block, Trained) for block in model.blocks) else 4
    passed = {path: m for path, m in linears(model).items() if ".base." not in path and not path.startswith("virtual.")}
    wide = sum((6 if m.weight.requires_grad else frozen) * share(m) * m.weight.numel() for m in passed.values())
    narrow = sum(share(w.base) * (w.lora_A.numel() + w.lora_B.numel()) for _, w in adapters(model))
    return wide + 6 * narrow, (6 if full else 4) * model.head.numel()


def attention_flops(c: Config, documents: Documents) -> float:
    """Forward and backward of attention over the documents of a stream, all layers; causal but for the prefixes."""
    prefix_lens = documents.prefix_lens or [0] * len(documents.lengths)
    return sum(_document_flops(c, n, prefix) for n, prefix in zip(documents.lengths, prefix_lens, strict=True))


@lru_cache(4096)
def _document_flops(c: Config, n: int, prefix: int) -> float:
    """The same for one document of n tokens."""
    total, ahead = 0.0, prefix * (prefix - 1) / 2
    linear = c.linear if isinstance(c, HybridConfig) else (False,) * c.layers
    if isinstance(c, HybridConfig):
        channels = 2 * c.key_heads * c.key_size + c.value_heads * c.value_size
        total += sum(linear) * 3 * n * (6 * c.value_heads * c.key_size * c.value_size + 2 * c.taps * channels)
    for window, layers in Counter(c.window(i) for i in range(c.layers) if not linear[i]).items():
        w = n if window is None else min(window, n)
        total += layers * 3 * 4 * c.heads * c.head_size * (w * n - w * (w - 1) / 2 + ahead)
    return total


def step_flops(c: Config, batches: list[Batch], per_token: tuple[float, float]) -> float:
    """Operations that a model needs for the batches of one optimizer step; per_token from `flops_per_token`."""
    each, head = per_token
    tokens, trained = sum(len(b.ids) for b in batches), sum(len(b.targets) for b in batches)
    return each * tokens + head * trained + sum(attention_flops(c, b.documents) for b in batches)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the card by its data sheet (bf16); for anything else the best of a few measured matrix products.

    On a CPU the best in any dtype that a run with this one may use: 16-bit products can be slower than fp32's there.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for gpu, peak in PEAKS.items():
            if gpu in name:
                return peak
    dtypes = {dtype, torch.float32} if device.type == "cpu" and dtype != torch.float64 else {dtype}
    return max(measured_flops(device, each) for each in dtypes)


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The best of a few large matrix products."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = spent = float("inf")
    for _ in range(8):
        if spent > 0.1 and best < float("inf"):
            break  # a slow one does not get faster
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent = time.perf_counter() - start
        best = min(best, spent)
    return 2 * n**3 / best
