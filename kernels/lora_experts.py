"""The experts of a mixture, each a SwiGLU MLP whose linears may have adapters, as one operation over a flat stream.

    y[t] = sum over the k experts e of token t, in the order of their numbers, of w[t, e] * down_e(h)
    h = silu(g) * u        [g u] = gate_up_e(x[t])        linear_e(x) = x W_e^T + s (drop(x) A_e^T) B_e^T

x [T, D], weights w [T, k]. The weights of all experts lie one above the other: W [E N, K] holds W_e [N, K] in rows e N to
(e + 1) N. A [E, R, K] and B [E, N, R] are stacked likewise; one of them may be [1, R, K] or [1, N, R], shared by all
experts. A `slot` t k + j is the j-th choice of token t. Slots are sorted by expert, so that each expert has one
contiguous range of rows of [T k, ...] buffers. There is no capacity: every slot is computed, and an expert without
tokens costs nothing. Sums run in one order, so that the same input gives the same bits.

Saved for the backward: x, w, g and u [T k, 2 F], and S of the adapters. h is made again. With dH = dY W_down before the
weight is multiplied in, dY[t] w = dH . h needs no y: the output of down is neither kept nor made again.

Dropout names the rows of its masks so that no token's mask depends on other tokens' experts: by token in front of gate_up
(one mask for its k experts), by slot in front of down.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.kernels import kept
from minilora.kernels.dispatch import once_differentiable, recording
from minilora.kernels.dropout import DropoutKey, dropout, dropout_mask
from minilora.kernels.frozen_linear import FEW_ROWS, frozen_linear
from minilora.kernels.library_gemm import scaled
from minilora.kernels.projection import Adapter, Projection
from minilora.kernels.quantized import Weight, weight_as
from minilora.kernels.swiglu import swiglu_backward, swiglu_forward, swiglu_fused_ref


class Routing(NamedTuple):
    """Which tokens go to which experts: index int64 [T, k]; slots int64 [T k] sorted by expert; counts int64 [E]."""

    index: Tensor
    slots: Tensor
    counts: Tensor

    @staticmethod
    def of(index: Tensor, experts: int) -> "Routing":
        flat = index.flatten()
        if index.is_meta:  # a dry run counts bytes: every expert the same number of tokens
            return Routing(index, flat, flat.new_empty(experts))
        return Routing(index, flat.argsort(stable=True), torch.bincount(flat, minlength=experts))

    @property
    def tokens(self) -> Tensor:
        """The token of each sorted slot."""
        return self.slots // self.index.shape[1]

    def ranges(self) -> list[tuple[int, slice]]:
        """(expert, its rows of the sorted slots) of every expert that has tokens."""
        experts, slots = len(self.counts), len(self.slots)
        even = [slots // experts + (e < slots % experts) for e in range(experts)]
        start, found = 0, []
        for e, count in enumerate(even if self.counts.is_meta else self.counts.tolist()):
            if count:
                found.append((e, slice(start, start + count)))
            start += count
        return found


def lora_experts_ref(x: Tensor, w: Tensor, routing: Routing, gate_up: Projection, down: Projection) -> Tensor:
    """The specification, slot by slot."""
    k, experts, flat = routing.index.shape[1], len(routing.counts), routing.index.flatten()
    gu = _linears_ref(x.repeat_interleave(k, 0), _dropped(x, gate_up).repeat_interleave(k, 0), flat, experts, gate_up)
    h = swiglu_fused_ref(gu)
    y = _linears_ref(h, _dropped(h, down), flat, experts, down).unflatten(0, (-1, k))
    return (y * w[..., None]).sum(1).to(x.dtype)


def _dropped(x: Tensor, p: Projection) -> Tensor:
    return dropout(x, p.adapter.p, p.adapter.key) if p.adapter else x


def _linears_ref(x: Tensor, dropped: Tensor, expert: Tensor, experts: int, p: Projection) -> Tensor:
    """Row i through the linear of expert[i]."""
    found, order = [], []
    for e in range(experts):
        rows = (expert == e).nonzero()[:, 0]
        y = F.linear(x[rows], weight_as(p.weight, x.dtype, _rows(p.weight, e, experts)))
        if p.adapter:
            a, b = (t.to(x.dtype) for t in _pair(p.adapter, e))
            y = y + p.adapter.scale * (dropped[rows] @ a.T @ b.T)
        found.append(y)
        order.append(rows)
    return torch.cat(found)[torch.cat(order).argsort()]


def _rows(weight: Weight, e: int, experts: int) -> slice:
    n = weight.shape[0] // experts
    return slice(e * n, (e + 1) * n)


def _pair(adapter: Adapter, e: int) -> tuple[Tensor, Tensor]:
    """A [R, K] and B [N, R] of an expert, its own or that of all."""
    return adapter.a[e if len(adapter.a) > 1 else 0], adapter.b[e if len(adapter.b) > 1 else 0]


class _Expert:
    """One linear of one expert in the compute dtype; what is cast or widened lives as long as it."""

    def __init__(self, p: Projection, e: int, experts: int, dtype: torch.dtype):
        rows = _rows(p.weight, e, experts)
        self.stored = p.weight[rows] if isinstance(p.weight, Tensor) else p.weight.weight_as(dtype, rows)
        self.dtype = dtype
        if p.adapter:
            a, b = _pair(p.adapter, e)
            self.a, self.b = a.to(dtype), scaled(b, p.adapter.factor, dtype)

    @cached_property
    def weight(self) -> Tensor:
        return self.stored.to(self.dtype)

    def product(self, x: Tensor, few: bool, out: Tensor | None = None) -> Tensor:
        """x W^T, into out where there is one; few: x is of a stream of few rows, for which W is read as it is stored."""
        return frozen_linear(x, self.stored) if few else torch.mm(x, self.weight.T, out=out)


def _shrunk(x: Tensor, slots: int, p: Projection, given: Tensor | None) -> Tensor | None:
    """S [T k, R] as it was kept, or memory for it."""
    return x.new_empty(slots, p.adapter.a.shape[1]) if p.adapter and given is None else given


def _gradients(p: Projection, needs: Sequence[bool]) -> list[Tensor | None]:
    """Zeros for dA and dB, where they are needed: experts without tokens have no gradient."""
    if p.adapter is None:
        return [None, None]
    return [torch.zeros_like(t) if need else None for t, need in zip((p.adapter.a, p.adapter.b), needs, strict=True)]


def _add(total: Tensor | None, e: int, left: Tensor, right: Tensor) -> None:
    """total[e] += left^T right, where it is wanted; a factor that all experts share has one total."""
    if total is not None:
        total[e if len(total) > 1 else 0].add_(left.T @ right)


def _add_expanded(dx: Tensor, ds: Tensor, a: Tensor, mask: Tensor | None, rows: Tensor) -> None:
    """dX += mask(dS A)."""
    if mask is None:
        dx.addmm_(ds, a)
    else:
        dx.add_(_masked(ds @ a, mask, rows))


def _weighted(x: Tensor, weight: Tensor) -> Tensor:
    """Rows of x times weights in a wider dtype, in the dtype of x."""
    return (x * weight).to(x.dtype)


def _mask(p: Projection, rows: int, x: Tensor) -> Tensor | None:
    if p.adapter is None or not p.adapter.p:
        return None
    return dropout_mask((rows, p.weight.shape[1]), p.adapter.p, p.adapter.key, x.device)


def _masked(x: Tensor, mask: Tensor | None, rows: Tensor) -> Tensor:
    """x where these rows of a mask keep it, unscaled: the adapter's factor has the 1 / (1 - p)."""
    return x if mask is None else x * mask.index_select(0, rows)


