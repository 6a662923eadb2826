"""Cross-entropy of a linear head without the [M, V] logits: the sum over rows of -log softmax(x head^T)[target].

    loss = F.cross_entropy((x @ head.T).float(), targets, reduction="sum")     x [M, D], head [V, D], targets [M]

Every row has a target: the caller drops the masked rows before the last norm, so that none reaches the head. Rows go
through in chunks; one chunk's logits are the only ones that exist. The gradient is made in the forward pass, where the
logits already are, and scaled in the backward: with P = softmax(logits) - onehot(target),

    dx = P head        dhead = P^T x (only if the head is trained)

The true class's entry, p - 1, is taken in fp32 before P is rounded for the GEMM. Saved for backward: dx (and dhead).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ROWS = 256  # rows whose logits exist at a time
BLOCK_ROWS = 16  # rows in fp32 at a time on the CPU: 16 x 152k x 4 bytes stay within a third-level cache


def linear_cross_entropy_ref(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """The specification: the summed loss, a scalar in fp32 or wider."""
    logits = (x @ head.T).to(torch.promote_types(x.dtype, torch.float32))
    return F.cross_entropy(logits, targets, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, head: Tensor, targets: Tensor, chunk_rows: int) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        needs_x, needs_head = ctx.needs_input_grad[:2]
        dx = torch.empty_like(x) if needs_x else None
        dhead = torch.zeros_like(head, dtype=wide) if needs_head else None
        loss = torch.zeros((), dtype=torch.float64, device=x.device)
        for start in range(0, x.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = x[rows] @ head.T
            loss += _loss_and_gradient_(logits, targets[rows], needs_x or needs_head)
            if dx is not None:
                torch.mm(logits, head, out=dx[rows])
            if dhead is not None:
                dhead += logits.T @ x[rows]
        ctx.save_for_backward(dx, dhead)
        ctx.head_dtype = head.dtype
        return loss.to(wide)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (scale,) = grads
        dx, dhead = ctx.saved_tensors
        # scale has no dimensions, so torch neither widens dx for it nor rounds it to the dtype of dx first
        dx = None if dx is None else dx * scale
        dhead = None if dhead is None else (dhead * scale).to(ctx.head_dtype)
        return dx, dhead, None, None


def _loss_and_gradient_(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """Summed loss in fp64 of a chunk [m, V]; overwrites the logits with softmax - onehot if a gradient is wanted."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    block_rows = logits.shape[0] if logits.is_cuda else BLOCK_ROWS
    loss = torch.zeros((), dtype=torch.float64, device=logits.device)
    for block, target in zip(logits.split(block_rows), targets.split(block_rows), strict=True):
        target = target.unsqueeze(1)
        p = block.to(wide, copy=True)
        p -= p.amax(dim=1, keepdim=True)
        true = p.gather(1, target)
        total = p.exp_().sum(dim=1, keepdim=True)
        loss += (total.log() - true).sum(dtype=torch.float64)
        if gradient:
            p /= total
            block.copy_(p.scatter_add_(1, target, torch.full_like(true, -1.0)))
    return loss


def linear_cross_entropy(x: Tensor, head: Tensor, targets: Tensor, chunk_rows: int = CHUNK_ROWS) -> Tensor:
    """Summed cross-entropy of rows x [M, D] under head [V, D] against class numbers targets [M]; a scalar, fp32 or wider.

    With no rows the loss is 0 and still connected to x. The number of rows a chunk changes rounding only.
    """
    assert x.shape[0] == targets.shape[0], (x.shape, targets.shape)
    if not torch.is_grad_enabled():
        # needs_input_grad is set even so, and the forward would make gradients for nobody
        x, head = x.detach(), head.detach()
    return _LinearCrossEntropy.apply(x, head, targets, chunk_rows)  # pyright: ignore[reportReturnType]


def example(rows: int, width: int, vocab: int, dtype: torch.dtype, device: str = "cpu") -> tuple[tuple, dict]:
    """Arguments of one call, and the flops of forward and dx together."""
    x = torch.randn(rows, width, device=device, dtype=dtype)
    head = torch.randn(vocab, width, device=device, dtype=dtype) * width**-0.5
    return (x, head, torch.randint(vocab, (rows,), device=device)), {"flops": 4 * rows * width * vocab}
