"""Cross-entropy on logits [M, V]: the sum over rows of -log softmax(logits)[target]; rows with target -100 are left
out.

With e = exp(z - max) for the logits z of a row, t its true class, and others the sum of e over every class but t:

    loss = log(1 + others / e_t)        dz_j = s e_j / (others + e_t)        dz_t = -s others / (others + e_t)

The sum leaves the true class out, so that neither the loss nor p_t - 1 cancels where p_t is near 1; both are fp32 or
wider until the store rounds once. s is the gradient of the loss, a tensor that only the kernel reads, without a sync
with the GPU.

Bytes, in passes over the logits (a kernel that reads a row twice in one launch counts it once): s is known only in the
backward, so three passes are the least: the forward reads, the backward reads and writes. Liger writes the gradient in
the forward and needs two passes for s = 1 and four for any other s. Here a caller who knows s beforehand (one over the
number of targets of a step) gives it as `scale`, and the forward makes the gradient with s in it: two passes whatever s
is. Saved for backward: logits, max and others of each row; with `scale` the gradient only. Logits are never written to.
"""

import torch
from torch import Tensor

from minilora.kernels.dispatch import once_differentiable, use_triton
from minilora.kernels.lang import PINNED, accum_dtype, cdiv, jit, load, next_power_of_2, rows_of, store, tl

IGNORED = -100  # the target of a row that has none
# logits that a program holds, 8 a thread; with one program a multiprocessor their rows stay in the second-level cache
BLOCK = 8192
BLOCK_ROWS = 16  # rows in fp32 at a time on the CPU: 16 x 152k x 4 bytes stay within a third-level cache
_IGNORED = tl.constexpr(IGNORED)
_LOWEST = tl.constexpr(-3e38)  # below any logit, but finite, so that it can be subtracted


