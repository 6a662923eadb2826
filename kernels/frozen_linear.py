"""Products with a frozen weight that may be stored in another dtype than the one they are computed in.

    y = x W^T + b        dX = dY W        x [T, K], dY [T, N] in the compute dtype; W [N, K], b [N] as stored

A 16-bit checkpoint on a CPU without 16-bit arithmetic is computed in fp32, and a quantised W (quantized.py) in the
dtype of x. W is widened for one product at a time, so that there are never two copies of the model. With a few rows,
reading W takes longer than arithmetic: in inference x is rounded to bf16 where W is bf16, which has the range of fp32
(in fp16 x could overflow).
"""

from collections.abc import Iterator
from typing import TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.kernels.quantized import QuantizedWeight, Weight, weight_as

FEW_ROWS = 4  # rows up to which, in inference, reading W as stored is faster than widening it
WHOLE = 2**24  # elements of the largest weight that is widened in one piece: 64 MiB in fp32
BLOCK_ROWS = 2048  # rows of a piece of a larger weight, such as the head


def frozen_linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x W^T + b [T, N] in the dtype of x, without a gradient; W, b in any floating dtype, or W quantised."""
    if x.shape[0] <= FEW_ROWS and weight.dtype == torch.bfloat16 and torch.is_inference_mode_enabled():
        bias = None if bias is None else bias.to(weight.dtype)  # a caller may have widened it
        return _few_rows(x.to(weight.dtype), cast(Tensor, weight), bias).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if isinstance(weight, QuantizedWeight) and (y := weight.product(x, bias)) is not None:
        return y
    if weight.dtype == x.dtype:
        return F.linear(x, cast(Tensor, weight), bias)
    if _in_one(weight):
        return F.linear(x, _widened(weight, x.dtype, slice(None)), bias)
    y = x.new_empty(x.shape[0], weight.shape[0])
    for rows, piece in pieces(weight, x.dtype):
        torch.mm(x, piece.T, out=y[:, rows])
    return y if bias is None else y.add_(bias)


def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.shape[0] > 1 or x.is_cuda:
        return F.linear(x, weight, bias)
    # oneDNN packs the weight at every call and takes twice as long (Zen 4, [9728, 896]); ATen reads it once
    onednn = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        return F.linear(x, weight, bias)
    finally:
        torch.backends.mkldnn.enabled = onednn


def add_input_gradient(dx: Tensor | None, dy: Tensor, weight: Weight) -> Tensor:
    """dx + dY W [T, K], in place; without a dx, dY W alone."""
    if isinstance(weight, QuantizedWeight) and (own := weight.input_gradient(dy)) is not None:
        return own if dx is None else dx.add_(own)
    for rows, piece in pieces(weight, dy.dtype):
        part = dy[:, rows]
        dx = part @ piece if dx is None else dx.addmm_(part, piece)
    assert dx is not None, weight.shape
    return dx


def pieces(weight: Weight, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a weight [N, K] in a dtype: all at once, or in pieces, so that the copy stays small."""
    height = weight.shape[0] if weight.dtype == dtype or _in_one(weight) else BLOCK_ROWS
    for start in range(0, weight.shape[0], height):
        rows = slice(start, start + height)
        yield rows, _widened(weight, dtype, rows)


def _in_one(weight: Weight) -> bool:
    """Whether W is widened as a whole: one that is small, or a quantised one on a GPU."""
    return weight.numel() <= WHOLE or _on_gpu(weight)


def _on_gpu(weight: Weight) -> TypeGuard[QuantizedWeight]:
    return isinstance(weight, QuantizedWeight) and weight.device.type == "cuda"


def _widened(weight: Weight, dtype: torch.dtype, rows: slice) -> Tensor:
    """W for one product. On a GPU quantised ones are all written to the same memory, one after the other in its stream."""
    if not _on_gpu(weight):
        return weight_as(weight, dtype, rows)
    key, count = (weight.device, dtype), weight.numel()
    if key not in _memory or _memory[key].numel() < count:
        _memory[key] = torch.empty(count, dtype=dtype, device=weight.device)
    out = _memory[key][:count].view(weight.shape)[rows]
    weight.write(out, rows.start or 0)
    return out


_memory: dict[tuple[torch.device, torch.dtype], Tensor] = {}  # that _widened writes to, as large as the largest weight
