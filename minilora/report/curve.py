"""A curve of a run: two columns of numbers that read like a list of points, in 16 bytes a point."""

import math
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

Point = tuple[float, float]


class Curve(Sequence[Point]):
    """Points (x, y), from a column of each."""

    def __init__(self, x: Sequence[float] = (), y: Sequence[float] = ()):
        assert len(x) == len(y), (len(x), len(y))
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __iter__(self) -> Iterator[Point]:
        return zip(self.x, self.y, strict=True)

    def __getitem__(self, i: Any) -> Any:
        return Curve(self.x[i], self.y[i]) if isinstance(i, slice) else (self.x[i], self.y[i])


def smoothed(curve: Curve) -> Curve:
    """The exponential average over about a twentieth of a curve, bias-corrected; a value that is not finite is skipped."""
    keep = 1 - 1 / max(len(curve) / 20, 1)
    total = weight = 0.0
    result = array("d")
    for value in curve.y:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(total / weight if weight else value)
    return Curve(curve.x, result)
