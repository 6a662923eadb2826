"""The products of linears with adapters as one GEMM of the library: the low-rank part is a few more columns of it.

    [y_1 ... y_n] = [x | S] [W | f B]^T + b        dX = [dY_1 ... dY_n | dS] [W ; A]

The weights of a group (one x) lie in one matrix with the adapters beside and below them:

    W_1   f_1 B_1    0         [N + P, K + P]: N rows of weights, K columns; P is the sum of the ranks, rounded up to 64,
    W_2      0    f_2 B_2      so that rows keep their alignment. f_j is scale_j / (1 - p_j), as in training.
     A_1
     A_2

y is rounded once, where a second product added to it would round it twice. A and B stay in fp32 where they are trained;
they are cast into the matrix after every step of an optimizer, which may change them without a new version (a fused one
does), and where they have another version. Dropout's part of dX has a mask for each adapter
and is added apart (lora_linear). A quantised weight has no such matrix: it is widened for each product, and a second
product adds the low-rank part.
"""

from collections.abc import Iterable, Sequence
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from minilora.kernels.group import shapes_of
from minilora.kernels.library_gemm import joined_bias, scaled, side_by_side
from minilora.kernels.projection import Adapter, Projection

ALIGN = 64  # elements: 128 bytes in 16 bits, a line of the cache, and the least K of a tile of the library


class AugmentedWeight(nn.Parameter):
    """A frozen weight [N_j, K] that is a part of an augmented matrix; a copy of it is of none."""

    whole: "Augmented | None" = None


class Augmented:
    """The matrix of a group whose weights are not quantised: a copy of them, whose parts take their place."""

    def __init__(self, projections: Sequence[Projection]):
        weights = [p.tensor for p in projections]
        self.shapes = self.k, self.ns, self.ranks = shapes_of(projections)
        self.n, self.pad = sum(self.ns), -sum(self.ranks) % ALIGN
        extra = sum(self.ranks) + self.pad  # P
        self.matrix = weights[0].new_zeros(self.n + extra, self.k + extra)
        self.parts = self.matrix[: self.n, : self.k].split(self.ns)
        for part, w in zip(self.parts, weights, strict=True):
            part.copy_(w)
        self.zeros = self.matrix[self.n :, self.k + extra - self.pad :][:1]  # of the corner that belongs to none
        self.bias = joined_bias([p.bias for p in projections], self.ns, self.matrix.device, self.matrix.dtype)
        self.factors = [p.adapter.factor for p in projections if p.adapter]
        self.adapters: Sequence[Adapter] = ()  # what the tails were cast from, and the versions of their A and B
        self.versions: list[int] = []
        cast_adapters([(self, [p.adapter for p in projections if p.adapter])])
        _ALL.add(self)

    @staticmethod
    def of(projections: Sequence[Projection], x: Tensor) -> "Augmented | None":
        """The matrix that holds these projections' weights and adapters, all and no others, in the dtype of x; else None."""
        weights = [p.weight for p in projections]
        whole = weights[0].whole if isinstance(weights[0], AugmentedWeight) else None
        if whole is None or weights[0].dtype != x.dtype or shapes_of(projections) != whole.shapes:
            return None
        for w, part in zip(weights, whole.parts, strict=True):
            if not isinstance(w, AugmentedWeight) or w.whole is not whole or w.data_ptr() != part.data_ptr():
                return None  # another group, or a model that was moved to another device
        adapters = [p.adapter for p in projections if p.adapter]
        if not whole._holds(adapters):
            cast_adapters([(whole, adapters)])
        return whole

    def weights(self) -> list[AugmentedWeight]:
        """What takes the place of the weights."""
        made = [AugmentedWeight(part, requires_grad=False) for part in self.parts]
        for weight in made:
            weight.whole = self
        return made

    def holding(self, projections: Sequence[Projection]) -> list[Projection]:
        """The projections, on the weights of the matrix."""
        return [p._replace(weight=w) for p, w in zip(projections, self.weights(), strict=True)]

    @property
    def extra_bytes(self) -> int:
        """What the matrix takes beyond the weights."""
        return self.matrix.nbytes - self.n * self.k * self.matrix.itemsize

    def forward(self, x: Tensor, shrunk: Sequence[Tensor], projections: Sequence[Projection]) -> list[Tensor]:
        """y_j [T, N_j] for x [T, K] and the S_j [T, R_j] of the adapters."""
        # in evaluation nothing is dropped, and S makes up for the factor; the matrix stays as training needs it
        now = [p.adapter.factor for p in projections if p.adapter]
        tail = [s if f == g else s * (f / g) for s, f, g in zip(shrunk, now, self.factors, strict=True)]
        y = F.linear(self._operand([x], tail), self.matrix[: self.n], self.bias)
        return list(y.split_with_sizes(self.ns, 1))

    def input_gradient(self, dys: Sequence[Tensor], ds: Sequence[Tensor] | None) -> Tensor:
        """dX [T, K] of the dY_j [T, N_j] and the dS_j [T, R_j]; without the part of the adapters where ds is None."""
        if ds is None:
            return side_by_side(dys) @ self.matrix[: self.n, : self.k]
        return self._operand(dys, ds) @ self.matrix[:, : self.k]

    def _operand(self, left: Sequence[Tensor], tail: Sequence[Tensor]) -> Tensor:
        return torch.cat((*left, *tail, self.zeros.expand(left[0].shape[0], self.pad)), 1)

    def _holds(self, adapters: Sequence[Adapter]) -> bool:
        """Whether the tails are these A and B, as they are now."""
        same = len(adapters) == len(self.adapters) and all(
            x.a is y.a and x.b is y.b for x, y in zip(adapters, self.adapters, strict=True)
        )
        return same and self.versions == _versions(adapters)


@torch.no_grad()
def cast_adapters(groups: Iterable[tuple[Augmented, Sequence[Adapter]]]) -> None:
    """Write f_j B_j and A_j of adapters into their matrices, all in one go."""
    tails, values = [], []
    for whole, adapters in groups:
        rest, first, edge = zip(adapters, whole.factors, strict=True), 0, 0
        for n, rank in zip(whole.ns, whole.ranks, strict=True):
            if rank:
                (adapter, factor), ranks = next(rest), slice(edge, edge + rank)
                tails += [
                    whole.matrix[whole.n :, : whole.k][ranks],
                    whole.matrix[first : first + n, whole.k :][:, ranks],
                ]
                values += [adapter.a, scaled(adapter.b, factor, whole.matrix.dtype)]
                edge += rank
            first += n
        whole.adapters, whole.versions = adapters, _versions(adapters)
    if tails:
        torch._foreach_copy_(tails, values)


def _versions(adapters: Sequence[Adapter]) -> list[int]:
    return [t._version for x in adapters for t in (x.a, x.b)]


_ALL: WeakSet[Augmented] = WeakSet()
register_optimizer_step_post_hook(lambda *_: cast_adapters((whole, whole.adapters) for whole in _ALL if whole.adapters))
