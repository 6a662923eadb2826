"""Dropout whose mask is a function of a key, so that it is drawn again where it is needed and never stored.

    y = x * keep / (1 - p)      keep[i, j] = (lane[i, j] >= round(p * 65536))

The lanes are 16 bits each of a Philox stream (Salmon et al., 2011) whose key is made of (seed, step, pass, module): the
backward, the recomputation under activation checkpointing and a resumed run draw the same bits. p is quantised to
1/65536. There are two streams. The torch path draws a whole matrix of Philox 4x64 at once. A kernel draws Philox 4x32
of the counter (row, column // 8), 8 lanes a counter, so that any tile of the matrix can be drawn by itself.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from minilora.kernels.dispatch import use_triton
from minilora.kernels.lang import jit, tl

ROUNDS = 7  # of Philox 4x32: the fewest that pass BigCrush
TOP_BIT = 1 << 62  # of a key of 63 bits
_ROUNDS = tl.constexpr(ROUNDS)


class DropoutKey(NamedTuple):
    """Names one mask: the run's seed, the optimizer step, the pass (micro-batch) of the step, the module's number."""

    seed: int
    step: int
    micro: int
    module: int


DEFAULT_KEY = DropoutKey(0, 0, 0, 0)


def dropout_mask(shape: tuple[int, int], p: float, key: DropoutKey, device: torch.device | str = "cpu") -> Tensor:
    """The mask of `key` for a matrix [rows, columns] on the torch path: bool, true where a value is kept.

    On a GPU the lanes come from torch's generator, seeded from the key: not the CPU's bits, but as reproducible.
    """
    rows, columns = shape
    entropy = np.random.SeedSequence(list(key)).generate_state(2, np.uint64)
    if torch.device(device).type == "cuda":
        generator = torch.Generator(device).manual_seed(int(entropy[0] >> np.uint64(1)))
        lanes = torch.randint(0, 65536, shape, dtype=torch.int32, device=device, generator=generator)
        return lanes >= threshold(p)
    words = np.random.Philox(key=entropy).random_raw((rows * columns + 3) // 4)
    lanes = words.view(np.uint16)[: rows * columns].reshape(rows, columns)
    return torch.from_numpy(lanes >= threshold(p)).to(device)


def dropout_mask_ref(shape: tuple[int, int], p: float, key: DropoutKey, device: torch.device | str = "cpu") -> Tensor:
    """The mask of `key` as a kernel draws it, by the definition of Philox 4x32: bool [rows, columns]."""
    rows, columns = shape
    low, seed = np.uint64(0xFFFFFFFF), philox_key(key)
    keys = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)]
    row, group = np.meshgrid(np.arange(rows), np.arange((columns + 7) // 8), indexing="ij")
    c = [row.astype(np.uint64), group.astype(np.uint64), np.zeros_like(row, np.uint64), np.zeros_like(row, np.uint64)]
    for _ in range(ROUNDS):
        first, second = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        high = np.uint64(32)
        c = [(second >> high) ^ c[1] ^ keys[0], second & low, (first >> high) ^ c[3] ^ keys[1], first & low]
        keys = [(keys[0] + np.uint64(0x9E3779B9)) & low, (keys[1] + np.uint64(0xBB67AE85)) & low]
    lanes = np.stack(c, axis=-1).astype("<u4").view("<u2").reshape(rows, -1)[:, :columns]
    return torch.from_numpy(lanes >= threshold(p)).to(device)


def philox_key(key: DropoutKey) -> int:
    """The key as a kernel takes it: 63 bits with the highest set."""
    return int(_philox_keys(key[:3], key.module + 1)[key.module])


def _philox_keys(place: tuple[int, int, int], count: int) -> np.ndarray:
    """Those of the first modules of a pass, int64 [count]; place is its seed, step and micro."""
    return (np.random.SeedSequence(list(place)).generate_state(count, np.uint64) >> 2 | TOP_BIT).astype(np.int64)


class PassKeys:
    """The keys of the masks of a pass, those of `count` modules; kernels find them in the GPU's memory.

    in_place: the keys of the next pass go to the same memory, so that what a CUDA graph recorded reads those of the pass that
    it is replayed in. The backward of a pass then comes before the keys of the next one are set.
    """

    in_place = False

    def __init__(self, count: int, device: torch.device | str = "cpu"):
        self.count, self.device, self.place = count, torch.device(device), DEFAULT_KEY[:3]
        # int64 [count, 2], the second value only so that each row begins at a multiple of 16 bytes
        self.memory: Tensor | None = None
        self._rows: list[Tensor] = []

    def set(self, seed: int, step: int, micro: int) -> None:
        self.place = seed, step, micro
        if self.device.type != "cuda":
            return
        keys = torch.from_numpy(_philox_keys(self.place, self.count))
        keys = torch.stack((keys, keys), dim=1).pin_memory()
        if self.in_place and self.memory is not None:
            self.memory.copy_(keys, non_blocking=True)
        else:
            self.memory = keys.to(self.device, non_blocking=True)
            self._rows = list(self.memory.unbind())

    def of(self, module: int) -> DropoutKey:
        """The key of a module."""
        if not self._rows:
            return DropoutKey(*self.place, module)
        key = _KeyInMemory(*self.place, module)
        key.memory = self._rows[module]
        return key


NO_KEYS = PassKeys(0)


class Masked(Protocol):
    """What drops: an adapter."""

    keys: PassKeys
    number: int
    lora_A: torch.nn.Parameter


def shared_keys(adapters: Iterator[Masked]) -> PassKeys:
    """The keys of the adapters of a model. The first call gives each its number; later ones ask the first adapter alone."""
    first = next(adapters, None)
    if first is None or (first.keys.count and first.keys.device == first.lora_A.device):
        return first.keys if first else NO_KEYS
    numbered = [first, *adapters]
    keys = PassKeys(len(numbered), first.lora_A.device)
    for number, adapter in enumerate(numbered):
        adapter.keys, adapter.number = keys, number
    return keys


class _KeyInMemory(DropoutKey):
    memory: Tensor


def seed_of(key: DropoutKey, device: torch.device) -> Tensor:
    """Where a kernel on this device reads a key."""
    return key.memory if isinstance(key, _KeyInMemory) else _brought(key, device)


@lru_cache(1024)  # an operation asks three times
def _brought(key: DropoutKey, device: torch.device) -> Tensor:
    return torch.tensor([philox_key(key)] * 2, device=device)


def threshold(p: float) -> int:
    """The least lane of 16 bits that is kept."""
    return round(p * 65536)


@jit
def keep_mask(seed, threshold, o_m, first, BN: tl.constexpr):
    """Bool [BM, BN], true where a value is kept: rows o_m [BM, 1], columns from `first`, a multiple of 8."""
    # 4 words of 32 bits for each row and each 8 columns                                         4 x [BM, BN / 8]
    o_8 = first // 8 + tl.arange(0, BN // 8)[None, :]
    c0, c1, c2, c3 = tl.philox(seed, o_m.to(tl.int32), o_8, o_8 * 0, o_8 * 0, _ROUNDS)
    b_words = tl.join(tl.join(c0, c2), tl.join(c1, c3))  # joined so, c0 c1 c2 c3 are side by side
    # 2 lanes of 16 bits for each word                                                                  [BM, BN]
    b_lanes = tl.join(b_words & 0xFFFF, b_words >> 16)
    return tl.reshape(b_lanes, (o_m.shape[0], BN)) >= threshold


def dropout(x: Tensor, p: float, key: DropoutKey) -> Tensor:
    """x [rows, columns] under the mask that an operation on it draws, scaled by 1 / (1 - p); x itself when p is 0.

    The specification: no autograd of its own.
    """
    draw = dropout_mask_ref if use_triton(x) else dropout_mask
    return x if p == 0 else torch.mul(x, draw((x.shape[0], x.shape[1]), p, key, x.device)).mul_(1 / (1 - p))
