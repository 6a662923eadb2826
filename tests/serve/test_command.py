"""`minilora serve` and `train --watch` as commands: what is refused before anything is loaded, and a good end on SIGTERM."""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_model, make_rows

from minilora.__main__ import main

MINI = Path(__file__).parents[2] / "minilora" / "demo" / "mini"


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ("serve", 2, "--model is missing"),
        ("serve --model none", 4, "none is not a folder"),
        (f"serve --model {MINI} --adapter none", 4, "none is not a folder"),
        (f"serve --model {MINI} --adapter a=x --adapter a=y", 2, "two adapters of the name 'a'"),
        (f"serve --model {MINI} --adapter =x", 2, "has no name"),
        (f"serve --model {MINI} --runs none", 2, "--runs is none, which is not a folder"),
        (f"serve --model {MINI} --host 0.0.0.0", 2, "there is no key"),
        (f"serve --model {MINI} --api-key schlüssel", 2, "a header cannot carry"),
        (f"serve --model {MINI} --slots 0", 2, "'0' is not a whole number from 1"),
    ],
)
def test_what_is_wrong_is_told_at_once(words, code, told, capsys, monkeypatch):
    monkeypatch.delenv("MINILORA_API_KEY", raising=False)
    assert main(words.split()) == code
    assert told in capsys.readouterr().err


def test_the_extra_is_named_where_it_is_missing(capsys, monkeypatch):
    monkeypatch.setattr("minilora.cli.serve.find_spec", lambda name: None)
    assert main(["serve", "--model", str(MINI)]) == 2
    assert "pip install 'minilora[serve]'" in capsys.readouterr().err


def served():
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    return pytest.importorskip("httpx")


def start(*words: object) -> tuple[subprocess.Popen, dict[str, str]]:
    """A command, and the lines of its header by their first words, up to the address."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "minilora", *map(str, words)], stdout=subprocess.PIPE, text=True
    )
    lines = {}
    assert process.stdout
    for line in process.stdout:
        name, _, rest = line.partition(" ")
        lines[name] = rest.strip()
        if name in ("ready", "watch"):
            break
    return process, lines


def test_it_ends_in_good_order(tmp_path):
    """SIGTERM: no traceback, exit code 0; what was being written is written to its end."""
    httpx = served()
    process, lines = start(
        "serve", "--model", make_model(tmp_path / "tiny"), "--port", 0, "--context", 200, "--device", "cpu"
    )
    with process:
        url = lines["ready"].split()[0]
        body = {"model": "tiny", "prompt": "hello", "max_tokens": 150, "stream": True}
        with httpx.stream("POST", url + "/v1/completions", json=body) as response:
            pieces = response.iter_lines()
            assert next(pieces).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            rest = [line for line in pieces if line]
        assert rest[-1] == "data: [DONE]" and json.loads(rest[-2][6:])["choices"][0]["finish_reason"] in (
            "length",
            "stop",
        )
        assert "after 1 answers" in process.communicate()[0] and process.returncode == 0
    assert lines["models"] == "tiny" and "up to 200 tokens each" in lines["slots"]


def test_what_needs_more_memory_than_there_is_is_refused(tmp_path, capsys, monkeypatch):
    served()
    monkeypatch.setattr("minilora.serve.server.free_gb", lambda device: 0.001)
    folder = make_model(tmp_path / "tiny")
    assert main(["serve", "--model", str(folder), "--port", "0", "--slots", "4096"]) == 7
    assert "a smaller --context" in capsys.readouterr().err
    assert main(["serve", "--model", str(folder), "--port", "0", "--context", "100000"]) == 2


def test_a_port_that_is_taken(capsys):
    served()
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert main(["serve", "--model", str(MINI), "--port", port]) == 2
        assert (
            main(
                [
                    "train",
                    "--model",
                    str(MINI),
                    "--data",
                    str(MINI.parent / "identity.json"),
                    "--output",
                    "x",
                    "--watch",
                    port,
                ]
            )
            == 2
        )
    assert capsys.readouterr().err.count("Address already in use") == 2 and not Path("x").exists()


def test_a_training_can_be_watched(tmp_path):
    httpx = served()
    words = [
        "--model",
        make_model(tmp_path / "tiny"),
        "--data",
        make_rows(tmp_path / "rows.json"),
        "--output",
        tmp_path / "run",
    ]
    process, lines = start("train", *words, "--epochs", 200, "--lora-r", 2, "--device", "cpu", "--watch", 0)
    with process:
        url = lines["watch"].split()[0]
        runs = []
        while not runs or "step" not in runs[0]:
            runs = httpx.get(url + "/runs").json()["runs"]
        assert runs[0]["name"] == "run" and runs[0]["state"] == "training"
        with httpx.stream("GET", url + "/runs/run/events") as response:
            event = json.loads(next(response.iter_lines())[6:])
        assert event["anew"] and event["points"][0]["step"] == 1
        assert httpx.get(url + "/v1/models").json()["data"] == []
        process.terminate()
        process.communicate()
        assert process.returncode == 75  # stopped and saved: the page does not hold it
