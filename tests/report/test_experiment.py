"""What a sweep says: planted optima and differences are found, with Student's interval, and nothing is said that the runs do not show."""

import math
from pathlib import Path

import numpy as np
import pytest

from minilora.errors import UsageError
from minilora.report.experiment import STUDENT, Cells, Estimate, Question, experiment, sentence, student
from minilora.report.record import Record

RATES = (1e-3, 2e-3, 4e-3, 8e-3)
ASKED = {"ask": "Is it so?", "published": "Yes.", "compare": "lora_r", "best_of": "lr", "expect": [0.5, 2]}


def run(loss: float, ended: bool = True, **config) -> Record:
    steps = [1, 2] if ended else [1]
    columns = {"step": steps, "loss": [loss for _ in steps], "time": [1.0 for _ in steps]}
    name = ",".join(f"{key}={value}" for key, value in config.items())
    return Record(
        name, Path(name), config, columns, val=[(0, 9.0), (2, loss)], data={"steps": 2, "trained_parameters": 7}
    )


def estimate(cells: Cells, group: str) -> Estimate:
    found = cells.estimate((group,))
    assert found is not None
    return found


def bowl(best: float, low: float, **config) -> list[Record]:
    """Runs whose loss is a parabola on logarithmic axes."""
    return [run(low * math.exp(0.3 * math.log(lr / best) ** 2), lr=lr, **config) for lr in RATES]


def test_quantiles_of_student_s_t_are_the_tabulated_ones():
    """Those of a few degrees of freedom are a table, those of many a formula."""
    for freedom, quantile in {1: 12.706, 15: 2.131, 16: 2.120, 20: 2.086, 30: 2.042, 60: 2.000, 120: 1.980}.items():
        assert round(student(freedom), 3) == quantile


def test_the_best_rate_and_its_ratio_are_found_seed_by_seed():
    runs = []
    for seed, at in enumerate((1.8e-3, 2.0e-3, 2.3e-3)):
        runs += bowl(at, 0.5, lora_r=2, seed=seed) + bowl(1.5 * at, 0.4 - 0.01 * seed, lora_r=8, seed=seed)
    cells = Cells(Question.of(ASKED | {"read": "rate"}, ""), runs)
    found = estimate(cells, "8")
    assert found.mean == pytest.approx(1.5) and found.low == pytest.approx(1.5) and found.seeds == 3
    assert cells.bests("", ("2",))[1].rate == pytest.approx(2.0e-3)
    said = sentence(cells.question, cells, ("8",))
    assert "best lr of lora_r 8 is 1.50" in said and said.endswith(": as published.")


def test_losses_are_compared_seed_by_seed_with_students_interval():
    differences = (0.1, 0.2, 0.6)
    runs = []
    for seed, more in enumerate(differences):  # seeds differ far more than groups
        runs += [run(10.0 * seed + 1, lora_r=2, seed=seed), run(10.0 * seed + 1 + more, lora_r=8, seed=seed)]
    question = Question.of({k: v for k, v in ASKED.items() if k != "best_of"} | {"expect": [0, math.inf]}, "")
    found = estimate(Cells(question, runs), "8")
    half = 4.303 * np.std(differences, ddof=1) / 3**0.5
    assert (found.mean, found.high) == (pytest.approx(0.3), pytest.approx(0.3 + half, rel=1e-4))
    assert sentence(question, Cells(question, runs), ("8",)).endswith("these runs cannot tell.")
    one = sentence(question, Cells(question, runs[:2]), ("8",))
    assert "(one seed)" in one and one.endswith("these runs cannot tell.")


def test_the_table_of_student_is_his():
    for freedom, t in enumerate(STUDENT, 1):
        x = np.linspace(-t, t, 200_001)
        density = (1 + x * x / freedom) ** (-(freedom + 1) / 2)
        scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
        # three decimals of t, on both sides, where the density is below 0.06
        assert np.trapezoid(density, x) * scale == pytest.approx(0.95, abs=2 * 0.0005 * 0.06)
    assert Estimate.of([1.0, 2.0, 3.0, 4.0]).high == pytest.approx(2.5 + 3.182 * np.std([1, 2, 3, 4], ddof=1) / 2)


