"""What a rank says of another one that died, hangs, or was cut off: two watches in one process, over a store in memory."""

import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from torch.distributed import HashStore

from minilora.ranks import watch as module
from minilora.ranks.watch import Watch

TIMEOUT = 1.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the times."""
    for name in ("PERIOD", "DEAD", "GRACE"):
        monkeypatch.setattr(module, name, getattr(module, name) / 10)


class Store(HashStore):
    """A store that can be cut off: then it never answers."""

    def __init__(self) -> None:
        super().__init__()
        self.there = threading.Event()
        self.there.set()

    def check(self, keys: list[str]) -> bool:
        self.there.wait(20)
        return super().check(keys)

    def compare_set(self, *words: str) -> bytes:
        assert self.there.is_set()
        return super().compare_set(*words)


@pytest.fixture
def two() -> Iterator[tuple[Watch, Watch]]:
    """Ranks 0 and 1 on hosts a and b; the second reaches the store by a connection of its own."""
    shared = Store()
    watches = Watch(shared, 0, ["a", "b"], TIMEOUT), Watch(shared, 1, ["a", "b"], TIMEOUT)
    for watch in watches:
        watch.start()
    yield watches
    shared.there.set()
    for watch in watches:
        watch.end()


def failure(watch: Watch, seconds: float = 10.0) -> str:
    """What it says once it has failed."""
    assert watch.failed.wait(seconds), "it did not fail"
    watch.notice()
    return watch.failure


def test_a_rank_without_signs_is_named_with_its_host_and_place_before_the_timeout(two: tuple[Watch, Watch]):
    first, second = two
    second.begin("step 3, stream 2")
    time.sleep(0.1)
    second.end()
    then = time.monotonic()
    assert "rank 1 on b gave no sign for" in failure(first) and "it was last seen: step 3, stream 2" in first.failure
    assert first.code == 10 and time.monotonic() - then < TIMEOUT


def test_a_rank_that_hangs_is_named_by_those_that_wait_for_it(two: tuple[Watch, Watch]):
    first, second = two
    second.begin("step 3, stream 2")
    first.wait()
    assert "rank 1 on b hangs or is cut off" in failure(first) and "step 3, stream 2" in first.failure


def test_a_rank_that_gets_on_is_waited_for(two: tuple[Watch, Watch]):
    first, second = two
    first.wait()
    for token in range(6):
        time.sleep(TIMEOUT / 4)
        second.begin(f"answering, token {token}")
    assert not first.failed.is_set()
    assert "rank 1 on b hangs" in failure(first)


def test_when_the_network_breaks_the_rank_that_is_gone_is_found_in_seconds(two: tuple[Watch, Watch]):
    first, second = two
    second.end()
    first.silence = first.timeout = 1e9
    first.diagnose()
    assert "rank 1 on b died (at the start)" in first.failure


def test_a_rank_that_ends_by_itself_gives_its_code_and_says_why_itself(two: tuple[Watch, Watch]):
    first, second = two
    second.store.set("ended/1", "5")
    assert failure(first) == "" and first.code == 5


def test_a_store_that_never_answers_does_not_keep_the_judge(two: tuple[Watch, Watch], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    first, second = two
    assert isinstance(second.store, Store)
    second.store.there.clear()
    assert failure(second) == "b cannot reach torchrun on a (at the start)"
    assert second.speaks() and failure(first) == "a cannot reach torchrun on a (at the start)"


def test_one_rank_speaks(two: tuple[Watch, Watch]):
    assert [watch.speaks() for watch in (*two, *two)] == [True, False, True, False]


def test_ranks_do_not_outlive_torchrun(two: tuple[Watch, Watch], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert failure(two[0]) == "torchrun, which started this rank, was killed"


def test_a_main_thread_that_never_comes_back_is_ended_after_the_message(
    two: tuple[Watch, Watch], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """On a GPU it waits for what the lost rank would have sent."""
    codes: list[int] = []
    ended: Callable[[int], object] = codes.append
    monkeypatch.setattr(os, "_exit", ended)
    two[1].end()
    two[0].join(10)
    assert codes == [10] and "error: rank 1 on b gave no sign" in capsys.readouterr().err
