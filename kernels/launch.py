"""Launches whose sizes are known: what Triton made of the kernel is kept, and a call gives it memory alone.

Triton binds the arguments of every launch anew, which takes CPU time for kernels with as many arguments as these, and a step has
a thousand launches. A `Launch` has the grid and all numbers of one class of shapes. What a compiled kernel still depends on is the
dtype of each pointer and whether it is a multiple of 16; a call that was seen before with the same goes straight to it.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from minilora.kernels.dispatch import dry
from minilora.kernels.lang import INTERPRETED, JITFunction, driver


def per_shape(plan: Callable) -> Any:
    """Keep what a function of sizes gives; not under the interpreter, where tests change the tables that it reads."""
    return plan if INTERPRETED else lru_cache(4096)(plan)


class Launch:
    """A kernel's launch but for its memory, which its first parameters are; then come `numbers`, then the constants by name."""

    __slots__ = ("_compiled", "constants", "device", "grid", "numbers")

    def __init__(self, device: torch.device, grid: int, numbers: tuple[Any, ...], **constants: Any):
        self.device, self.grid, self.numbers, self.constants = device, grid, numbers, constants
        self._compiled: dict[tuple[Any, ...], tuple[Callable[..., None], Any, Any, tuple[Any, ...]]] = {}

    def __call__(self, kernel: Any, *varying: Any) -> None:
        """Launch the kernel on the current stream of the device, which is the current one.

        `varying`: tensors, a tuple of one for each projection, or None.
        """
        if type(kernel) is not JITFunction:  # the interpreter's, or a recorder in its place, or there is no Triton
            self._by_triton(kernel, varying)
            return
        seen, addresses, bits = [kernel.fn], [], 0
        for given in varying:
            if type(given) is tuple:
                several = tuple([t.data_ptr() for t in given])
                for t, address in zip(given, several, strict=True):
                    bits |= address
                    seen.append(t.dtype)
                addresses.append(several)
            elif given is None:
                seen.append(None)
                addresses.append(None)
            else:
                address = given.data_ptr()
                bits |= address
                seen.append(given.dtype)
                addresses.append(address)
        found = self._compiled.get(tuple(seen)) if bits % 16 == 0 else None
        if found is None:
            self._bind(kernel, varying, tuple(seen), bits)
        else:
            run, function, metadata, rest = found
            stream = driver.active.get_current_stream(self.device.index)
            run(self.grid, 1, 1, stream, function, metadata, None, None, None, *addresses, *rest)

    def _bind(self, kernel: Any, varying: tuple[Any, ...], seen: tuple[Any, ...], bits: int) -> None:
        """Launch by Triton's own way, and keep what it compiled for pointers that are multiples of 16."""
        made = self._by_triton(kernel, varying)
        if made is not None and bits % 16 == 0:
            names = kernel.arg_names[len(varying) + len(self.numbers) :]
            rest = (*self.numbers, *(self.constants[name] for name in names))
            self._compiled[seen] = made.run, made.function, made.packed_metadata, rest

    def _by_triton(self, kernel: Any, varying: tuple[Any, ...]) -> Any:
        """What Triton compiled for a launch that it made; nothing in a dry run."""
        return None if dry() else kernel[(self.grid,)](*varying, *self.numbers, **self.constants)
