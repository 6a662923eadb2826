"""A shadow of memory on Triton's interpreter: which program of a launch reads and writes which element of which argument.

Every tensor argument gets an address range of its own, far from all others. A pointer therefore always tells which
argument it came from and how far into it it points, whatever arithmetic made it; the real address is put in at the very load or
store. What lies outside the elements of that argument is noted and not touched.

Racing are, on one real address: two programs of which one writes; and, without a barrier between, a store and then any other
access by the same program, whose threads have no order. A load before a store in place is no race.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from torch import Tensor
from triton.runtime import interpreter

APART = 2**44  # bytes between the ranges of two arguments; the middle of a range is the start of its tensor


class Placed:
    """A tensor argument at its address in the shadow; everything else about it is the tensor's."""

    def __init__(self, name: str, tensor: Tensor, place: int):
        self.name, self.tensor, self.place = name, tensor, place
        offsets = np.zeros(1, np.int64)
        for n, stride in zip(tensor.shape, tensor.stride(), strict=True):
            offsets = np.add.outer(offsets, np.arange(n) * stride).ravel()
        self.elements = np.unique(offsets)  # of the view, counted from its first
        self.size = tensor.element_size()
        self.real = tensor.data_ptr()

    def data_ptr(self) -> int:
        return self.place * APART + APART // 2

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)


class Access(NamedTuple):
    argument: Placed
    elements: np.ndarray  # as they were asked for, repeats too
    program: int
    section: int  # between two barriers of the program
    is_store: bool


@dataclass
class Launch:
    kernel: str
    arguments: list[Placed] = field(default_factory=list)
    accesses: list[Access] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    programs: int = 0

    def bytes(self) -> dict[str, tuple[int, int]]:
        """(loaded, stored) bytes of each argument, every element once a launch."""
        return {a.name: (a.size * len(self._of(a, False)), a.size * len(self._of(a, True))) for a in self.arguments}

    def total(self) -> int:
        """Bytes that must move at least: every element loaded once and stored once."""
        return sum(map(sum, self.bytes().values()))

    def loads(self) -> dict[str, float]:
        """How often each argument was loaded on average: 1 where no element was loaded twice."""
        asked = {a.name: sum(len(x.elements) for x in self._accesses(a, False)) for a in self.arguments}
        return {a.name: asked[a.name] / max(1, len(self._of(a, False))) for a in self.arguments}

    def faults(self) -> list[str]:
        """What is out of bounds and what races, in words; empty for a clean launch."""
        return self.outside + self._races()

    def _accesses(self, argument: Placed, is_store: bool) -> list[Access]:
        return [x for x in self.accesses if x.argument is argument and x.is_store == is_store]

    def _of(self, argument: Placed, is_store: bool) -> np.ndarray:
        found = [x.elements for x in self._accesses(argument, is_store)]
        return np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)

    def _races(self) -> list[str]:
        if not self.accesses:
            return []
        counts = [len(x.elements) for x in self.accesses]
        address = np.concatenate([x.argument.real + x.elements * x.argument.size for x in self.accesses])
        number = np.repeat(np.arange(len(counts)), counts)
        program = np.repeat([x.program for x in self.accesses], counts)
        section = np.repeat([x.section for x in self.accesses], counts)
        is_store = np.repeat([x.is_store for x in self.accesses], counts)
        order = np.lexsort((number, program, address))
        address, number, program, section, is_store = (x[order] for x in (address, number, program, section, is_store))
        found = []

        def note(kind: str, one: int, other: int) -> None:
            names = [self.accesses[number[i]].argument.name for i in (one, other)]
            element = (address[one] - self.accesses[number[one]].argument.real) // self._size(number[one])
            found.append(
                f"{self.kernel}: {kind}: {names[0]}[{element}] by programs {program[one]} and {program[other]}"
                + (f", the second through {names[1]}" if names[0] != names[1] else "")
            )

        same = address[1:] == address[:-1]
        own = same & (program[1:] == program[:-1]) & (section[1:] == section[:-1]) & is_store[:-1]
        for i in np.flatnonzero(own)[:1]:
            note("stored and used again without a barrier", i, i + 1)
        starts = np.concatenate(([0], np.flatnonzero(~same) + 1))
        ends = np.concatenate((starts[1:], [len(address)])) - 1
        shared = np.logical_or.reduceat(is_store, starts) & (program[starts] != program[ends])
        for i in np.flatnonzero(shared)[:1]:
            one, other = int(starts[i]), int(ends[i])
            both = is_store[one] and is_store[other]
            note("written by two programs" if both else "read and written by two programs", one, other)
        return found

    def _size(self, number: int) -> int:
        return self.accesses[number].argument.size


