"""The steps of linears with adapters on this project's kernels, of which lora_linear.py and lora_mlp.py are made.

The narrow products are kernels always, the wide ones take the form that was chosen for them (wide_products.py). They launch on the
current device, which is that of their tensors.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from minilora.kernels import lora_gemm, lora_shrink, wide_products
from minilora.kernels.group import Group
from minilora.kernels.lang import rows_of
from minilora.kernels.projection import Projection
from minilora.kernels.quantized import Weight


class OnTriton:
    """Projections of one input on this project's kernels; S is that of lora_shrink."""

    def __init__(self, projections: Sequence[Projection]):
        self.group = Group.of(projections)
        self.adapted = bool(self.group.a)  # or few rows of quantised weights, without a gradient

    def forward(self, x: Tensor, s: Tensor | None, output_needed: bool) -> tuple[Tensor | None, list[Tensor]]:
        """S, made if it is None, and y_j [T, N_j]; uninitialised memory if these are not needed."""
        x, group = rows_of(x), self.group
        if not self.adapted:
            return None, lora_gemm.forward(x, x, group)
        if s is None and output_needed and wide_products.in_one_pass(x, group):
            y, s = lora_gemm.single_pass(x, group)
            return s, [y]
        s = lora_shrink.shrink(x, group) if s is None else s
        if not output_needed:
            return s, uninitialised(x, [p.weight for p in group.projections])
        return s, wide_products.forward(x, s, group)

    def expand_backward(
        self, dys: Sequence[Tensor], s: Any, needs_ds: bool, needs_b: Sequence[bool]
    ) -> tuple[Any, Sequence[Tensor | None]]:
        """dS of all adapters and dB of each, where they are wanted."""
        adapted = [rows_of(dy) for dy, size in zip(dys, self.group.sizes, strict=True) if size.rank]
        return lora_shrink.expand_backward(adapted, s, self.group, needs_ds, any(needs_b))

    def masks(self, x: Tensor) -> Any:
        """Of dropout: the kernels draw them where they need them."""

    def input_gradient(self, dys: Sequence[Tensor], ds: Any, masks: Any) -> Tensor:
        """dX [T, K]."""
        return wide_products.input_gradient([rows_of(dy) for dy in dys], ds, self.group)

    def shrink_backward(self, x: Tensor, ds: Any, masks: Any, needs_a: Sequence[bool]) -> Sequence[Tensor | None]:
        """dA of each adapter."""
        return lora_shrink.shrink_backward(rows_of(x), ds, self.group)


def uninitialised(x: Tensor, weights: Sequence[Weight]) -> list[Tensor]:
    """Uninitialised memory in the shape of the outputs."""
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]
