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
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.kernels import library_gemm, lora_gemm, lora_shrink, wide_products
from minilora.kernels.augmented import Augmented
from minilora.kernels.dequantize import in_the_loop, readable
from minilora.kernels.dispatch import once_differentiable, recording, use_triton
from minilora.kernels.dropout import DEFAULT_KEY, DropoutKey, dropout, dropout_mask
from minilora.kernels.frozen_linear import FEW_ROWS, frozen_linear
from minilora.kernels.group import Forms, Group
from minilora.kernels.lang import INTERPRETED, rows_of
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


class _OnTriton(torch.autograd.Function):
    """trained is [a_0, b_0, a_1, ...], the tensors of the projections' adapters, named to autograd."""

    @staticmethod
    def forward(
        ctx, projections: Sequence[Projection], output_needed: bool, x: Tensor, *trained: Tensor
    ) -> tuple[Tensor, ...]:
        group, rows = Group.of(projections), rows_of(x)
        with torch.cuda.device_of(x):
            if not output_needed:
                s, ys = lora_shrink.shrink(rows, group), _uninitialised(x, projections)
            elif not group.a:
                s, ys = x, lora_gemm.forward(rows, rows, group)
            elif wide_products.in_one_pass(rows, group):
                y, s = lora_gemm.single_pass(rows, group)
                ys = [y]
            else:
                s = lora_shrink.shrink(rows, group)
                ys = wide_products.forward(rows, s, group)
        ctx.save_for_backward(x, s, *trained)
        ctx.group = group
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        x, s, *trained = ctx.saved_tensors
        return None, None, *_triton_gradients(x, s, ctx.group, trained, grads, ctx.needs_input_grad[2:])


def _triton_gradients(
    x: Tensor, s: Tensor, group: Group, trained: Sequence[Tensor], dys: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """dX and dA_0, dB_0, dA_1, ..., each where it is needed."""
    dys, rows = [rows_of(dy) for dy in dys], rows_of(x)
    needs_x, needs_a, needs_b = needs[0], needs[1::2], needs[2::2]
    dx, das = None, [None] * len(group.a)
    with torch.cuda.device_of(x):
        adapted = [dy for dy, size in zip(dys, group.sizes, strict=True) if size.rank]
        ds, dbs = lora_shrink.expand_backward(adapted, s, group, needs_x or any(needs_a), any(needs_b))
        if needs_x and ds is not None:
            dx = wide_products.input_gradient(dys, ds, group)
        if any(needs_a) and ds is not None:
            das = lora_shrink.shrink_backward(rows, ds, group)
    found = [d for pair in zip(das, dbs, strict=True) for d in pair]
    return dx, *[
        d.to(t.dtype) if needed and d is not None else None
        for d, t, needed in zip(found, trained, needs[1:], strict=True)
    ]


class _OnTorch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, projections: Sequence[Projection], output_needed: bool, x: Tensor, *trained: Tensor
    ) -> tuple[Tensor, ...]:
        shrunk = _shrink(x, [p.adapter for p in projections if p.adapter])
        ctx.save_for_backward(x, *shrunk, *trained)
        ctx.projections, (form, ctx.form) = projections, Forms.of(projections)
        if not output_needed:
            return tuple(_uninitialised(x, projections))
        whole = Augmented.of(projections, x) if form == "augmented" else None
        if whole is not None:
            return tuple(whole.forward(x, shrunk, projections))
        ys: list[Tensor] = []
        for weight, bias, ns in library_gemm.base_products(projections, x.dtype):  # x W^T + b
            plain = weight.dtype == x.dtype and x.shape[0] > FEW_ROWS
            y = F.linear(x, cast(Tensor, weight), bias) if plain else frozen_linear(x, weight, bias)
            ys += y.split_with_sizes(ns, 1)
        library_gemm.add_expanded(ys, shrunk, projections)  # + S (f B)^T
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        x, *saved = ctx.saved_tensors
        shrunk = saved[: len(saved) // 3]
        return None, None, *_torch_gradients(x, shrunk, ctx.projections, grads, ctx.needs_input_grad[2:], ctx.form)


def _torch_gradients(
    x: Tensor,
    shrunk: Sequence[Tensor],
    projections: Sequence[Projection],
    dys: Sequence[Tensor],
    needs: Sequence[bool],
    form: str,
) -> tuple[Tensor | None, ...]:
    """dX and dA_0, dB_0, dA_1, ..., each where it is needed."""
    needs_x, needs_a, needs_b = needs[0], needs[1::2], needs[2::2]
    masked = any(p.adapter.p for p in projections if p.adapter)
    dx = wide_products.on_torch(form, dys, None, projections) if needs_x and masked else None
    all_ds, found = [], []
    adapted = [(dy, p.adapter) for dy, p in zip(dys, projections, strict=True) if p.adapter]
    for number, (dy, adapter) in enumerate(adapted):
        a, b, _, rate, key = adapter
        da = db = None
        if needs_b[number]:
            db = (dy.T @ shrunk[number]).to(b.dtype).mul_(adapter.factor)  # dB = f dY^T S
        if needs_x or needs_a[number]:
            all_ds.append(ds := dy @ library_gemm.scaled(b, adapter.factor, dy.dtype))  # dS = f dY B
            mask = dropout_mask((x.shape[0], x.shape[1]), rate, key, x.device) if rate else None
            if needs_a[number]:
                da = (ds.T @ _masked(x, mask)).to(a.dtype)  # dA = dS^T mask(x)
            if dx is not None:
                dx += _masked(ds @ a.to(ds.dtype), mask)  # dX += mask(dS A)
        found += [da, db]
    if needs_x and not masked:
        dx = wide_products.on_torch(form, dys, all_ds, projections)
    return dx, *found


def _uninitialised(x: Tensor, projections: Sequence[Projection]) -> list[Tensor]:
    """Uninitialised memory in the shape of the outputs."""
    return [x.new_empty(x.shape[0], p.weight.shape[0]) for p in projections]


def _shrink(x: Tensor, adapters: Sequence[Adapter]) -> list[Tensor]:
    """S_j = mask_j(x) A_j^T of every adapter; one product for all where nothing is dropped."""
    if len(adapters) > 1 and not any(a.p for a in adapters):
        ranks = [a.a.shape[0] for a in adapters]
        return list((x @ torch.cat([a.a.to(x.dtype) for a in adapters]).T).split(ranks, dim=1))
    masks = [dropout_mask((x.shape[0], x.shape[1]), a.p, a.key, x.device) if a.p else None for a in adapters]
    return [_masked(x, mask) @ a.a.to(x.dtype).T for mask, a in zip(masks, adapters, strict=True)]


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
    on = _OnTriton if runs_on_triton(x, projections) else _OnTorch
    return recording(on)(projections, output_needed, x, *trained)


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
