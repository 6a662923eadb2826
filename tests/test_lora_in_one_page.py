"""LoRA in one page: what it computes, its gradients and the merge in plain torch, and the project's own beside it.

    y = x W^T + s (x A^T) B^T        W [N, K] frozen, A [R, K] and B [N, R] trained, s = alpha / R

Read this first. The names are those of Hu et al. (2021); x is [T, K], a token a row.
"""

import torch
from torch import nn

from minilora.lora import LoRALinear

T, K, N, R, ALPHA = 5, 7, 6, 2, 4.0


def test_lora_in_one_page():
    torch.manual_seed(0)
    base = nn.Linear(K, N, bias=False, dtype=torch.float64)
    x = torch.randn(T, K, dtype=torch.float64, requires_grad=True)
    A, B = torch.randn(R, K), torch.randn(N, R)  # kept in fp32; B starts at zero in training, and then y = x W^T
    W, s = base.weight.detach(), ALPHA / R

    # forward: shrink x to R numbers a token, expand them to N
    S = x.detach() @ A.double().T  # [T, R]
    y = x.detach() @ W.T + s * S @ B.double().T  # [T, N]

    # backward, from dY: W gets none
    dY = torch.randn(T, N, dtype=torch.float64)
    dS = s * dY @ B.double()  # [T, R]
    dX = dY @ W + dS @ A.double()
    dA = dS.T @ x.detach()
    dB = s * dY.T @ S

    # the merge: one weight that computes the same
    merged = W + s * B.double() @ A.double()

    # and the project's own
    layer = LoRALinear(base, r=R, alpha=ALPHA)
    layer.lora_A.data, layer.lora_B.data = A.clone(), B.clone()
    ours = layer(x)
    ours.backward(dY)

    close(ours, y)
    close(x.grad, dX)
    close(layer.lora_A.grad, dA.float())  # in the dtype of A
    close(layer.lora_B.grad, dB.float())
    close(layer.merged("weight", base.weight), merged)
    close(x @ merged.T, y)
    assert base.weight.grad is None


def close(a: torch.Tensor | None, b: torch.Tensor) -> None:
    """The same numbers but for the order of a few sums."""
    assert a is not None and a.dtype == b.dtype
    assert (a - b).abs().max() <= 8 * torch.finfo(a.dtype).eps * b.abs().max()
