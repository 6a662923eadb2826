"""A GPU without data, so that a whole training step runs where there is no GPU: what is on the wrong device, or of the wrong dtype, shows.

Tensors on it lie on torch's meta device, which knows shapes and dtypes alone, and say that they are on cuda:0. (torch's own
FakeTensorMode needs a torch built for CUDA to run a backward pass.) Kernels are launched on a recorder. An operation that mixes them
with tensors of the CPU is an error, as on a GPU.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.proof.launches import Launch, card, recorders
from minilora.kernels import attention
from minilora.kernels.dispatch import compile_for

CUDA, META = torch.device("cuda:0"), torch.device("meta")
_IS_CUDA: Any = vars(torch._C.TensorBase)["is_cuda"].__get__
FROM_PYTHON = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)
ADAMW = torch.ops.aten._fused_adamw_.tensor_lr
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class _SaysCuda(TorchFunctionMode):
    """Python sees a GPU where torch sees tensors without data."""

    def __init__(self, devices: "_OneDevice"):
        super().__init__()
        self.devices = devices

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _IS_CUDA:
            return args[0].is_meta
        if func is torch.Tensor.pin_memory:
            return args[0]
        result = func(*map(_on_meta, args), **{name: _on_meta(value) for name, value in (kwargs or {}).items()})
        if self.devices.strict and func in FROM_PYTHON and result.is_meta:
            raise RuntimeError(f"{func.__name__}: values of the host go to {CUDA} while a graph is recorded")
        return CUDA if isinstance(result, torch.device) and result == META else result


def _on_meta(value: Any) -> Any:
    return META if isinstance(value, (str, torch.device)) and str(value).startswith("cuda") else value


class _OneDevice(TorchDispatchMode):
    """Sees every operation, those of the backward pass too; `strict`: as if a CUDA graph recorded them."""

    strict = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch's compiler would be imported to hear it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        there, here = [t for t in given if t.is_meta], [t for t in given if not t.is_meta]
        if there and func is COPIES[0] and kwargs.get("device") == torch.device("cpu"):
            result = torch.zeros(there[0].shape, dtype=kwargs.get("dtype") or there[0].dtype)
        else:
            if there and [t for t in here if t.dim() or self.strict] and func not in COPIES:
                raise RuntimeError(f"{func}: tensors on {CUDA} and on the CPU")
            in_place = func is ADAMW and there  # torch has no form of it without data
            result = None if in_place else func(*args, **kwargs)
        if self.strict:
            made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            if (there or any(t.is_meta for t in made)) and (here or any(not t.is_meta for t in made)):
                raise RuntimeError(f"{func}: a copy between {CUDA} and the CPU while a graph is recorded")
        return result


class FakeCuda:
    """What ran on the GPU without data."""

    def __init__(self, launches: list[Launch], devices: _OneDevice):
        self.launches, self._devices = launches, devices

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Inside, nothing may pass between the CPU and the GPU: a CUDA graph would keep what it saw."""
        self._devices.strict = True
        try:
            yield
        finally:
            self._devices.strict = False

    def check_launches(self) -> None:
        """RuntimeError if a kernel was given memory of the CPU."""
        for launch in self.launches:
            if not all(t.is_meta for t in tree_leaves(launch.args) if isinstance(t, Tensor)):
                raise RuntimeError(f"{launch.name}: memory of the CPU")


@contextmanager
def fake_cuda(arch: int) -> Iterator[FakeCuda]:
    """cuda:0 is a GPU of this architecture, without data, for all that runs inside."""
    devices = _OneDevice()
    says = _SaysCuda(devices)
    run_backward = torch.autograd._engine_run_backward  # torch takes the mode off before it calls this

    def backward(*args: Any, **kwargs: Any) -> Any:
        with says:
            return run_backward(*args, **kwargs)

    generator = torch.Generator

    class NoGenerator:
        """A GPU's: nothing is drawn."""

        def __new__(cls, device: torch.device | str = "cpu") -> Any:
            return super().__new__(cls) if str(device).startswith("cuda") else generator(device)

        def manual_seed(self, seed: int) -> None:
            if devices.strict:
                raise RuntimeError(f"a seed of the host goes to {CUDA} while a graph is recorded")

    event = SimpleNamespace(record=lambda: None, query=lambda: True, synchronize=lambda: None)
    patches: list[tuple[Any, str, Any]] = [
        (torch.autograd, "_engine_run_backward", backward),
        (torch.version, "cuda", "13.0"),
        (torch.cuda, "Event", lambda **_: event),
        (torch.cuda, "get_device_properties", lambda *_: card(arch)),
        (torch, "Generator", NoGenerator),
        (torch.backends.cuda, "is_flash_attention_available", lambda: True),
        (attention, "capability", lambda _: divmod(arch, 10)),
    ]
    with ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(patch.object(owner, name, value))
        stack.enter_context(compile_for(arch))
        launches = stack.enter_context(recorders())
        stack.enter_context(devices)
        stack.enter_context(says)
        yield FakeCuda(launches, devices)
