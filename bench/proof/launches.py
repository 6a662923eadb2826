"""The kernel launches of one call of an operation, recorded without a GPU, as the just-in-time compiler would see them.

The operations run on tensors without data, with their kernels switched on and a recorder in the place of every kernel: what is
recorded, with which hints, tiles and warps, is what the card named would run.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from minilora.kernels import lang
from minilora.kernels.dispatch import compile_for

MULTIPROCESSORS = {80: 108, 86: 84, 90: 132}


class Launch(NamedTuple):
    kernel: Any  # a JITFunction
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.kernel.fn.__module__.rpartition('.')[2]}.{self.kernel.fn.__name__}"

    def source(self, arch: int) -> tuple[ASTSource, dict[str, Any]]:
        """What triton compiles for the launch, specialised by its own rules, and the options of the compiler."""
        backend = make_backend(GPUTarget("cuda", arch, 32))
        binder = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, rest = binder(*self.args, **self.options)
        packed = self.kernel._pack_args(backend, dict(rest), bound, specialization, rest)
        _, signature, constants, hints = packed
        return ASTSource(self.kernel, signature, constants, hints), rest


class _Recorder:
    def __init__(self, kernel: Any, launches: list[Launch]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert len(grid) == 1, "one dimension: the others end at 65535"
        return lambda *args, **options: self.launches.append(Launch(self.kernel, args, options))


def card(arch: int) -> SimpleNamespace:
    """What torch.cuda.get_device_properties says of a card of this architecture."""
    return SimpleNamespace(
        major=arch // 10, minor=arch % 10, multi_processor_count=MULTIPROCESSORS[arch], name=f"sm_{arch}"
    )


@contextmanager
def as_if_on(arch: int) -> Iterator[None]:
    """Every operation inside takes any tensor for one on a card of this architecture."""
    with ExitStack() as stack:
        for module in kernel_modules():
            if hasattr(module, "use_triton"):
                stack.enter_context(
                    patch.object(module, "use_triton", lambda *tensors: all(map(torch.is_tensor, tensors)))
                )
        stack.enter_context(compile_for(arch))
        stack.enter_context(patch.object(torch.cuda, "get_device_properties", lambda *_: card(arch)))
        yield


@contextmanager
def recorded(arch: int) -> Iterator[list[Launch]]:
    """The launches of every operation inside, which takes any tensor for one on a card of this architecture."""
    with as_if_on(arch), recorders() as launches:
        yield launches


@contextmanager
def recorders() -> Iterator[list[Launch]]:
    """Every launch inside is recorded instead of made."""
    launches: list[Launch] = []
    with ExitStack() as stack:
        for module in kernel_modules():
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction) and name.endswith("_kernel"):
                    stack.enter_context(patch.object(module, name, _Recorder(value, launches)))
        yield launches


def kernel_modules() -> list[ModuleType]:
    paths = sorted(Path(lang.__file__).parent.glob("*.py"))
    return [importlib.import_module(f"minilora.kernels.{path.stem}") for path in paths]
