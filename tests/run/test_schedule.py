"""How many steps a run has, and the learning rate of each."""

import math

import numpy as np
import pytest
import torch

from minilora.run.schedule import _counted, count_steps, learning_rate, set_learning_rate
from minilora.settings import resolve


def config(**more):
    return resolve({"lr": 0.5, "batch_size": 3, "accumulation": 2} | more)


@pytest.mark.parametrize(
    ("rows", "given", "found"),
    [
        (60, {"epochs": 2}, (20, 10, 2)),
        (61, {"epochs": 2}, (22, 11, 2)),
        (60, {"epochs": 0.25}, (2, 10, 0.25)),
        (6, {"epochs": 0.1}, (1, 1, 0.1)),
        (6000, {}, (3000, 1000, 3)),  # three epochs
        (90, {}, (105, 15, 7)),  # or as many as make 100 steps
        (6, {}, (20, 1, 20)),  # but no more than 20
        (90, {"max_steps": 4}, (4, 15, 7)),
    ],
)
def test_steps_of_a_run(rows, given, found):
    assert count_steps(config(**given), rows) == found


@pytest.mark.parametrize("warmup", [0.2, 2])
def test_a_rate_rises_in_a_line_and_falls_in_its_shape(warmup):
    for schedule, shape in (
        ("linear", [1 - n / 8 for n in range(8)]),
        ("cosine", [0.5 + 0.5 * math.cos(math.pi * n / 8) for n in range(8)]),
        ("constant", [1.0] * 8),
    ):
        rates = [learning_rate(config(warmup=warmup, schedule=schedule), step, 10) for step in range(10)]
        assert rates == pytest.approx([0.25, 0.5, *(0.5 * x for x in shape)], rel=1e-12)


def test_a_warmup_may_be_one_step_or_the_whole_run():
    one = config(warmup=1, schedule="linear")
    assert [learning_rate(one, step, 3) for step in range(3)] == [0.5, 0.5, 0.25]
    long = config(warmup=9)
    assert [learning_rate(long, step, 4) for step in range(5)] == [0.125, 0.25, 0.375, 0.5, 0.5]


def test_each_group_has_its_ratio_in_place_where_a_graph_reads_it():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    tensor = torch.tensor(0.0)
    groups = [{"params": parameters[:1]}, {"params": parameters[1:2], "ratio": 16.0},
              {"params": parameters[2:], "lr": tensor, "ratio": 4.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 8.0, 2.0]
    assert optimizer.param_groups[2]["lr"] is tensor
    del optimizer.param_groups[2]["ratio"]
    set_learning_rate(optimizer, 0.25)
    assert float(tensor) == 0.25


def test_rows_are_counted_by_length():
    assert _counted(np.array([3, 1, 3, 3])) == {"1": 1, "3": 3}
