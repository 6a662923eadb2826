"""Runs of a folder over HTTP: what is there, events as metrics grow, and no page but those of the folder."""

import json
import os
import threading
from pathlib import Path

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

from served import make_run, running, step

from minilora.errors import DataError
from minilora.serve import runs
from minilora.serve.runs import MOST_POINTS, MOST_READ, Tail, thinned


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    make_run(root / "first", 5)
    make_run(root / "sweep" / "A & B?#")
    (root / "first" / "report.html").write_text("<p>a report</p>")
    (root / "compare.html").write_text("<p>a comparison</p>")
    (tmp_path / "secret.html").write_text("secret")
    (root / "way-out.html").symlink_to(tmp_path / "secret.html")
    return root


def test_the_runs_and_pages_of_a_folder(root):
    with running(None, root) as (url, _):
        found = httpx.get(url + "/runs").json()
        assert {run["name"]: (run["state"], run["step"], run["steps"]) for run in found["runs"]} == {
            "first": ("finished", 5, 5), "sweep/A & B?#": ("stopped", 3, 5),
        }  # fmt: skip
        assert sorted(found["pages"]) == ["compare.html", "first/report.html"]
        page = httpx.get(url + "/pages/first/report.html")
        assert page.text == "<p>a report</p>" and page.headers["content-security-policy"].startswith("sandbox")
        for other in (
            "way-out.html",
            "first/config.yaml",
            "../secret.html",
            "%2e%2e/secret.html",
            "first/../../secret.html",
        ):
            assert httpx.get(f"{url}/pages/{other}").status_code == 404, other
        assert httpx.get(url + "/runs/none/events").status_code == 404


def test_a_broken_run_takes_the_page_from_no_other(root, monkeypatch):
    make_run(root / "huge", 5)
    with open(root / "huge" / "metrics.jsonl", "a") as file:
        file.write(step(4, loss=0).replace('"loss": 0', f'"loss": {"9" * 400}'))
    (root / "huge" / "data.json").write_text(json.dumps({"steps": 10**400}))
    chinese = make_run(root / os.fsdecode("你".encode("gbk")), 5)
    (chinese / "report.html").write_text("<p>of a name in GBK</p>")
    make_run(root / "closed", 5)
    (root / "lost+found").mkdir()
    opened, listed = runs.open_file, Path.iterdir

    def no_file(path: Path, *more):
        if path == root / "closed" / "metrics.jsonl":
            raise DataError(f"{path} cannot be opened: Permission denied")
        return opened(path, *more)

    def no_folder(path: Path):
        if path == root / "lost+found":
            raise PermissionError(path)
        return listed(path)

    monkeypatch.setattr(runs, "open_file", no_file)
    monkeypatch.setattr(Path, "iterdir", no_folder)
    with running(None, root) as (url, _):
        found = httpx.get(url + "/runs").json()
        states = {run["name"]: (run["state"], run.get("loss"), run["steps"]) for run in found["runs"]}
        assert states == {
            "first": ("finished", 0.2, 5), "sweep/A & B?#": ("stopped", 1 / 3, 5), r"\xc4\xe3": ("finished", 0.2, 5),
            "huge": ("stopped", 0.2, None), "closed": ("unreadable", None, None),
        }  # fmt: skip
        assert httpx.get(url + r"/pages/\xc4\xe3/report.html").text == "<p>of a name in GBK</p>"
        for name, state in (("huge", "stopped"), (r"\xc4\xe3", "finished"), ("closed", "unreadable")):
            with httpx.stream("GET", f"{url}/runs/{name}/events") as response:
                line = next(line for line in response.iter_lines() if line.startswith("data: "))
            assert json.loads(line[6:])["state"]["state"] == state


def test_events_follow_a_run_that_grows_and_one_that_begins_again(root):
    run = root / "sweep" / "A & B?#"
    with running(None, root) as (url, _), httpx.stream("GET", url + "/runs/sweep/A%20%26%20B%3F%23/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = (json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: "))
        first = next(events)
        assert (
            first["anew"] and [p["step"] for p in first["points"]] == [1, 2, 3] and first["state"]["state"] == "stopped"
        )
        with open(run / "metrics.jsonl", "a") as file:
            file.write(step(4, grad_norm=float("nan"), val_loss=2.0) + step(5)[:9])  # the last line is not complete yet
        second = next(events)
        assert second["points"] == [{"step": 4, "loss": 0.25, "val_loss": 2.0, "lr": 0.1}] and not second["anew"]
        with open(run / "metrics.jsonl", "a") as file:
            file.write(step(5)[9:])
        third = next(events)
        assert [p["step"] for p in third["points"]] == [5] and third["state"]["state"] == "finished"
        (run / "new").write_text(step(1) + step(2))
        (run / "new").rename(run / "metrics.jsonl")  # as a resumed run writes it
        fourth = next(events)
        assert fourth["anew"] and [p["step"] for p in fourth["points"]] == [1, 2]


def test_a_server_that_ends_does_not_wait_for_who_watches(root):
    with running(None, root) as (url, _):
        begun = threading.Event()

        def watch():
            with httpx.stream("GET", url + "/runs/first/events") as response:
                for _ in response.iter_lines():
                    begun.set()

        watcher = threading.Thread(target=watch)
        watcher.start()
        begun.wait()
    watcher.join()  # and the server's thread was joined before: both came to an end


def test_a_long_past_comes_thinned():
    points = [{"step": n} | ({"val_loss": 1.0} if n % 1000 == 7 else {}) for n in range(1, 50_001)]
    found = thinned(points)
    assert MOST_POINTS <= len(found) < MOST_POINTS + 60 and found[0] == points[0] and found[-1] == points[-1]
    assert [p for p in found if "val_loss" in p] == [p for p in points if "val_loss" in p]
    assert thinned(points[:MOST_POINTS]) == points[:MOST_POINTS]


def test_a_file_that_is_not_there_yet(tmp_path):
    tail = Tail(tmp_path / "metrics.jsonl")
    assert tail.read() == (False, [])
    (tmp_path / "metrics.jsonl").write_bytes(b"one\ntw")
    assert tail.read() == (True, [b"one"]) and tail.read() == (False, [])
    os.truncate(tmp_path / "metrics.jsonl", 1 << 30)  # a hole, which takes no place on the disk
    for _ in range(3):
        assert tail.read() == (False, []) and len(tail._rest) <= MOST_READ