def cross_entropy_ref(logits: Tensor, targets: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The specification: (summed loss, times scale; rows with a target)."""
    kept = targets != IGNORED
    z = logits[kept].to(torch.promote_types(logits.dtype, torch.float32))
    loss = (z.logsumexp(1) - z.gather(1, targets[kept].unsqueeze(1)).squeeze(1)).sum()
    return loss if scale is None else loss * scale, kept.sum()


@jit
def true_logit(row_ptr, target, V, ACC: tl.constexpr):
    """The logit of the true class; NaN for a class that does not exist, so that the loss is NaN too."""
    exists = (target >= 0) & (target < V)
    return tl.where(exists, load(row_ptr + target, exists, ACC), float("nan"))


@jit
def loss_of(others, true):
    """log(1 + others / exp(true)); `others` and `true` have the same maximum subtracted."""
    d = tl.log(tl.where(others == 0, 1.0, others)) - true
    e = tl.exp(-tl.abs(d))
    u = 1 + e
    log1p = tl.where(u == 1, e, tl.log(u) * (e / tl.where(u == 1, 1.0, u - 1)))  # Goldberg, 1991, theorem 4
    return tl.where(others == 0, 0.0, tl.where(d > 0, d, 0.0) + log1p)


@jit
def store_gradient(
    out_ptr, logits_ptr, target, V, peak, others, true, scale, first, last, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """scale * (softmax - onehot) of the columns first to last of one row; out_ptr may be logits_ptr."""
    # p_j = e_j / (others + e_t), and p_t - 1 = -others / (others + e_t)                                 [BLOCK]
    factor = scale / (others + tl.exp(true - peak))
    for start in range(first, last, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        b_e = tl.exp(load(logits_ptr + o_v, o_v < V, ACC) - peak)
        store(out_ptr + o_v, tl.where(o_v == target, -others, b_e) * factor, o_v < V)


@jit
def store_zeros(out_ptr, V, first, last, BLOCK: tl.constexpr, ACC: tl.constexpr):
    for start in range(first, last, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        store(out_ptr + o_v, tl.zeros((BLOCK,), ACC), o_v < V)


@jit
def _fwd_kernel(
    logits_ptr,
    targets_ptr,
    loss_ptr,
    stats_ptr,
    dlogits_ptr,
    scale_ptr,
    stride,
    V,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program: one row. stats_ptr: None if no backward follows; dlogits_ptr: None if no gradient is made here."""
    i_m = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + i_m)
    logits_ptr += i_m * stride
    if dlogits_ptr is not None:
        dlogits_ptr += i_m * V
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(ACC)
    if target == _IGNORED:
        store(loss_ptr + i_m, tl.zeros((), ACC), True)
        if stats_ptr is not None:
            store(stats_ptr + 2 * i_m, tl.zeros((), ACC), True)
            store(stats_ptr + 2 * i_m + 1, tl.zeros((), ACC), True)
        if dlogits_ptr is not None:
            store_zeros(dlogits_ptr, V, 0, V, BLOCK, ACC)
    else:
        # online softmax without the true class: every lane keeps its own maximum, and the sum of exp(z - max)  [BLOCK]
        b_max, b_sum = tl.full((BLOCK,), _LOWEST, ACC), tl.zeros((BLOCK,), ACC)
        for start in range(0, V, BLOCK):
            o_v = start + tl.arange(0, BLOCK)
            b_z = load(logits_ptr + o_v, o_v < V, ACC)
            b_z = tl.where((o_v < V) & (o_v != target), b_z, -float("inf"))
            b_e = tl.exp(-tl.abs(b_z - b_max))
            b_sum = tl.where(b_z > b_max, b_sum * b_e + 1, b_sum + b_e)
            b_max = tl.where(b_z > b_max, b_z, b_max)
        # one maximum for the lanes and the true class, and the loss
        true = true_logit(logits_ptr, target, V, ACC)
        peak = tl.maximum(tl.max(b_max, 0), true)
        others = tl.sum(b_sum * tl.exp(b_max - peak), 0)
        store(loss_ptr + i_m, scale * loss_of(others, true - peak), True)
        if stats_ptr is not None:
            store(stats_ptr + 2 * i_m, peak, True)
            store(stats_ptr + 2 * i_m + 1, others, True)
        if dlogits_ptr is not None:
            store_gradient(dlogits_ptr, logits_ptr, target, V, peak, others, true, scale, 0, V, BLOCK, ACC)


