"""A linear layer with its adapter, as the kernels see it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minilora.kernels.dropout import DEFAULT_KEY, DropoutKey
from minilora.kernels.quantized import Weight

# dtypes that a frozen weight may be stored in, whatever the dtype of x
STORED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Adapter(NamedTuple):
    """The trained part: a [R, K] and b [N, R], both fp32, scale, dropout rate p and the name of its mask."""

    a: Tensor
    b: Tensor
    scale: float
    p: float = 0.0
    key: DropoutKey = DEFAULT_KEY

    @property
    def factor(self) -> float:
        """The scale, with the correction of inverted dropout: kernels multiply the kept values of x unscaled."""
        return self.scale / (1 - self.p)


class Projection(NamedTuple):
    """A linear layer: weight [N, K] and bias [N], frozen, and its adapter if it has one.

    The weight may be stored in another dtype than the one that products are computed in, or quantised.
    """

    weight: Weight
    bias: Tensor | None = None
    adapter: Adapter | None = None

    @property
    def tensor(self) -> Tensor:
        """The weight where it is not quantised, which is all that the Triton kernels take."""
        assert isinstance(self.weight, Tensor), self.weight
        return self.weight


def check(x: Tensor, projections: Sequence[Projection]) -> None:
    """ValueError, with the name and both sizes, if the projections do not fit x or each other."""
    if not 1 <= len(projections) <= 3:
        raise ValueError(f"a group has one to three projections, not {len(projections)}")
    _same("x", x, (x.shape[0] if x.dim() == 2 else "T", "K"), x)
    for j, (weight, bias, adapter) in enumerate(projections):
        n = weight.shape[0]
        if isinstance(weight, Tensor):
            _same(f"weight {j}", weight, (n, x.shape[1]), x, STORED)
        elif weight.shape[1] != x.shape[1] or weight.device != x.device:
            raise ValueError(f"weight {j} is {list(weight.shape)} on {weight.device}, x {list(x.shape)} on {x.device}")
        if bias is not None:
            _same(f"bias {j}", bias, (n,), x, STORED)
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            raise ValueError(f"projection {j} requires grad: weight and bias of an adapter are frozen")
        if adapter is not None:
            r, kept = adapter.a.shape[0], (torch.float32, x.dtype)
            _same(f"a {j}", adapter.a, (r, x.shape[1]), x, kept)
            _same(f"b {j}", adapter.b, (n, r), x, kept)
            if r == 0 or not 0 <= adapter.p < 1:
                raise ValueError(f"adapter {j} has rank {r} and dropout {adapter.p}: at least 1, and from 0 to below 1")


def _same(name: str, t: Tensor, shape: tuple, x: Tensor, dtypes: tuple[torch.dtype, ...] = ()) -> None:
    if t.shape == shape and t.dtype in (dtypes or (x.dtype,)) and t.device == x.device and t.is_floating_point():
        return
    if len(t.shape) != len(shape) or any(a != b for a, b in zip(t.shape, shape, strict=True) if isinstance(b, int)):
        raise ValueError(f"{name} is {list(t.shape)}, not {list(shape)}")
    dtypes = dtypes or (x.dtype,)
    if not t.is_floating_point():
        raise ValueError(f"{name} is {t.dtype}; it takes floating-point numbers")
    if t.device != x.device or t.dtype not in dtypes:
        raise ValueError(f"{name} is {t.dtype} on {t.device}, x {x.dtype} on {x.device}")