@contextmanager
def shadow(order: Callable[[int], Sequence[int]] | None = None) -> Iterator[list[Launch]]:
    """Every launch inside, noted; `order` gives for a number of programs the order in which they run."""
    launches: list[Launch] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    place, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store
    state: dict[str, Any] = {}

    def placed(self: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = place(self, args, kwargs)
        launches.append(launch := Launch(f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"))

        def at(name: str, value: Any) -> Any:
            if isinstance(value, tuple):
                return type(value)(at(f"{name}[{i}]", v) for i, v in enumerate(value))
            if isinstance(value, Tensor):
                value = Placed(name, value, len(launch.arguments) + 1)
                launch.arguments.append(value)
            return value

        args = [at(name, value) for name, value in zip(self.arg_names, args, strict=False)]
        return args, {name: at(name, value) for name, value in kwargs.items()}

    def dim(self: Any, x: int, y: int, z: int) -> None:
        assert y == z == 1, "one dimension: the others end at 65535"
        self.grid_dim = (x, y, z)
        state["order"] = list(order(x)) if order else list(range(x))
        assert sorted(state["order"]) == list(range(x))
        launches[-1].programs = x

    def index(self: Any, x: int, y: int, z: int) -> None:
        self.grid_idx = (state["order"][x], y, z)
        state["section"] = 0

    def barrier(self: Any) -> None:
        state["section"] += 1

    def real(self: Any, ptrs: Any, mask: Any, is_store: bool) -> tuple[Any, Any]:
        """The pointers in real memory, and the mask without what lies outside of its argument."""
        launch, program = launches[-1], self.grid_idx[0]
        kind = "store" if is_store else "load"
        data, inside = np.broadcast_arrays(ptrs.data, mask.data)
        inside, address = inside.astype(bool), data.astype(np.int64)
        addresses = np.zeros_like(data)
        number = address // APART
        for k in np.unique(number[inside]):
            here = inside & (number == k)
            if not 1 <= k <= len(launch.arguments):
                launch.outside.append(f"{launch.kernel}: a {kind} of program {program} through no argument's pointer")
                inside = inside & ~here
                continue
            a = launch.arguments[k - 1]
            offset = address - a.data_ptr()
            elements, odd = np.divmod(offset, a.size)
            wrong = here & ~(np.isin(elements, a.elements) & (odd == 0))
            if wrong.any():
                first = elements[wrong][0]
                launch.outside.append(f"{launch.kernel}: program {program}: {kind} of {a.name}[{first}] outside of it")
                inside, here = inside & ~wrong, here & ~wrong
            addresses = np.where(here, (a.real + offset).astype(data.dtype), addresses)
            launch.accesses.append(Access(a, elements[here], program, state["section"], is_store))
        handle = interpreter.TensorHandle
        return handle(addresses, ptrs.dtype), handle(inside, mask.dtype)

    def masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        return load(self, *real(self, ptrs, mask, False), *rest)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        ptrs, mask = real(self, ptrs, mask, True)
        return store(self, ptrs, value, mask, *rest)

    def atomic(self: Any, *_: Any) -> Any:
        raise AssertionError("an atomic operation: its order, and so the last bits, hang on the schedule")

    with (
        patch.object(executor, "_init_args_hst", placed),
        patch.multiple(
            builder,
            set_grid_dim=dim,
            set_grid_idx=index,
            create_barrier=barrier,
            create_masked_load=masked_load,
            create_masked_store=masked_store,
            create_atomic_rmw=atomic,
            create_atomic_cas=atomic,
        ),
    ):
        yield launches


def backwards(programs: int) -> Sequence[int]:
    return range(programs)[::-1]


def shuffled(programs: int) -> Sequence[int]:
    """An order that keeps hardly any two neighbours together."""
    step = next(s for s in range(max(1, round(0.618 * programs)), 2 * programs + 2) if math.gcd(s, programs) == 1)
    return [(i * step + programs // 3) % programs for i in range(programs)]
