"""Linear layers with low-rank adapters on frozen weights (LoRA: Hu et al., 2021), one to three of the same input.

    y_j = x W_j^T + b_j + s_j (drop_j(x) A_j^T) B_j^T       x [T, K], W_j [N_j, K], A_j [R_j, K], B_j [N_j, R_j]

The same input: q, k and v, or gate and up. x is read in its own dtype and never copied to fp32: A and B, which are
stored in fp32, are cast instead. W_j and b_j are frozen and get no gradient. Saved for the backward: x and
S_j = drop_j(x) A_j^T [T, R_j]; dropout masks are drawn again. With dS_j = s_j dY_j B_j:

    dX = sum over j of dY_j W_j + drop_j(dS_j A_j)      dA_j = dS_j^T drop_j(x)      dB_j = s_j dY_j^T S_j

Widths and ranks may differ, and a projection may have no adapter or no bias. As in PEFT each has its own dropout mask.

The narrow products are made by lora_shrink: all S_j from one read of x, dS and dB from one read of each dY_j, all dA_j
from one read of x. The wide ones, y and dX, have three forms, a Triton GEMM and two that use the library's, and the one
that is fastest for these shapes is taken (wide_products.py). Without a GPU, and for widths that are not a multiple of
16, all are torch's.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.kernels import kept, library_gemm, wide_products
from minilora.kernels.augmented import Augmented
from minilora.kernels.dequantize import in_the_loop, readable
from minilora.kernels.dispatch import once_differentiable, recording, use_triton
from minilora.kernels.dropout import DEFAULT_KEY, DropoutKey, dropout, dropout_mask
from minilora.kernels.frozen_linear import FEW_ROWS, frozen_linear
from minilora.kernels.group import Forms
from minilora.kernels.lang import INTERPRETED
from minilora.kernels.on_triton import OnTriton, uninitialised
from minilora.kernels.projection import Adapter, Projection, check
from minilora.kernels.quantized import Weight, format_of, weight_as


def lora_linear_group_ref(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """The specification, term by term."""
    return tuple(_one_ref(x, *p) for p in projections)


def _one_ref(x: Tensor, weight: Weight, bias: Tensor | None, adapter: Adapter | None) -> Tensor:
    y = F.linear(x, weight_as(weight, x.dtype), None if bias is None else bias.to(x.dtype))
    if adapter is None:
        return y
    a, b, scale, p, key = adapter
    return y + scale * (dropout(x, p, key) @ a.to(x.dtype).T @ b.to(x.dtype).T)


def lora_linear_ref(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    p: float = 0.0,
    key: DropoutKey = DEFAULT_KEY,
) -> Tensor:
    """The specification of one linear layer with its adapter."""
    return _one_ref(x, w, bias, Adapter(a, b, scale, p, key))


class OnTorch:
    """Projections of one input on torch's operations, as on_triton.py has them: S [T, sum of R_j], dS and masks lists."""

    def __init__(self, projections: Sequence[Projection]):
        self.projections, self.adapters = projections, [p.adapter for p in projections if p.adapter]
        self.adapted, self.forms = bool(self.adapters), Forms.of(projections)

    def forward(self, x: Tensor, s: Tensor | None, output_needed: bool) -> tuple[Tensor | None, list[Tensor]]:
        s = _shrink(x, self.adapters) if s is None and self.adapted else s
        if not output_needed:
            return s, uninitialised(x, [p.weight for p in self.projections])
        shrunk, ys = self._apart(s), []
        whole = Augmented.of(self.projections, x) if self.forms.y == "augmented" else None
        if whole is not None:
            return s, whole.forward(x, shrunk, self.projections)
        for weight, bias, ns in library_gemm.base_products(self.projections, x.dtype):  # x W^T + b
            plain = weight.dtype == x.dtype and x.shape[0] > FEW_ROWS
            y = F.linear(x, cast(Tensor, weight), bias) if plain else frozen_linear(x, weight, bias)
            ys += y.split_with_sizes(ns, 1)
        library_gemm.add_expanded(ys, shrunk, self.projections)  # + S (f B)^T
        return s, ys

    def _apart(self, s: Tensor | None) -> Sequence[Tensor]:
        return () if s is None else s.split_with_sizes([adapter.a.shape[0] for adapter in self.adapters], 1)

    def expand_backward(
        self, dys: Sequence[Tensor], s: Any, needs_ds: bool, needs_b: Sequence[bool]
    ) -> tuple[Any, Sequence[Tensor | None]]:
        dys = [dy for dy, p in zip(dys, self.projections, strict=True) if p.adapter]
        each = zip(dys, self.adapters, strict=True)
        ds = [dy @ library_gemm.scaled(a.b, a.factor, dy.dtype) for dy, a in each] if needs_ds else []  # dS = f dY B
        every = zip(dys, self._apart(s), self.adapters, needs_b, strict=True)  # dB = f dY^T S
        return ds, [(dy.T @ s).to(a.b.dtype).mul_(a.factor) if needed else None for dy, s, a, needed in every]

    def masks(self, x: Tensor) -> Any:
        return [_mask(x, adapter) for adapter in self.adapters]

    def input_gradient(self, dys: Sequence[Tensor], ds: Any, masks: Any) -> Tensor:
        masked = any(adapter.p for adapter in self.adapters)
        dx = wide_products.on_torch(self.forms.dx, dys, None if masked else ds, self.projections)
        for d, mask, adapter in zip(ds, masks, self.adapters, strict=True) if masked else ():
            dx += _masked(d @ adapter.a.to(d.dtype), mask)  # dX += mask(dS A)
        return dx

    def shrink_backward(self, x: Tensor, ds: Any, masks: Any, needs_a: Sequence[bool]) -> Sequence[Tensor | None]:
        each = zip(ds, masks, needs_a, strict=True)
        return [d.T @ _masked(x, mask) if needed else None for d, mask, needed in each]  # dA = dS^T mask(x)