class _OnTorch(torch.autograd.Function):
    """trained: the tensors of the adapters, named to autograd, first those of gate_up."""

    @staticmethod
    def forward(
        ctx,
        routing: Routing,
        gate_up: Projection,
        down: Projection,
        output_needed: bool,
        recorded: bool,
        x: Tensor,
        w: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        slots, experts, wide = len(routing.slots), len(routing.counts), torch.promote_types(x.dtype, torch.float32)
        given, given_down = (kept.given() if p.adapter else None for p in (gate_up, down))
        s, s_down = _shrunk(x, slots, gate_up, given), _shrunk(x, slots, down, given_down)
        made, made_down = s if given is None else None, s_down if given_down is None else None
        mask, mask_down = _mask(gate_up, len(x), x), _mask(down, slots, x)
        gu, few = (
            x.new_empty(slots, gate_up.weight.shape[0] // experts) if recorded else None,
            not recorded and len(x) <= FEW_ROWS,
        )
        y, tokens, of_slots = x.new_zeros(x.shape, dtype=wide), routing.tokens, w.flatten()[routing.slots]
        for e, rows in routing.ranges():
            first, here, slots_e = _Expert(gate_up, e, experts, x.dtype), tokens[rows], routing.slots[rows]
            x_e = x.index_select(0, here)
            gu_e = first.product(x_e, few, None if gu is None else gu[rows])
            if made is not None:
                torch.mm(_masked(x_e, mask, here), first.a.T, out=made[rows])
            if s is not None:
                gu_e.addmm_(s[rows], first.b.T)
            if not output_needed and made_down is None:
                continue
            last, h = _Expert(down, e, experts, x.dtype), swiglu_forward(gu_e, None, False)
            if made_down is not None:
                torch.mm(_masked(h, mask_down, slots_e), last.a.T, out=made_down[rows])
            if output_needed:
                y_e = last.product(h, few)
                y_e = y_e if s_down is None else y_e.addmm_(s_down[rows], last.b.T)
                y.index_add_(0, here, of_slots[rows, None] * y_e)
        ctx.save_for_backward(x, w, gu, kept.keep(s), kept.keep(s_down), *trained)
        ctx.routing, ctx.linears = routing, (gate_up, down)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        (dy,), (x, w, gu, s, s_down, *_) = grads, ctx.saved_tensors
        routing, (gate_up, down), (needs_x, needs_w, *needs) = ctx.routing, ctx.linears, ctx.needs_input_grad[5:]
        own = 2 if gate_up.adapter else 0
        (da, db), (da_down, db_down) = _gradients(gate_up, needs[:own]), _gradients(down, needs[own:])
        slots, experts, wide = len(routing.slots), len(routing.counts), torch.promote_types(x.dtype, torch.float32)
        mask, mask_down = _mask(gate_up, len(x), x), _mask(down, slots, x)
        dx = x.new_zeros(x.shape, dtype=wide) if needs_x else None
        dw, tokens, of_slots = w.new_zeros(slots), routing.tokens, w.flatten()[routing.slots]
        for e, rows in routing.ranges():
            last, here, slots_e = _Expert(down, e, experts, x.dtype), tokens[rows], routing.slots[rows]
            dy_e, gu_e, weight = dy.index_select(0, here), gu[rows], of_slots[rows, None]
            # down, of dY before the weight is multiplied in
            dh, ds_down = dy_e @ last.weight, dy_e @ last.b if down.adapter else None
            if ds_down is not None:
                _add_expanded(dh, ds_down, last.a, mask_down, slots_e)
                _add(db_down, e, dy_e, _weighted(s_down[rows], weight * down.adapter.factor))
            (dgu,), h = swiglu_backward(dh, gu_e, None, False)
            if needs_w:  # dY . y = dH . h = dU . u
                du, u = (t.chunk(2, dim=1)[1].to(w.dtype) for t in (dgu, gu_e))
                dw[rows] = torch.linalg.vecdot(du, u)
            if ds_down is not None:
                _add(da_down, e, _weighted(ds_down, weight), _masked(h, mask_down, slots_e))
            # gate_up
            dgu.mul_(weight)
            first = _Expert(gate_up, e, experts, x.dtype)
            ds = dgu @ first.b if gate_up.adapter else None
            if ds is not None:
                _add(db, e, dgu, s[rows] * gate_up.adapter.factor)
                if da is not None:
                    _add(da, e, ds, _masked(x.index_select(0, here), mask, here))
            if dx is not None:
                dx_e = dgu @ first.weight
                if ds is not None:
                    _add_expanded(dx_e, ds, first.a, mask, here)
                dx.index_add_(0, here, dx_e.to(wide))
        # from sorted slots to tokens
        dw = torch.empty_like(dw).index_copy_(0, routing.slots, dw).view(w.shape) if needs_w else None
        of_trained = [t for p, pair in ((gate_up, (da, db)), (down, (da_down, db_down))) if p.adapter for t in pair]
        return *[None] * 5, None if dx is None else dx.to(x.dtype), dw, *of_trained


def check(x: Tensor, w: Tensor, routing: Routing, gate_up: Projection, down: Projection) -> None:
    """ValueError, with the name and both sizes, if the tensors of an operation do not fit together."""
    experts, (tokens, d) = len(routing.counts), x.shape
    f2, f = gate_up.weight.shape[0] // experts, down.weight.shape[1]
    if w.shape != routing.index.shape or len(w) != tokens or not w.is_floating_point():
        raise ValueError(
            f"weights are {list(w.shape)} in {w.dtype}, index is {list(routing.index.shape)} of {tokens} tokens"
        )
    if f2 != 2 * f:
        raise ValueError(f"gate_up has {f2} rows an expert and down {f} columns: twice as many belong there")
    for name, p, n, k in (("gate_up", gate_up, f2, d), ("down", down, d, f)):
        if p.weight.shape != (experts * n, k) or p.bias is not None:
            raise ValueError(
                f"{name} is {list(p.weight.shape)}, not {[experts * n, k]} without bias: {experts} experts"
            )
        if p.adapter is None:
            continue
        (a_e, r, *_), b_e = p.adapter.a.shape, len(p.adapter.b)
        fits = p.adapter.a.shape == (a_e, r, k) and p.adapter.b.shape == (b_e, n, r) and {a_e, b_e} <= {1, experts}
        if not fits:
            found = f"{list(p.adapter.a.shape)} and {list(p.adapter.b.shape)}"
            raise ValueError(f"A and B of {name} are {found}; {experts} or one of [R, {k}] and [{n}, R] belong there")


def lora_experts(
    x: Tensor, w: Tensor, routing: Routing, gate_up: Projection, down: Projection, output_needed: bool = True
) -> Tensor:
    """y [T, D] for x [T, D], the weights w [T, k] of the chosen experts in fp32 or wider, and their linears.

    output_needed as in lora_linear_group. ValueError if they do not fit together.
    """
    check(x, w, routing, gate_up, down)
    if gate_up.weight.requires_grad or down.weight.requires_grad:
        return lora_experts_ref(x, w, routing, gate_up, down)
    trained = [t for p in (gate_up, down) if p.adapter for t in (p.adapter.a, p.adapter.b)]
    return recording(_OnTorch)(routing, gate_up, down, output_needed, torch.is_grad_enabled(), x, w, *trained)


def example(
    tokens: int, d: int, f: int, experts: int, k: int, r: int, dtype: torch.dtype, device: str = "cpu", p: float = 0.0
) -> tuple[tuple[Tensor, Tensor, Routing, Projection, Projection], dict]:
    """Arguments of one call, and the flops and bytes that a perfect forward and backward need."""
    stored = torch.promote_types(dtype, torch.float32)
    scores, index = torch.randn(tokens, experts, device=device, dtype=stored).softmax(-1).topk(k)
    linears = []
    for j, (n, inputs) in enumerate(((2 * f, d), (d, f))):
        weight = torch.randn(experts * n, inputs, device=device, dtype=dtype) * inputs**-0.5
        a = torch.randn(experts, r, inputs, device=device, dtype=stored) * inputs**-0.5
        b = torch.randn(experts, n, r, device=device, dtype=stored)
        linears.append(Projection(weight, None, Adapter(a, b, 2.0, p, DropoutKey(0, 0, 0, j))))
    x, slots, size = torch.randn(tokens, d, device=device, dtype=dtype), tokens * k, dtype.itemsize
    wide, narrow = 3 * d * f, r * (2 * d + 3 * f)  # of an expert: weights, and A and B
    used = min(experts, slots)
    kept_bytes = size * slots * (2 * f + 2 * r)
    return (x, scores, Routing.of(index, experts), *linears), {
        "flops": 2 * slots * (wide + narrow),
        "bytes": size * (2 * tokens * d + used * wide) + stored.itemsize * used * narrow + kept_bytes,
        "backward_flops": 2 * slots * (wide + 2 * narrow),
        "backward_bytes": size * (3 * tokens * d + used * wide) + 2 * stored.itemsize * used * narrow + kept_bytes,
    }
