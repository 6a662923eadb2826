"""The experts of a mixture, each a SwiGLU MLP whose linears may have adapters, as one operation over a flat stream.

    y[t] = sum over the k experts e of token t, in the router's order, of w[t, e] * down_e(h)
    h = silu(g) * u        [g u] = gate_up_e(x[t])        linear_e(x) = x W_e^T + s (drop(x) A_e^T) B_e^T

x [T, D], weights w [T, k]. The weights of all experts lie one above the other: W [E N, K] holds W_e [N, K] in rows e N to
(e + 1) N. A [E, R, K] and B [E, N, R] are stacked likewise; one of them may be [1, R, K] or [1, N, R], shared by all
experts. A `slot` t k + j is the j-th choice of token t. Slots are sorted by expert, so that each expert has one
contiguous range of rows of [rows, ...] buffers (expert_rows.py): the wide products run expert by expert, all else for
many experts at once. There is no capacity: every slot is computed, and an expert without tokens costs nothing. Sums run in
one order, so that the same input gives the same bits.

Saved for the backward: x, w, g and u [rows, 2 F], and S of the adapters. h is made again. With dH = dY W_down before the
weight is multiplied in, dY[t] w = dH . h needs no y: the output of down is neither kept nor made again.

This is the PyTorch path. On a GPU of sm_80 or newer, grouped Triton kernels compute all experts together (experts_on_triton.py).

Dropout names the rows of its masks so that no token's mask depends on other tokens' experts: by token in front of gate_up
(one mask for its k experts), by slot in front of down.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.kernels import kept
from minilora.kernels.dispatch import once_differentiable, recording
from minilora.kernels.dropout import DropoutKey, dropout, dropout_mask
from minilora.kernels.expert_rows import ExpertRows, Part
from minilora.kernels.experts_on_triton import OnTriton, runs_on_triton
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
        chosen, slots = index.flatten().sort(stable=True)
        # where each expert's slots end: torch.bincount would make the host wait for a GPU
        ends = torch.searchsorted(chosen, torch.arange(experts, device=index.device), right=True)
        return Routing(index, slots, ends.diff(prepend=ends.new_zeros(1)))

    def rows(self, width: int) -> ExpertRows:
        """The slots as rows of buffers, for x of that width."""
        experts, slots = len(self.counts), len(self.slots)
        even = [slots // experts + (e < slots % experts) for e in range(experts)]
        # a dry run counts bytes: every expert the same number of tokens
        return ExpertRows.of(self.index, self.slots, even if self.counts.is_meta else self.counts.tolist(), width)


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


class _Linear:
    """One linear of the experts of a part, on rows [rows, ...] of theirs, in the compute dtype."""

    def __init__(self, p: Projection, part: Part, rows: ExpertRows, dtype: torch.dtype):
        self.weight, self.adapter, self.part, self.block, self.dtype = p.weight, p.adapter, part, rows.block, dtype
        self.experts = rows.experts
        if p.adapter:  # A [blocks, R, K] and s B [blocks, N, R]
            self.a = self._of_blocks(p.adapter.a, 1.0)
            self.b = self._of_blocks(p.adapter.b, p.adapter.factor)

    def _of_blocks(self, t: Tensor, factor: float) -> Tensor:
        """factor t of the expert of each block, t [E, ...] or [1, ...]."""
        if len(t) == 1:
            return scaled(t, factor, self.dtype).expand(len(self.part.of_block), -1, -1)
        return scaled(t.index_select(0, self.part.experts), factor, self.dtype).index_select(0, self.part.of_block)

    def _batches(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Rows as blocks [blocks, block, ...], and what has blocks already, in batches of one size."""
        blocks = (t if t.dim() == 3 else t.view(-1, self.block, t.shape[1]) for t in tensors)
        return zip(*(t.split(self.part.batch) for t in blocks), strict=True)

    def _weights(self) -> Iterator[Tensor]:
        """W_e as stored; a quantised one is widened, and lives as long as it is used."""
        if isinstance(self.weight, Tensor):
            every = self.weight.unflatten(0, (self.experts, -1)).unbind()
            return (every[e] for e in self.part.numbers)
        return (self.weight.weight_as(self.dtype, _rows(self.weight, e, self.experts)) for e in self.part.numbers)

    def _each(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(W_e, rows of x, rows of y) of every expert. Rows of y behind them become zero."""
        own = sum(self.part.sizes)
        y[own:].zero_()
        return zip(self._weights(), x[:own].split(self.part.sizes), y[:own].split(self.part.sizes), strict=True)

    def product(self, x: Tensor, y: Tensor, few: bool) -> Tensor:
        """x W^T, into y; few: x is of a stream of few rows, for which W is read as it is stored."""
        for w, x_e, y_e in self._each(x, y):
            if few:
                y_e.copy_(frozen_linear(x_e, w))
            else:
                torch.mm(x_e, w.to(self.dtype).T, out=y_e)
        return y

    def input_gradient(self, dy: Tensor, dx: Tensor) -> Tensor:
        """dY W, into dX."""
        for w, dy_e, dx_e in self._each(dy, dx):
            torch.mm(dy_e, w.to(self.dtype), out=dx_e)
        return dx

    def shrink(self, x: Tensor, s: Tensor) -> None:
        """x A^T, into S."""
        for x_b, a, s_b in self._batches(x, self.a, s):
            torch.bmm(x_b, a.mT, out=s_b)

    def add_expanded(self, y: Tensor, s: Tensor) -> None:
        """y += S B^T."""
        for y_b, s_b, b in self._batches(y, s, self.b):
            y_b.baddbmm_(s_b, b.mT)

    def expand_backward(self, dy: Tensor) -> Tensor:
        """dS = dY B."""
        ds = dy.new_empty(len(dy), self.b.shape[2])
        for dy_b, b, ds_b in self._batches(dy, self.b, ds):
            torch.bmm(dy_b, b, out=ds_b)
        return ds

    def add_shrink_gradient(self, dx: Tensor, ds: Tensor, mask: Tensor | None) -> None:
        """dX += mask(dS A)."""
        to = dx if mask is None else torch.zeros_like(dx)
        for to_b, ds_b, a in self._batches(to, ds, self.a):
            to_b.baddbmm_(ds_b, a)
        if mask is not None:
            dx.add_(to.mul_(mask))

    def add_gradient(self, total: Tensor | None, left: Tensor, right: Tensor) -> None:
        """total[e] += left^T right, where it is wanted; a factor that all experts share has one total."""
        if total is None:
            return
        parts = left.new_empty(len(left) // self.block, left.shape[1], right.shape[1])
        for parts_b, left_b, right_b in self._batches(parts, left, right):
            torch.bmm(left_b.mT, right_b, out=parts_b)
        if len(total) == 1:
            total[0].add_(parts.sum(0, dtype=total.dtype))
            return
        blocks, own = [size // self.block for size in self.part.sizes], total.unbind()
        for e, of_expert in zip(self.part.numbers, parts[: sum(blocks)].split(blocks), strict=True):
            torch.sum(of_expert, 0, out=own[e])


def _shrunk(x: Tensor, count: int, p: Projection, given: Tensor | None) -> Tensor | None:
    """S [rows, R] as it was kept, or memory for it."""
    return x.new_empty(count, p.adapter.a.shape[1]) if p.adapter and given is None else given


def _gradients(p: Projection, needs: Sequence[bool], dtype: torch.dtype) -> list[Tensor | None]:
    """Zeros for dA and dB, where they are needed: experts without tokens have no gradient."""
    if p.adapter is None:
        return [None, None]
    pair = p.adapter.a, p.adapter.b
    return [
        torch.zeros_like(t, dtype=dtype if len(t) > 1 else None) if need else None
        for t, need in zip(pair, needs, strict=True)
    ]


def _weighted(x: Tensor, weight: Tensor) -> Tensor:
    """Rows of x times weights in a wider dtype, in the dtype of x."""
    return (x * weight).to(x.dtype)


def _mask(p: Projection, rows: int, x: Tensor) -> Tensor | None:
    if p.adapter is None or not p.adapter.p:
        return None
    return dropout_mask((rows, p.weight.shape[1]), p.adapter.p, p.adapter.key, x.device)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x where a mask keeps it, unscaled: the adapter's factor has the 1 / (1 - p)."""
    return x if mask is None else x * mask


def _of(mask: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if mask is None else mask.index_select(0, rows)


def _summed(of_rows: Tensor, at: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The sum over the k rows of each token, in a wide dtype: [rows, D] at [T, k], times weights [T, k] -> [T, D]."""
    total = of_rows.new_zeros(len(at), of_rows.shape[1], dtype=dtype)
    for j, rows in enumerate(at.unbind(1)):
        x = of_rows.index_select(0, rows)
        total = total.add_(x) if weights is None else total.addcmul_(x, weights[:, j, None])
    return total


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
        rows, f2 = routing.rows(x.shape[1]), gate_up.weight.shape[0] // len(routing.counts)
        count = len(rows.slots)
        given, given_down = (kept.given() if p.adapter else None for p in (gate_up, down))
        s, s_down = _shrunk(x, count, gate_up, given), _shrunk(x, count, down, given_down)
        mask, mask_down = _mask(gate_up, len(x), x), _mask(down, routing.index.numel(), x)
        few = not recorded and len(x) <= FEW_ROWS
        gu = x.new_empty(count, f2) if recorded else None
        y = x.new_empty(count, x.shape[1]) if output_needed else None
        for part in rows.parts:
            here, slots = rows.tokens[part.rows], rows.slots[part.rows]
            first, x_p = _Linear(gate_up, part, rows, x.dtype), x.index_select(0, here)
            gu_p = first.product(x_p, x.new_empty(len(x_p), f2) if gu is None else gu[part.rows], few)
            if s is not None:
                if given is None:
                    first.shrink(_masked(x_p, _of(mask, here)), s[part.rows])
                first.add_expanded(gu_p, s[part.rows])
            if y is None and (s_down is None or given_down is not None):
                continue
            last, h = _Linear(down, part, rows, x.dtype), swiglu_forward(gu_p, None, False)
            if s_down is not None and given_down is None:
                last.shrink(_masked(h, _of(mask_down, slots)), s_down[part.rows])
            if y is not None:
                y_p = last.product(h, y[part.rows], few)
                if s_down is not None:
                    last.add_expanded(y_p, s_down[part.rows])
        ctx.save_for_backward(x, w, gu, kept.keep(s), kept.keep(s_down), *trained)
        ctx.rows, ctx.linears = rows, (gate_up, down)
        wide = torch.promote_types(x.dtype, torch.float32)
        return x.new_zeros(x.shape) if y is None else _summed(y, rows.at, w, wide).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        (dy,), (x, w, gu, s, s_down, *trained) = grads, ctx.saved_tensors
        rows, (gate_up, down), (needs_x, needs_w, *needs) = ctx.rows, ctx.linears, ctx.needs_input_grad[5:]
        own = 2 if gate_up.adapter else 0
        (da, db), (da_down, db_down) = (
            _gradients(p, n, x.dtype) for p, n in ((gate_up, needs[:own]), (down, needs[own:]))
        )
        wide = torch.promote_types(x.dtype, torch.float32)
        mask, mask_down = _mask(gate_up, len(x), x), _mask(down, w.numel(), x)
        dx, dw = (x.new_empty(len(rows.slots), x.shape[1]) if needs_x else None), w.new_empty(len(rows.slots))
        weights = (w.flatten()[rows.slots] * rows.real)[:, None]
        for part in rows.parts:
            here, slots, weight = rows.tokens[part.rows], rows.slots[part.rows], weights[part.rows]
            dy_p, gu_p, mask_h = dy.index_select(0, here), gu[part.rows], _of(mask_down, slots)
            # down, of dY before the weight is multiplied in
            last = _Linear(down, part, rows, x.dtype)
            dh = last.input_gradient(dy_p, dy_p.new_empty(len(dy_p), gu_p.shape[1] // 2))
            ds_down = last.expand_backward(dy_p) if down.adapter else None
            if ds_down is not None:
                last.add_shrink_gradient(dh, ds_down, mask_h)
                last.add_gradient(db_down, dy_p, _weighted(s_down[part.rows], weight * down.adapter.factor))
            (dgu,), h = swiglu_backward(dh, gu_p, None, False)
            if needs_w:  # dY . y = dH . h = dU . u
                du, u = (t.chunk(2, dim=1)[1].to(w.dtype) for t in (dgu, gu_p))
                dw[part.rows] = torch.linalg.vecdot(du, u)
            if ds_down is not None:
                last.add_gradient(da_down, _weighted(ds_down, weight), _masked(h, mask_h))
            # gate_up
            dgu.mul_(weight)
            first = _Linear(gate_up, part, rows, x.dtype)
            ds = first.expand_backward(dgu) if gate_up.adapter else None
            if ds is not None:
                first.add_gradient(db, dgu, s[part.rows] * gate_up.adapter.factor)
                if da is not None:
                    first.add_gradient(da, ds, _masked(x.index_select(0, here), _of(mask, here)))
            if dx is not None:
                dx_p = first.input_gradient(dgu, dx[part.rows])
                if ds is not None:
                    first.add_shrink_gradient(dx_p, ds, _of(mask, here))
        dw = dw[rows.at] if needs_w else None
        found = [t for p, pair in ((gate_up, (da, db)), (down, (da_down, db_down))) if p.adapter for t in pair]
        of_trained = [None if d is None else d.to(t.dtype) for d, t in zip(found, trained, strict=True)]
        return *[None] * 5, None if dx is None else _summed(dx, rows.at, None, wide).to(x.dtype), dw, *of_trained


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
    on = OnTriton if runs_on_triton(x, (gate_up, down)) else _OnTorch
    return recording(on)(routing, gate_up, down, output_needed, torch.is_grad_enabled(), x, w, *trained)


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
