"""Which rows are taken, how often, and on which side they stand: arithmetic that a user counts on."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.errors import DataError, UsageError
from minilora.rows.sources import Source, draw, mixed, parse_ratio, parse_sources, repeated, times
from minilora.rows.split import count_of, counts_of, split
from minilora.rows.token_store import Examples, TokenStore, Writer, unnamed_file

QUICK = settings(deadline=None, max_examples=100)
SPECS = {
    "a.jsonl": [Source("a.jsonl")],
    "a.jsonl#5": [Source("a.jsonl", 5)],
    "a.jsonl#:5": [Source("a.jsonl", 5, True)],
    "a.jsonl@0.2": [Source("a.jsonl", rate=0.2)],
    "a.jsonl#5@2.5": [Source("a.jsonl", 5, rate=2.5)],
    "a.jsonl#5@10, b.csv@.01": [Source("a.jsonl", 5, rate=10), Source("b.csv", rate=0.01)],
    "a#b.jsonl": [Source("a#b.jsonl")],
    "a@b.jsonl": [Source("a@b.jsonl")],
}


@pytest.mark.parametrize(("text", "sources"), SPECS.items(), ids=SPECS)
def test_specs(text, sources):
    assert parse_sources(text) == sources


@pytest.mark.parametrize("text", ["a@0.009", "a@10.1", "a@0", "a@1.2.3", "a#0"])
def test_specs_that_mean_nothing(text):
    with pytest.raises(UsageError):
        parse_sources(text)


def test_a_file_that_is_called_like_a_spec(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a#5", "b@2", "c,d"):
        Path(name).touch()
        assert parse_sources(name) == [Source(name)]
    assert parse_sources("a#5,b@2") == [Source("a#5"), Source("b@2")]


@QUICK
@given(rows=st.integers(1, 500), rate=st.floats(0.01, 1), seed=st.integers(0, 9))
def test_a_rate_below_one_draws_that_share(rows, rate, seed):
    numbers = draw(Source("a", rate=rate), rows, seed)
    assert len(numbers) == (max(1, round(rows * rate)) if rate < 1 else rows)
    assert (np.diff(numbers) > 0).all() and 0 <= numbers[0] and numbers[-1] < rows
    assert (numbers == draw(Source("a", rate=rate), rows, seed)).all()


def test_counts():
    assert draw(Source("a", 3, first=True), 9, 0).tolist() == [0, 1, 2]
    seen = {tuple(draw(Source("a", 3), 9, seed).tolist()) for seed in range(20)}
    assert len(seen) > 10 and all(len(set(numbers)) == 3 for numbers in seen)
    assert len(draw(Source("a", 100, rate=0.2), 1000, 0)) == 20
    with pytest.raises(DataError, match="has 9 rows, 10 are wanted"):
        draw(Source("a", 10), 9, 0)


@QUICK
@given(rows=st.integers(1, 200), rate=st.floats(1, 10), seed=st.integers(0, 9))
def test_a_rate_above_one_repeats_evenly(rows, rate, seed):
    index = np.arange(rows) * 3
    result, counts = np.unique(times(index, rate, seed), return_counts=True)
    assert (result == index).all() and counts.sum() == round(rows * rate)
    assert counts.max() - counts.min() <= 1 and counts.min() >= int(rate * (1 - 1e-9) - 1 / rows)


class Place:
    def where(self, number: int) -> str:
        return f"row {number}"

    def value(self, number: int) -> int:
        return number


def store(count: int, rate: float = 1.0) -> TokenStore:
    writer = Writer(unnamed_file())
    for i in range(count):
        ids = np.arange(i, i + 2 + i % 5)
        writer.add(ids, ids > i, row=i, question=i // 2, content=i, prefix=i if i % 2 else None)
    made = writer.finish(Place())
    made.rate = rate
    return made


def test_repeated_takes_each_store_at_its_rate():
    examples = Examples([store(10, 2.5), store(10), store(10, 0.5)]).take(np.r_[0:4, 10:16, 20:22])
    order = repeated(examples, 0).order
    assert [((order >= a) & (order < a + 10)).sum() for a in (0, 10, 20)] == [10, 6, 2]


def test_general_rows_are_mixed_in_by_ratio():
    own, general = Examples([store(10)]), Examples([store(40)])
    for text, count in (("1:2", 20), ("5:1", 2), ("1:4", 40), ("1:7", 70)):
        result = mixed(own, general, parse_ratio(text), 0)
        assert (
            len(result) == 10 + count
            and result.order[:10].tolist() == list(range(10))
            and result.order[10:].min() >= 10
        )
        assert np.unique(result.order[10:], return_counts=True)[1].max() <= -(-count // 40)
        assert [e.where for e in result] == [f"row {n if n < 10 else n - 10}" for n in result.order.tolist()]
    with pytest.raises(DataError, match="asks for 410 general rows, there are 40"):
        mixed(own, general, 41, 0)
    for text in ("5", "0:1", "1:0", "a:b", "1:-2", "1:" + "9" * 400, "9" * 400 + ":" + "9" * 400):
        with pytest.raises(UsageError):
            parse_ratio(text)


def test_a_digest_is_of_the_tokens_and_of_which_are_trained():
    def digest(ids: list[int], trained: list[bool]) -> str:
        writer = Writer(unnamed_file())
        writer.add(np.array(ids), np.array(trained), row=0, question=0, content=0, prefix=None)
        return writer.finish(Place()).digest

    one = digest([1, 2, 3], [False, True, True])
    assert one == digest([1, 2, 3], [False, True, True])
    assert one not in (digest([1, 2, 4], [False, True, True]), digest([1, 2, 3], [False, False, True]))


def test_examples_come_back_from_the_disk():
    examples = Examples([store(4), store(9)])
    assert len(examples) == 13 and examples.longest == 6
    for i in (0, 3, 4, 12, -1):
        row = (list(range(4)) + list(range(9)))[i]
        example = examples[i]
        assert example.ids.tolist() == list(range(row, row + 2 + row % 5)) and example.where == f"row {row}"
        assert example.targets.tolist() == [*example.ids[1:].tolist(), -100] and example.prefix == (
            row if row % 2 else None
        )
    assert examples.value(5) == ("row 1", 1) and len(examples[:3]) == 3 and len(list(examples)) == 13
    assert examples.take(np.arange(13)).digest() == examples.digest() != examples.take(np.arange(13)[::-1]).digest()


@QUICK
@given(
    questions=st.lists(st.integers(0, 2**64 - 1), min_size=3, max_size=60),
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    seed=st.integers(0, 2**31),
)
def test_no_question_stands_on_two_sides(questions, counts, seed):
    keys = np.array(questions, dtype=np.uint64)
    try:
        sides = split(keys, counts, seed)
    except DataError:
        assert len(set(questions)) < len(questions) or sum(counts) >= len(questions)
        return
    assert sorted(np.concatenate(sides).tolist()) == list(range(len(questions)))
    sets = [set(keys[side].tolist()) for side in sides]
    assert sum(map(len, sets)) == len(set.union(*sets))
    assert all(len(side) >= count for side, count in zip(sides[1:], counts, strict=True))
    if len(set(questions)) == len(questions):
        assert [len(side) for side in sides[1:]] == counts


def test_a_split_is_stable():
    """The order of the rows does not matter, and a tenth more rows move few."""
    keys = np.random.default_rng(0).integers(0, 2**63, 1100).astype(np.uint64)
    order = np.random.default_rng(1).permutation(1000)
    small = set(keys[split(keys[:1000], [50], 7)[1]].tolist())
    assert small == set(keys[order][split(keys[order], [50], 7)[1]].tolist())
    large = set(keys[split(keys, [55], 7)[1]].tolist())
    assert len(small & large) >= 45
    other = set(keys[split(keys[:1000], [50], 8)[1]].tolist())
    assert len(small & other) < 15
    # a resumed run, and a newer version, take out the same rows
    sides = [side.tolist() for side in split(np.arange(12, dtype=np.uint64), [3, 2], 7)]
    assert sides == [[0, 1, 2, 3, 9, 10, 11], [6, 7, 8], [4, 5]]


def test_counts_of_a_side():
    assert [count_of("val", text, 1000) for text in ("0.05", "1", "7")] == [50, 1, 7]
    for text in ("x", "-1", "0", "nan"):
        with pytest.raises(UsageError):
            count_of("val", text, 10)
    assert counts_of({"val": "0.5", "test": "4"}, 10) == [5, 4]
    with pytest.raises(DataError, match="would take 10 of 10 rows"):
        counts_of({"val": "0.5", "test": "5"}, 10)
    for text in ("10", "0.01", "0.99"):
        with pytest.raises(DataError):
            count_of("val", text, 10)
