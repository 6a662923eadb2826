"""The nearest matrix of a rank: what LoftQ and PiSSA start from (Eckart and Young, 1936)."""

import torch
from torch import Tensor

LEAST = 1e-5  # of the largest singular value: below are rounding errors, and a start of (almost) zeros would not train


def low_rank(m: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """B [N, R'] and A [R', K] whose product is the matrix of rank R' <= R nearest to M [N, K]: U sqrt(S), sqrt(S) V^T."""
    n, k = m.shape
    if n < k:
        a, b = low_rank(m.T, r)
        return b.T, a.T
    # V are the eigenvectors of M^T M, on the smaller side: much cheaper than an SVD, and the largest are as exact
    v = torch.linalg.eigh(m.T @ m).eigenvectors[:, -r:].flip(1)
    us = m @ v
    s = torch.linalg.vector_norm(us, dim=0)
    kept = s > LEAST * s.max()
    root = s[kept].sqrt()
    return us[:, kept] / root, root[:, None] * v.T[kept]
