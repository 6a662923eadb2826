"""One step of training through one linear, number by number.

Two rows of computation are set beside each other: the formulas of LoRA, product by product in fp64, on the x and dY that the
linear has in a real step; and the call that training makes, with its own gradients. They must agree.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from minilora.kernels.lora_linear import lora_linear_group
from minilora.kernels.projection import Adapter, Projection
from minilora.kernels.quantized import weight_as
from minilora.models.decoder import Decoder

from ..data import Example, make_batch
from ..errors import UsageError
from ..lora import LoRALinear, adapters, replace_module, trained_parameters

WHERE = (  # what, module, function
    ("the formulas, in one page", "minilora.lora", "LoRALinear"),
    ("the specification", "minilora.kernels.lora_linear", "_one_ref"),
    ("S, on torch", "minilora.kernels.lora_linear", "_shrink"),
    ("y, dS, dB, dX, dA, on torch", "minilora.kernels.lora_linear", "OnTorch"),
    ("S, on Triton", "minilora.kernels.lora_shrink", "_shrink_kernel"),
    ("y, on Triton", "minilora.kernels.lora_gemm", "_forward_kernel"),
    ("dS and dB, on Triton", "minilora.kernels.lora_shrink", "_expand_backward_kernel"),
    ("dX, on Triton", "minilora.kernels.lora_gemm", "_input_gradient_kernel"),
    ("dA, on Triton", "minilora.kernels.lora_shrink", "_shrink_backward_kernel"),
    ("the loss, without logits", "minilora.kernels.linear_cross_entropy", "linear_cross_entropy"),
)


@dataclass(frozen=True)
class Quantity:
    """One tensor of a step: what it is, how it comes about, and what making it costs."""

    name: str
    formula: str
    value: Tensor
    flops: int = 0
    error: float | None = None  # of the call that training makes, from this value, divided by its largest element

    size: int = 4  # bytes of an element in training

    @property
    def bytes(self) -> int:
        return self.value.numel() * self.size


@dataclass(frozen=True)
class Explained:
    """One step, through one linear."""

    path: str
    place: str  # in the model
    tokens: int
    targets: int
    scale: float
    loss: float
    quantities: list[Quantity]
    called: str  # what the call that training makes ran on

    @property
    def adapter_share(self) -> float:
        """Of the arithmetic: all but the two products with W."""
        of = {q.name: q.value for q in self.quantities}
        whole = sum(q.flops for q in self.quantities)
        return 1 - 4 * of["x"].numel() * of["y"].shape[1] / whole


class _Tap(nn.Module):
    """In the place of a LoRALinear: computes what it does by the call that training makes, and keeps x and y."""

    def __init__(self, linear: LoRALinear):
        super().__init__()
        self.linear = linear
        self.x = self.y = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.x = x.detach()
        (y,) = lora_linear_group(x, [cast(Projection, self.linear.projection())])
        y.retain_grad()
        self.y = y
        return y


def explain(model: Decoder, example: Example, path: str, lr: float = 2e-4) -> Explained:
    """The step after the first one, through the linear at `path`, of a model with adapters and one row.

    A fresh B is 0, and then dA = dS^T x is 0, too: so one step is taken before. Raises UsageError for a path without adapter.
    """
    linear = next((m for p, m in adapters(model) if p == path), None)
    if linear is None:
        raise UsageError(f"no linear with an adapter is called {path}", f"Some are {', '.join(_some(model))}.")
    if linear.projection() is None:
        raise UsageError(f"{path} is DoRA, whose step has a norm in it", "Explain shows plain LoRA.")
    model.eval()  # without dropout
    batch = make_batch([example]).to(model.head.device)
    optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=lr, weight_decay=0.0)
    (model.loss(batch) / len(batch.targets)).backward()
    optimizer.step()
    optimizer.zero_grad()
    tap = _Tap(linear)
    replace_module(model, path, tap)
    try:
        loss = model.loss(batch) / len(batch.targets)
        loss.backward()
    finally:
        replace_module(model, path, linear)
    assert tap.y.grad is not None
    quantities, taken = _products(linear, tap.x, tap.y.grad, path)
    return Explained(
        path, _place(path), len(batch.ids), len(batch.targets), linear.scale, float(loss.detach()), quantities, taken
    )


def _products(linear: LoRALinear, x: Tensor, dy: Tensor, path: str) -> tuple[list[Quantity], str]:
    """The formulas in fp64 on x [T, K] and dY [T, N], each with the error of the call; and which path that took."""
    a, b, s = linear.lora_A.detach().double(), linear.lora_B.detach().double(), linear.scale
    w = weight_as(linear.base.weight, torch.float32).detach().double()
    wide, g = x.double(), dy.double()
    bias = 0.0 if linear.base.bias is None else linear.base.bias.detach().double()
    shrunk = wide @ a.T
    y = wide @ w.T + bias + s * shrunk @ b.T
    ds = s * g @ b
    made, taken = _called(linear, x, dy)
    (t, k), n, r, size = x.shape, w.shape[0], linear.r, x.element_size()

    def quantity(name: str, formula: str, value: Tensor, flops: int = 0) -> Quantity:
        error = None
        if name in made:
            error = float((made[name].double() - value).abs().max() / value.abs().max().clamp(min=1e-300))
        return Quantity(name, formula, value, flops, error, 4 if name in ("A", "B", "dA", "dB") else size)

    return [
        quantity("x", f"what {path.split('.')[-1]} is given", wide),
        quantity("A", "trained, [R, K]", a),
        quantity("B", "trained, [N, R]", b),
        quantity("S", "x A^T", shrunk, 2 * t * k * r),
        quantity("y", "x W^T + s S B^T", y, 2 * t * n * (k + r)),
        quantity("dY", "d loss / d y, from the layers above", g),
        quantity("dS", "s dY B", ds, 2 * t * n * r),
        quantity("dB", "s dY^T S", s * g.T @ shrunk, 2 * t * n * r),
        quantity("dA", "dS^T x", ds.T @ wide, 2 * t * k * r),
        quantity("dX", "dY W + dS A, to the layers below", g @ w + ds @ a, 2 * t * k * (n + r)),
    ], taken


def _called(linear: LoRALinear, x: Tensor, dy: Tensor) -> tuple[dict[str, Tensor], str]:
    """y, dX, dA and dB of the call that training makes, and the name of its path in autograd's graph."""
    given, a, b = (t.detach().clone().requires_grad_() for t in (x, linear.lora_A, linear.lora_B))
    (y,) = lora_linear_group(given, [Projection(linear.base.weight, linear.base.bias, Adapter(a, b, linear.scale))])
    y.backward(dy)
    assert given.grad is not None and a.grad is not None and b.grad is not None
    on = "Triton kernels" if "OnTriton" in type(y.grad_fn).__name__ else "torch's operations"
    return {"y": y.detach(), "dX": given.grad, "dA": a.grad, "dB": b.grad}, on


def usual_linear(model: Decoder) -> str:
    """A linear in the middle of the model."""
    paths = [path for path, _ in adapters(model)]
    return paths[len(paths) // 2]


def _some(model: Decoder) -> list[str]:
    paths = [path for path, _ in adapters(model)]
    return paths[:4] + ["..."] * (len(paths) > 4)


def _place(path: str) -> str:
    layer = next((part for part in path.split(".") if part.isdigit()), None)
    return f"layer {int(layer) + 1}" if layer else "outside of the layers"


def where() -> Sequence[tuple[str, str]]:
    """(what, file:line) of the places in this project's code to read; the files are not imported."""
    found = []
    for what, module, name in WHERE:
        spec = importlib.util.find_spec(module)
        assert spec and spec.origin
        lines = Path(spec.origin).read_text(encoding="utf-8").splitlines()
        line = next(i for i, text in enumerate(lines, 1) if text.lstrip().startswith((f"def {name}(", f"class {name}")))
        found.append((what, f"{'/'.join(Path(spec.origin).parts[-2:])}:{line}"))
    return found
