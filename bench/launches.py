"""The kernel launches of one call of an operation, recorded without a GPU, as the just-in-time compiler would see them.

The operations run on tensors without data, with their kernels switched on and a recorder in the place of every kernel: what is
recorded, with which hints, tiles and warps, is what the card named would run.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from minilora.kernels import lang

NAMES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.uint8: "u8", torch.int8: "i8", torch.bool: "i1",
}  # fmt: skip
MULTIPROCESSORS = {80: 108, 90: 132}


class Launch(NamedTuple):
    kernel: Any  # a JITFunction
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.kernel.fn.__module__.rpartition('.')[2]}.{self.kernel.fn.__name__}"

    def source(self) -> ASTSource:
        """Specialised as a launch is: ints that are 1, or multiples of 16; memory aligned to 16 bytes."""
        given = dict(zip(self.kernel.arg_names, self.args, strict=False))
        given |= {k: v for k, v in self.options.items() if k in self.kernel.arg_names}
        signature, constants, hints = {}, {}, {}
        for p in self.kernel.params:
            value, hint = given[p.name], not p.do_not_specialize
            if p.is_constexpr or value is None or (hint and isinstance(value, int) and value == 1):
                signature[p.name], constants[(p.num,)] = "constexpr", value
                continue
            if isinstance(value, Tensor):
                signature[p.name] = "*" + NAMES[value.dtype]
            elif isinstance(value, float):
                signature[p.name], hint = "fp32", False
            else:
                signature[p.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                hint = hint and not p.do_not_specialize_on_alignment and value % 16 == 0
            if hint:
                hints[(p.num,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, hints)

    def compile_options(self) -> dict[str, Any]:
        return {k: v for k, v in self.options.items() if k not in self.kernel.arg_names}


class _Recorder:
    def __init__(self, kernel: Any, launches: list[Launch]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert len(grid) == 1, "one dimension: the others end at 65535"
        return lambda *args, **options: self.launches.append(Launch(self.kernel, args, options))


@contextmanager
def recorded(arch: int) -> Iterator[list[Launch]]:
    """The launches of every operation inside, which takes any tensor for one on a card of this architecture."""
    launches: list[Launch] = []
    card = SimpleNamespace(
        major=arch // 10, minor=arch % 10, multi_processor_count=MULTIPROCESSORS[arch], name=f"sm_{arch}"
    )
    with ExitStack() as stack:
        for path in Path(lang.__file__).parent.glob("*.py"):
            module = importlib.import_module(f"minilora.kernels.{path.stem}")
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction) and name.endswith("_kernel"):
                    stack.enter_context(patch.object(module, name, _Recorder(value, launches)))
            if hasattr(module, "use_triton"):
                stack.enter_context(patch.object(module, "use_triton", lambda *_: True))
        stack.enter_context(patch.object(torch.cuda, "get_device_capability", lambda *_: divmod(arch, 10)))
        stack.enter_context(patch.object(torch.cuda, "get_device_properties", lambda *_: card))
        yield launches
