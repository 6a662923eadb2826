"""An axis of a chart: which share of its length a value lies at, and where its ticks stand; linear or logarithmic."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """From low to high; log: equal factors are equally long, and low is above 0."""

    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies: 0 at low, 1 at high."""
        low, value, high = (math.log10(v) if self.log else v for v in (self.low, value, self.high))
        return (value - low) / ((high - low) or 1)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values within the axis: about `most` of them, or 1, 2, 5, 10, ... as far as there is room."""
        if not self.log:
            step = round_up((self.high - self.low) / most or 1)
            return [round(i * step, 12) for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for within in ((1, 2, 5), (1, 3), (1,)):
            found = [m * 10.0**d for d in decades for m in within if self.low <= m * 10.0**d <= self.high]
            if len(found) <= most + 2:
                return found
        return found[:: -(-len(found) // most)]


def axis_around(values: Sequence[float], log: bool = False) -> Axis:
    """The axis of some values with a little room on both sides."""
    low, high = min(values), max(values)
    if log:
        return Axis(low / 1.2, high * 1.2, log)
    room = 0.05 * (high - low) or 0.5 * abs(high) or 1.0
    return Axis(low if low >= 0 and low - room < 0 else low - room, high + room)


def round_up(step: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... at or above, whatever the power of ten."""
    power = 10.0 ** math.floor(math.log10(max(step, 1e-300)))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))


def short(value: float) -> str:
    """A number as it stands at a tick."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:.4g}"