@jit
def _bwd_kernel(
    logits_ptr,
    targets_ptr,
    stats_ptr,
    dlogits_ptr,
    scale_ptr,
    stride,
    V,
    blocks,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program: BLOCK columns of one row."""
    i_m = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK
    target = tl.load(targets_ptr + i_m)
    logits_ptr += i_m * stride
    dlogits_ptr += i_m * V
    if target == _IGNORED:
        store_zeros(dlogits_ptr, V, first, first + BLOCK, BLOCK, ACC)
    else:
        peak, others = tl.load(stats_ptr + 2 * i_m), tl.load(stats_ptr + 2 * i_m + 1)
        true = true_logit(logits_ptr, target, V, ACC)
        scale = tl.load(scale_ptr).to(ACC)
        store_gradient(dlogits_ptr, logits_ptr, target, V, peak, others, true, scale, first, first + BLOCK, BLOCK, ACC)


@jit
def _rescale_kernel(x_ptr, scale_ptr, V, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """x *= scale; a program: one row. Nothing of x is read or written where scale is 1."""
    scale = tl.load(scale_ptr).to(ACC)
    x_ptr += tl.program_id(0).to(tl.int64) * V
    if scale != 1:
        for start in range(0, V, BLOCK):
            o_v = start + tl.arange(0, BLOCK)
            store(x_ptr + o_v, load(x_ptr + o_v, o_v < V, ACC) * scale, o_v < V)


def row_tile(v: int, most: int) -> dict[str, int]:
    """Logits in a program, and its warps: 8 a thread."""
    block = min(most, next_power_of_2(v))
    return {"BLOCK": block, "num_warps": max(1, block // 256), **PINNED}


class _OnTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, scale: Tensor | None = None) -> Tensor:
        rows, targets = rows_of(logits), targets.contiguous()
        (m, v), device = rows.shape, logits.device
        keep = torch.promote_types(logits.dtype, torch.float32)
        losses = torch.empty(m, dtype=keep, device=device)
        stats = dlogits = None
        if ctx.needs_input_grad[0] and scale is None:
            stats = torch.empty((m, 2), dtype=keep, device=device)
        elif ctx.needs_input_grad[0]:
            dlogits = torch.empty((m, v), dtype=logits.dtype, device=device)
        if m:
            with torch.cuda.device_of(logits):
                _fwd_kernel[(m,)](
                    rows,
                    targets,
                    losses,
                    stats,
                    dlogits,
                    scale,
                    rows.stride(0),
                    v,
                    ACC=accum_dtype(logits.dtype),
                    **row_tile(v, BLOCK),
                )
        ctx.early, ctx.dlogits = scale is not None, dlogits
        if not ctx.early:
            ctx.save_for_backward(logits, targets, stats)
        return losses.sum(dtype=torch.float64).to(keep)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        (scale,) = grads
        if ctx.early:
            # only the GPU knows whether scale is 1: the gradient is multiplied in place, and given away
            dlogits, ctx.dlogits = ctx.dlogits, None
            if dlogits is None:
                raise RuntimeError(
                    "cross_entropy with a scale gives its gradient once: call it again, or leave scale out"
                )
            if dlogits.numel():
                m, v = dlogits.shape
                with torch.cuda.device_of(dlogits):
                    _rescale_kernel[(m,)](dlogits, scale, v, ACC=accum_dtype(dlogits.dtype), **row_tile(v, BLOCK))
            return dlogits, None, None
        logits, targets, stats = ctx.saved_tensors
        rows = rows_of(logits)
        m, v = rows.shape
        dlogits = torch.empty((m, v), dtype=logits.dtype, device=logits.device)
        tile = row_tile(v, BLOCK // 4)
        blocks = cdiv(v, tile["BLOCK"])
        if m:
            with torch.cuda.device_of(logits):
                _bwd_kernel[(m * blocks,)](
                    rows,
                    targets,
                    stats,
                    dlogits,
                    scale,
                    rows.stride(0),
                    v,
                    blocks,
                    ACC=accum_dtype(logits.dtype),
                    **tile,
                )
        return dlogits, None, None


class Softmax:
    """Softmax of some rows on the torch path: exponentials in place, the loss, and the gradient from both."""

    def __init__(self, p: Tensor, targets: Tensor):
        """p [rows, V] in fp32 or wider is overwritten; targets [rows]."""
        self.p = p
        self.masked = (targets == IGNORED).unsqueeze(1)
        self.any_masked = p.is_cuda or bool(self.masked.any())  # on a GPU, asking would wait for it
        self.target = targets.unsqueeze(1).masked_fill(self.masked, 0)
        p -= p.amax(dim=1, keepdim=True)
        true = p.gather(1, self.target)
        self.true = true.exp()
        self.others = p.exp_().scatter_(1, self.target, 0.0).sum(dim=1, keepdim=True)
        # log(1 + others / true), exact for a small and for a large quotient
        loss = torch.logaddexp(torch.zeros_like(true), self.others.log() - true)
        self.loss = loss.masked_fill_(self.masked, 0.0).sum(dtype=torch.float64)

    def gradient(self, scale: Tensor | float = 1.0) -> Tensor:
        """scale * (softmax - onehot) in the memory of p; zero for a masked row."""
        # p_j = e_j / (others + e_t), and p_t - 1 = -others / (others + e_t)
        factor = scale / (self.others + self.true)
        self.p.mul_(factor).scatter_(1, self.target, -self.others * factor)
        return self.p.masked_fill_(self.masked, 0.0) if self.any_masked else self.p


def blocks_of(*tensors: Tensor):
    """The same rows of each, few enough that their fp32 copies stay in a cache."""
    rows = max(1, tensors[0].shape[0]) if tensors[0].is_cuda else BLOCK_ROWS
    return zip(*(t.split(rows) for t in tensors), strict=True)


class _OnTorch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, scale: Tensor | None = None) -> Tensor:
        keep = torch.promote_types(logits.dtype, torch.float32)
        loss = torch.zeros((), dtype=torch.float64, device=logits.device)
        for block, target in blocks_of(logits, targets):
            loss += Softmax(block.to(keep, copy=True), target).loss
        ctx.save_for_backward(logits, targets, scale)
        return (loss if scale is None else loss * scale).to(keep)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        logits, targets, scale = ctx.saved_tensors
        scale = grads[0] if scale is None else grads[0] * scale
        keep = torch.promote_types(logits.dtype, torch.float32)
        dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        for block, target, out in blocks_of(logits, targets, dlogits):
            out.copy_(Softmax(block.to(keep, copy=True), target).gradient(scale))
        return dlogits, None, None


def check_targets(name: str, targets: Tensor, rows: Tensor, classes: int) -> None:
    """ValueError for targets [M] that do not fit rows [M, ...] and the classes; on a GPU their values are not read."""
    if targets.shape != rows.shape[:1] or targets.dtype != torch.int64 or targets.device != rows.device:
        raise ValueError(
            f"{name}: targets are {list(targets.shape)} {targets.dtype} on {targets.device}; "
            f"{list(rows.shape[:1])} torch.int64 on {rows.device} expected"
        )
    if targets.device.type == "cpu" and targets.numel():
        wrong = targets[(targets != IGNORED) & ((targets < 0) | (targets >= classes))]
        if wrong.numel():
            raise ValueError(f"{name}: target {int(wrong[0])} is neither a class of {classes} nor {IGNORED}")


def cross_entropy(logits: Tensor, targets: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy (times scale) of logits [M, V] against targets [M] int64, and how many rows have a target.

    The loss is a scalar, fp32 or wider; the number an int64 scalar. Rows with target -100 are skipped. scale, a tensor
    of one value, multiplies the loss; given here, it saves the backward from reading the logits again, and on a GPU the
    gradient can then be taken only once. A target that is not a class is a ValueError; on a GPU, where that would need
    a sync, the loss is NaN.
    """
    if logits.dim() != 2 or not logits.shape[1] or not logits.is_floating_point():
        raise ValueError(
            f"cross_entropy: logits [M, V] of a floating type expected, not {list(logits.shape)} {logits.dtype}"
        )
    check_targets("cross_entropy", targets, logits, logits.shape[1])
    if scale is not None:
        if scale.numel() != 1 or scale.device != logits.device or scale.requires_grad:
            raise ValueError(f"cross_entropy: scale is one value on {logits.device} without a gradient of its own")
        scale = scale.reshape(())
    if not torch.is_grad_enabled():
        logits = logits.detach()  # needs_input_grad is set even so
    on = _OnTriton if use_triton(logits) else _OnTorch
    return on.apply(logits, targets, scale), (targets != IGNORED).sum()  # pyright: ignore[reportReturnType]


def example(rows: int, vocab: int, dtype: torch.dtype, device: str = "cpu") -> tuple[tuple[Tensor, Tensor], dict]:
    """Arguments of one call, and the bytes that a perfect forward and backward move."""
    logits = 2 * torch.randn(rows, vocab, device=device, dtype=dtype)
    targets = torch.randint(vocab, (rows,), device=device)
    targets[1::4] = IGNORED
    kept, size = rows - len(range(1, rows, 4)), logits.element_size()
    return (logits, targets), {"bytes": kept * vocab * size, "backward_bytes": (kept + rows) * vocab * size}