Linears = OnTriton | OnTorch


def linears_of(x: Tensor, projections: Sequence[Projection]) -> Linears:
    """Projections of x by the path that they take."""
    return (OnTriton if runs_on_triton(x, projections) else OnTorch)(projections)


class _Group(torch.autograd.Function):
    """trained is [a_0, b_0, a_1, ...], the tensors of the projections' adapters, named to autograd."""

    @staticmethod
    def forward(ctx, linears: Linears, output_needed: bool, x: Tensor, *trained: Tensor) -> tuple[Tensor, ...]:
        with torch.cuda.device_of(x):
            s, ys = linears.forward(x, kept.given() if linears.adapted else None, output_needed)
        ctx.save_for_backward(x, kept.keep(s), *trained)
        ctx.linears = linears
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        x, s, *trained = ctx.saved_tensors
        with torch.cuda.device_of(x):
            return None, None, *gradients(ctx.linears, x, s, trained, grads, ctx.needs_input_grad[2:])


class _OnTriton(_Group):
    """Its name tells in a graph which path was taken."""


class _OnTorch(_Group):
    """The other one."""


def gradients(
    linears: Linears,
    x: Tensor,
    s: Tensor | None,
    trained: Sequence[Tensor],
    dys: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """dX and dA_0, dB_0, dA_1, ..., each where it is needed, in the dtypes of `trained`."""
    needs_x, needs_a, needs_b = needs[0], needs[1::2], needs[2::2]
    dx, das = None, [None] * len(needs_a)
    ds, dbs = linears.expand_backward(dys, s, needs_x or any(needs_a), needs_b)
    if needs_x or any(needs_a):
        masks = linears.masks(x)
        dx = linears.input_gradient(dys, ds, masks) if needs_x else None
        das = linears.shrink_backward(x, ds, masks, needs_a) if any(needs_a) else das
    return dx, *in_order(das, dbs, trained, needs[1:])


def in_order(
    das: Sequence[Tensor | None], dbs: Sequence[Tensor | None], trained: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    """dA_0, dB_0, dA_1, ..., each where it is needed, in the dtypes of `trained`."""
    found = [d for pair in zip(das, dbs, strict=True) for d in pair]
    each = zip(found, trained, needs, strict=True)
    return [d.to(t.dtype) if needed and d is not None else None for d, t, needed in each]


def _shrink(x: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """S of every adapter, side by side; one product for all where nothing is dropped."""
    if not any(a.p for a in adapters):
        return x @ torch.cat([a.a.to(x.dtype) for a in adapters]).T
    return torch.cat([_masked(x, _mask(x, a)) @ a.a.to(x.dtype).T for a in adapters], dim=1)


def _mask(x: Tensor, adapter: Adapter) -> Tensor | None:
    return dropout_mask((x.shape[0], x.shape[1]), adapter.p, adapter.key, x.device) if adapter.p else None


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x where a mask keeps it, unscaled: the adapter's factor has the 1 / (1 - p)."""
    return x if mask is None else x * mask


def lora_linear_group(x: Tensor, projections: Sequence[Projection], output_needed: bool = True) -> tuple[Tensor, ...]:
    """y_j [T, N_j] of every projection of x [T, K], in the dtype of x; ValueError if they do not fit together.

    Outputs may be column ranges of one matrix. output_needed=False: only the gradients are wanted, of a layer that is
    computed again and whose output is not read (models/recompute.py); the outputs are uninitialised memory.
    """
    # in decoding, token by token, the linears were checked with the prompt
    if not torch.is_inference_mode_enabled() or x.shape[0] > FEW_ROWS:
        check(x, projections)
    trained = [t for p in projections if p.adapter for t in (p.adapter.a, p.adapter.b)]
    linears = linears_of(x, projections)
    on = _OnTriton if isinstance(linears, OnTriton) else _OnTorch
    return recording(on)(linears, output_needed, x, *trained)


def lora_linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    p: float = 0.0,
    key: DropoutKey = DEFAULT_KEY,
) -> Tensor:
    """F.linear(x, w, bias) + scale * (dropout(x) A^T) B^T for x [T, K]; p is the dropout rate, key its mask's name."""
    (y,) = lora_linear_group(x, [Projection(w, bias, Adapter(a, b, scale, p, key))])
    return y


def runs_on_triton(x: Tensor, projections: Sequence[Projection]) -> bool:
    """fp16 or bf16 on a GPU, K and N multiples of 16 (the alignment of asynchronous copies), at least one adapter.

    Quantised weights in one format; few rows of them, and no gradient, need no adapter.
    """
    weights, rows, k = [p.weight for p in projections], len(x), projections[0].weight.shape[1]
    formats = {format_of(w) for w in weights}
    adapted = any(p.adapter for p in projections) and (readable(k, formats) or all(w.dtype == x.dtype for w in weights))
    there = x.numel() > 0 and (adapted or (in_the_loop(rows, k, formats) and not torch.is_grad_enabled()))
    fits = INTERPRETED or (x.element_size() == 2 and all(size % 16 == 0 for w in weights for size in w.shape))
    return there and fits and use_triton(x)  # check() saw that all are on one device


def group_example(
    tokens: int, k: int, ns: tuple[int, ...], r: int, dtype: torch.dtype, device: str = "cpu", p: float = 0.0
) -> tuple[tuple[Tensor, list[Projection]], dict]:
    """Arguments of one call with N of ns, and the flops and bytes that a perfect forward and backward need."""
    stored = torch.promote_types(dtype, torch.float32)
    x = torch.randn(tokens, k, device=device, dtype=dtype)
    projections = []
    for j, n in enumerate(ns):
        weight = torch.randn(n, k, device=device, dtype=dtype) * k**-0.5
        a, b = torch.randn(r, k, device=device, dtype=stored) * k**-0.5, torch.randn(n, r, device=device, dtype=stored)
        bias = torch.randn(n, device=device, dtype=dtype)
        projections.append(Projection(weight, bias, Adapter(a, b, 2.0, p, DropoutKey(0, 0, 0, j))))
    size, n, count = x.element_size(), sum(ns), len(ns)
    adapters = stored.itemsize * r * (count * k + n)
    shrunk = size * tokens * r * count
    return (x, projections), {
        "flops": 2 * tokens * (k * n + r * (count * k + n)),
        "bytes": size * (tokens * (k + n) + k * n + n) + adapters + shrunk,
        "backward_flops": 2 * tokens * (k * n + 2 * r * (count * k + n)),
        "backward_bytes": size * (tokens * (2 * k + n) + k * n) + 2 * adapters + shrunk,
    }


def example(tokens: int, k: int, n: int, r: int, dtype: torch.dtype, device: str = "cpu") -> tuple[tuple, dict]:
    """The same for lora_linear."""
    (x, [(w, bias, adapter)]), cost = group_example(tokens, k, (n,), r, dtype, device)
    assert adapter is not None
    return (x, w, bias, adapter.a, adapter.b, adapter.scale), cost
