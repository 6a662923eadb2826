"""How each kind of linear learned, by the steps that train --study looked at."""

from collections.abc import Callable
from statistics import median
from typing import Any

from .charts import Series, heat_map, line_chart
from .curve import Point
from .page import Document

Linears = dict[str, dict[str, float]]  # what a look found of each linear, by its path

PICTURES: dict[str, Callable[[dict[str, float]], float]] = {
    "moved by the adapter": lambda x: x["moved"],
    "gradient of B": lambda x: x["grad_b"],
    "step of A / A": lambda x: x["step_a"] / x["a"] if x["a"] else 0.0,
    "step of B / B": lambda x: x["step_b"] / x["b"] if x["b"] else 0.0,
}


class Looks:
    """All looks of a run. Of each but the last, which is whole, only what is drawn is kept: the median over layers, by picture and kind."""

    def __init__(self):
        self.count, self.step, self.last = 0, 0, Linears()
        self.curves: dict[str, dict[str, list[Point]]] = {title: {} for title in PICTURES}

    def add(self, step: int, linears: Linears) -> None:
        self.count, self.step, self.last = self.count + 1, step, linears
        kinds: dict[str, list[dict[str, Any]]] = {}
        for path, numbers in linears.items():
            kinds.setdefault(path.split(".")[-1], []).append(numbers)
        for title, value in PICTURES.items():
            for kind, found in kinds.items():
                self.curves[title].setdefault(kind, []).append((step, median(map(value, found))))

    def show(self, page: Document) -> None:
        page.heading("How the adapters learned")
        page.text(
            f"{self.count:,} steps were looked at; the median over layers. How far an adapter moves what its linear gives is "
            "||s B A x|| / ||W x|| on the same few rows each time. A and B are measured by what a step changes of them."
        )
        page.charts(
            *(
                line_chart(
                    [Series(*named, i, dots=True) for i, named in enumerate(curves.items())], "step", title, log=True
                )
                for title, curves in self.curves.items()
            )
        )
        moved = {(path.split(".")[-1], _layer(path)): numbers["moved"] for path, numbers in self.last.items()}
        page.charts(heat_map(moved, "layer", f"moved by the adapter at step {self.step:,}"))


def _layer(path: str) -> str:
    return next((part for part in path.split(".") if part.isdigit()), "")
