"""What every operation decides first: Triton or torch, and whether its tensors fit together."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache, partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minilora.kernels.lang import HAVE_TRITON, INTERPRETED

OLDEST = 80  # sm_75 and before have less shared memory than the kernels take, no asynchronous copies and no bf16


class Timed(NamedTuple):
    """The form that was chosen for products of some shapes, and the seconds that each form took."""

    form: str
    seconds: dict[str, float]


class _Chosen:
    """What holds for the calls inside a context."""

    kernels, deterministic = True, False
    gemm: str | dict[Any, Timed] = "triton"
    target: int | None = None
    dry = False


@contextmanager
def _choosing(name: str, value: Any) -> Iterator[None]:
    before = getattr(_Chosen, name)
    setattr(_Chosen, name, value)
    try:
        yield
    finally:
        setattr(_Chosen, name, before)


def use_triton(*tensors: Tensor) -> bool:
    """Whether an operation on these tensors runs its Triton kernels: all on an A100 or newer, or under Triton's interpreter."""
    on = _Chosen.kernels and HAVE_TRITON
    return on and (INTERPRETED or all(t.is_cuda and architecture(t.device) >= OLDEST for t in tensors))


class _NoContext:
    """In the place of autograd's context where no gradient is recorded: nothing is saved, nothing needs a gradient."""

    needs_input_grad = (False,) * 64

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass

    def set_materialize_grads(self, on: bool) -> None:
        pass


def recording(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """function.apply, or only its forward where no gradient is recorded: for one token autograd costs too much."""
    return function.apply if torch.is_grad_enabled() else partial(function.forward, _NoContext())


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's decorator, which turns gradients off and looks at every tensor, only where there are gradients to turn off."""
    guarded = torch.autograd.function.once_differentiable(backward)

    @wraps(backward)
    def plain_or_guarded(ctx: Any, *grads: Tensor | None) -> Any:
        return guarded(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return plain_or_guarded


def check_same(op: str, **tensors: Tensor) -> None:
    """ValueError unless the tensors of an operation have the same floating-point dtype and device."""
    (first, x), *others = tensors.items()
    if not x.is_floating_point():
        raise ValueError(f"{op}: {first} is {x.dtype}; it takes floating-point numbers")
    for name, t in others:
        if t.dtype != x.dtype or t.device != x.device:
            raise ValueError(
                f"{op}: {first} is {x.dtype} on {x.device}, {name} {t.dtype} on {t.device}; both must be one"
            )


def to_device(x: Tensor, device: torch.device | None) -> Tensor:
    """x on a device. From pinned memory it goes to a GPU without the CPU waiting for what that still computes."""
    to_gpu = device is not None and device.type == "cuda" and x.device.type == "cpu"
    return (x.pin_memory() if to_gpu else x).to(device, non_blocking=True)


def kernels_enabled(on: bool) -> AbstractContextManager[None]:
    """Turn the kernels off or on for the calls inside; a backward does as its forward did."""
    return _choosing("kernels", on)


def gemm_form(*shapes: Any) -> str:
    """triton, library or augmented: how products of these shapes are made (wide_products.py)."""
    gemm = _Chosen.gemm
    if isinstance(gemm, str):
        return gemm
    timed = gemm.get(shapes)
    return "library" if timed is None else timed.form


def gemm_choice() -> str | dict[Any, Timed]:
    """The form of all products, or what was measured for the shapes of a model; measuring fills it."""
    return _Chosen.gemm


def use_gemm(form: str | dict[Any, Timed]) -> AbstractContextManager[None]:
    """One form for all products of the calls inside, or each by its shapes; a backward does as its forward did."""
    return _choosing("gemm", form)


def deterministic_backward(on: bool) -> AbstractContextManager[None]:
    """Whether attention's backward on a GPU adds in one order, so that the same input gives the same bits, for the calls
    inside; a backward does as its forward did."""
    return _choosing("deterministic", on)


def backward_is_deterministic() -> bool:
    return _Chosen.deterministic


def target() -> int | None:
    """The architecture of compile_for, which overrules the device's."""
    return _Chosen.target


def architecture(device: torch.device) -> int:
    """The compute capability that launches on a device are configured for: 80 for an A100, 90 for an H100."""
    if _Chosen.target is not None:
        return _Chosen.target
    major, minor = capability(device)
    return 10 * major + minor


@lru_cache  # a launch asks, and torch takes some microseconds
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def compile_for(architecture: int) -> AbstractContextManager[None]:
    """Configure the launches inside for an architecture, whatever the device: tensors without data are on none."""
    return _choosing("target", architecture)


@contextmanager
def dry_run_for(architecture: int) -> Iterator[None]:
    """Operations that ask take a GPU's path on tensors without data, and nothing is launched: what they allocate is counted."""
    with compile_for(architecture), _choosing("dry", True):
        yield


def dry() -> bool:
    """Whether this is inside dry_run_for."""
    return _Chosen.dry