def test_a_difference_that_grows_along_a_setting():
    runs = [
        run(1 + (group == 8) * gap + 0.1 * seed, batch_size=size, lora_r=group, seed=seed)
        for size, gap in ((4, 0.02), (16, 0.1), (32, 0.3))
        for group in (2, 8)
        for seed in (1, 2, 3)
    ]
    question = Question.of(
        {"ask": "?", "published": ".", "compare": ["lora_r"], "along": "batch_size", "expect": [0.01, math.inf]}, ""
    )
    cells = Cells(question, runs)
    assert estimate(cells, "8").mean == pytest.approx(0.28)
    assert "From batch_size 4 to 32" in (said := sentence(question, cells, ("8",))) and "as published" in said
    alone = Cells(question, [run for run in runs if run.config["batch_size"] == 4])
    assert alone.estimate(("8",)) is None
    less = Question.of(
        {"ask": "?", "published": ".", "compare": "lora_r", "along": "batch_size", "expect": [-1, 0]}, ""
    )
    assert sentence(less, Cells(less, runs), ("8",)).endswith(": not as published.")


def test_what_was_not_trained_to_its_end_is_not_counted_and_an_edge_is_told():
    runs = bowl(9e-3, 0.5, lora_r=2, seed=1) + bowl(2e-3, 0.5, lora_r=8, seed=1)
    runs += [run(0.1, ended=False, lora_r=r, lr=1e-3, seed=2) for r in (2, 8)]
    question = Question.of(ASKED, "")
    cells = Cells(question, runs)
    assert cells.bests("", ("2",)).keys() == {1}
    text = experiment(cells, ["x failed with exit code 5"]).markdown()
    assert "lora\\_r 2: in 1 of 1 seeds the best lr is the first or the last that was tried" in text
    assert "lora\\_r 8: in" not in text and "x failed with exit code 5" in text
    none = Cells(question, [run(0.1, ended=False, lora_r=r, lr=1e-3, seed=2) for r in (2, 8)])
    assert "There is no seed" in sentence(question, none, ("8",))


def test_names_on_the_page_are_text():
    runs = [run(1.0, data="a/<b>#1", seed=1), run(2.0, data="b/<i>#2", seed=1)]
    question = Question.of({"ask": "<script>?", "published": "&", "compare": "data", "expect": [0, 1]}, "")
    page = experiment(Cells(question, runs)).html()
    assert "<script>?" not in page and "<i>" not in page and "&lt;i&gt;#2" in page


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"asks": 1}, "question has 'asks'"),
        ({"ask": ""}, "question has no ask"),
        ({"read": "rates"}, "read is 'rates'"),
        ({"expect": [1]}, "expect is"),
        ({"ask": ["Is", "it"]}, "ask is"),
        ({"read": "rate", "best_of": ""}, "needs best_of"),
        ({"compare": "lora_rnk"}, "unknown setting"),
    ],
)
def test_a_wrong_question_is_refused(more: dict, said: str):
    with pytest.raises(UsageError, match=said):
        Question.of(ASKED | more, "file")


def test_two_runs_in_one_place_are_refused_and_names_tell_paths_apart():
    question = Question.of(ASKED | {"compare": "data"}, "")
    twice = [run(1.0, data="rows", lr=1e-3, seed=1, lora_alpha=alpha) for alpha in (1, 64)]
    with pytest.raises(UsageError, match="lora_alpha=1 and .*lora_alpha=64 differ in nothing that the question names"):
        Cells(question, twice)
    with pytest.raises(UsageError, match="best_of is lr, which is 'high' in a run"):
        Cells(question, [run(1.0, data="rows", lr="high", seed=1)])
    cells = Cells(question, [run(1.0, data=f"{name}/train.json", lr=1e-3, seed=1) for name in ("a", "b")])
    assert cells.groups == [("a/train.json",), ("b/train.json",)]
