"""Dropout whose mask is a function of a key, so that it is recomputed where it is needed and never stored.

    y = x * keep / (1 - p)      keep[i, j] = (lane[i, j] >= round(p * 65536))

The lanes are 16 bits each of the Philox 4x64 stream (Salmon et al., 2011) whose key is made of (seed, step, pass, module):
the backward, the recomputation under activation checkpointing and a resumed run draw the same bits. p is thereby
quantised to 1/65536.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class DropoutKey(NamedTuple):
    """Names one mask: the run's seed, the optimizer step, the pass (micro-batch) in the step, the module's number."""

    seed: int
    step: int
    micro: int
    module: int


def dropout_mask(shape: tuple[int, int], p: float, key: DropoutKey, device: torch.device | str = "cpu") -> Tensor:
    """The mask of `key` for a matrix [rows, columns]: bool, true where a value is kept.

    On a GPU the lanes come from torch's generator there, seeded from the key: other bits than on the CPU, as reproducible.
    """
    rows, columns = shape
    entropy = np.random.SeedSequence(list(key)).generate_state(2, np.uint64)
    if torch.device(device).type == "cuda":
        generator = torch.Generator(device).manual_seed(int(entropy[0] >> np.uint64(1)))
        lanes = torch.randint(0, 65536, shape, dtype=torch.int32, device=device, generator=generator)
        return lanes >= round(p * 65536)
    words = np.random.Philox(key=entropy).random_raw((rows * columns + 3) // 4)
    lanes = words.view(np.uint16)[: rows * columns].reshape(rows, columns)
    return torch.from_numpy(lanes >= round(p * 65536)).to(device)


def dropout(x: Tensor, p: float, key: DropoutKey) -> Tensor:
    """x [rows, columns] with the mask of `key`, scaled by 1 / (1 - p); x itself when p is 0. No autograd of its own."""
    return x if p == 0 else dropped(x, dropout_mask((x.shape[0], x.shape[1]), p, key, x.device), p)


def dropped(x: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """x with a mask of its shape, scaled by 1 / (1 - p); x itself where there is no mask."""
    return x if mask is None else torch.mul(x, mask).mul_(1 / (1 - p))
