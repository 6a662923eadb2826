"""The benchmarks run, at toy size: what they measure is not asserted, that they measure is; and what they check can fail."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from tiny import make_model, make_rows
from torch import Tensor

from bench import operations, serve_side, timing, widen, workers
from bench.operations import Operation
from bench.proof import counted, parity
from bench.proof.traffic import Cost
from bench.shapes import MODELS
from minilora import load_model
from minilora.checkpoint.gguf import export_model
from minilora.generate import generate
from minilora.kernels import swiglu

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def bench(module: str, *words: str, **environment: str) -> str:
    """What a bench prints; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", f"bench.{module}", *words], cwd=ROOT, env={**os.environ, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_train_bench(tmp_path):
    model, rows = make_model(tmp_path / "model"), make_rows(tmp_path / "rows.json")
    words = [
        "--model",
        str(model),
        "--data",
        str(rows),
        "--rounds",
        "2",
        "--steps",
        "1",
        "--save",
        str(tmp_path / "out.json"),
    ]
    printed = bench("train", *words)
    result = json.loads((tmp_path / "out.json").read_text())["sides"]["minilora"]
    assert (
        len(result["tokens_per_second"]) == 2
        and len(result["losses"]) == 3
        and result["losses"][2] < result["losses"][0]
    )
    assert "| minilora |" in printed and "| minilora / limit |" in printed


def test_widening_is_timed_beside_its_product(capsys):
    threads = torch.get_num_threads()
    widen.main(["--shape", "128", "64", "--tokens", "4", "--rounds", "2"])
    torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["product", "nf4", "int8", "fp8"]
    assert all(" ms (" in line and line.endswith("%") for line in lines[1:])


@pytest.mark.parametrize("side", serve_side.SIDES)
def test_a_side_of_the_serving_bench_answers_in_batches_as_each_prompt_alone(tmp_path, side):
    """Five prompts of several lengths on two slots; one answer ends at a stop id, the others at the most tokens."""
    pytest.importorskip({"hf": "transformers", "llama": "llama_cpp"}.get(side, "torch"))
    folder = make_model(tmp_path / "model", num_attention_heads=2, vocab_size=264)
    model = load_model(folder, device="cpu")
    prompts = [list(range(5 * n, 6 * n + 3)) for n in range(5)]
    alone = [list(generate(model, prompt, set(), 6)) for prompt in prompts]
    stop = next(token for token in alone[0][1:] if token not in [i for ids in alone[1:] for i in ids])
    alone[0] = alone[0][: alone[0].index(stop)]
    if side == "llama":
        export_model(folder, tmp_path / "gguf")
        folder = tmp_path / "gguf" / "model.gguf"
    job = {"prompts": prompts, "stop": [stop], "max_tokens": 6, "slots": 2, "threads": 1}
    answered: list[int] = []
    for number, ids in serve_side.SIDES[side](str(folder), job)(lambda: len(answered) < 7):
        answered.append(number)
        assert ids == alone[number]
    assert set(answered) == set(range(5))


# the command for the day on which a GPU is there


def bad(printed: str) -> bool:
    skipped = any("skipped:" in line for line in printed.splitlines() if "is not installed" not in line)
    return skipped or any(word in printed for word in ("**failed**", "**wrong**", "**stopped**", "**no**"))


def fake_sanitizer(folder: Path) -> str:
    """A PATH on which compute-sanitizer runs what it is given, if for memcheck, and finds nothing."""
    tool = folder / "compute-sanitizer"
    folder.mkdir()
    tool.write_text('#!/bin/sh\n[ "$2" = memcheck ] || exit 0\nshift 6\n"$@" && echo "ERROR SUMMARY: 0 errors"\n')
    tool.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.long
def test_everything_that_a_gpu_would_run_on_torchs_paths(tmp_path: Path):
    out = tmp_path / "results"
    bench("gpu", "--toy", "--out", str(out), "--minutes", "600", PATH=fake_sanitizer(tmp_path / "bin"))
    summary = (out / "summary.md").read_text()
    assert not bad(summary), summary
    rows = json.loads((out / "parity.json").read_text())["rows"]
    assert len(rows) == len(list(parity.ragged())) and all(row["ok"] for row in rows)
    kernels = json.loads((out / "kernels.json").read_text())
    assert {"device", "torch", "triton", "commit"} <= set(kernels["machine"])
    assert all(row["sides"]["minilora"]["both"][0] > 0 for row in kernels["rows"])
    steps = {row["name"]: row for row in json.loads((out / "steps.json").read_text())["rows"]}
    losses = [row["loss"] for name, row in steps.items() if "loss" in row and "training" not in name]
    assert len(losses) >= 4 and max(losses) - min(losses) < 0.01  # the sides compute the same
    one, two = json.loads((out / "ranks.json").read_text())["rows"]
    assert 1.5 < two["tokens"] / one["tokens"] < 2.5 and two["bytes"] == one["bytes"] > 0
    assert all((out / "traces" / f"toy-16-{side}.json.gz").exists() for side in ("minilora", "peft-style"))
    assert (
        "ERROR SUMMARY: 0" in (out / "memcheck.log").read_text() and "| compute-sanitizer racecheck | done" in summary
    )


@pytest.mark.long
def test_everything_that_a_gpu_would_run_on_the_interpreter(tmp_path: Path):
    bench("gpu", "--toy", "--out", str(tmp_path), "--minutes", "9", TRITON_INTERPRET="1")
    assert not bad((tmp_path / "summary.md").read_text())


def test_a_budget_that_is_spent_skips_and_says_so(tmp_path: Path):
    bench("gpu", "--toy", "--out", str(tmp_path), "--minutes", "0.01")
    assert (tmp_path / "summary.md").read_text().count("skipped: no time was left") >= 4


# what the check of results finds


def compared(op: Any, trained: tuple[int, ...] = (0, 1)) -> dict[str, Any]:
    args, _ = swiglu.example(13, 101, torch.bfloat16)
    return parity.compare(Operation(op, swiglu.swiglu_ref, args, trained, Cost(0, 0, 0, 0)), "")


def test_parity_of_a_right_operation_and_of_wrong_ones():
    assert compared(swiglu.swiglu)["ok"]
    assert compared(swiglu.swiglu, ())["ok"]
    wrong = compared(lambda g, u: swiglu.swiglu(g, u) * 1.02)
    assert not wrong["ok"] and wrong["of the allowed"] > 1
    wrong = compared(lambda g, u: swiglu.swiglu(g, u) + 0 * g.nan_to_num().log())
    assert not wrong["ok"]
    backward = compared(lambda g, u: swiglu.swiglu(g, u) + 0.05 * (g - g.detach()))
    assert not backward["ok"] and backward["at"] == "gradient of argument 0"
    assert not compared(lambda g, u: swiglu.swiglu(g, u).float())["ok"]


def test_parity_sees_other_bits_and_written_inputs():
    calls = iter(range(100))
    moving = compared(lambda g, u: swiglu.swiglu(g, u) * (1 + next(calls) % 2 * 2**-20))
    assert moving["same bits twice"]  # too little for bf16
    moving = compared(lambda g, u: swiglu.swiglu(g, u) + next(calls) * 1e-2)
    assert not moving["same bits twice"] and not moving["ok"]

    def writing(g: Tensor, u: Tensor) -> Tensor:
        out = swiglu.swiglu(g, u)
        g.data[0, 0] += 1
        return out

    assert not compared(writing, ())["inputs untouched"]


# cases in processes of their own

WORKER = """
import os, sys, time
from pathlib import Path
from bench.workers import work

def case(name):
    if name == "dies":
        print("a last word")
        sys.stdout.flush()
        os._exit(3)
    if name == "hangs":
        time.sleep(600)
    if name == "raises":
        raise ValueError("no such thing")
    return {"found": len(name)}

lines, names = sys.argv[2], sys.argv[4:]
work(names, case, Path(lines))
"""


def rows_of(names: list[str], jobs: int = 1, seconds: float = 60.0) -> dict[str, workers.Row]:
    told: list[workers.Row] = []
    found = workers.in_workers([sys.executable, "-c", WORKER], names, jobs, seconds, told.append)
    assert sorted(r["name"] for r in told) == sorted(names) and list(found) == names
    return found


def test_a_case_that_takes_its_process_down_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    found = rows_of(["a", "dies", "raises", "bb"])
    assert found["a"]["found"] == 1 and found["bb"]["found"] == 2
    assert found["dies"]["failed"] == "a last word" and found["raises"]["failed"] == "ValueError: no such thing"


def test_a_case_that_hangs_is_ended_and_what_is_late_is_skipped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    found = rows_of(["a", "hangs", "b"], seconds=6)
    assert found["a"]["found"] == 1
    assert "skipped" in found["hangs"] and "skipped" in found["b"]


# bytes by counting


@pytest.mark.parametrize(
    "name, peer, ours, theirs",
    [("rms_norm", "hf", 1.0, 12.0), ("add_rms_norm", "hf", 1.0, 8.25), ("swiglu", "hf", 1.0, 1.75)],
)
def test_bytes_of_an_operation_are_those_that_its_launches_are_given(name: str, peer: str, ours: float, theirs: float):
    """The peers' multiples were counted before, with another tool."""
    pytest.importorskip("triton")
    entries = operations.of_model("qwen2.5-7b", MODELS["qwen2.5-7b"], 8192)
    operation = next(e for e in entries if e.op == name).make(torch.bfloat16, torch.device("meta"))
    mine, others = counted.moved(operation.op, operation, True), counted.moved(operation.peers[peer], operation, False)
    assert sum(mine) / operation.cost.total_bytes == pytest.approx(ours, rel=0.01)
    assert sum(others) / operation.cost.total_bytes == pytest.approx(theirs, rel=0.01)


# the day's kernels, compiled beforehand

SECOND = """
import sys, tempfile
from pathlib import Path
import torch
from bench.proof import prepare
from bench.proof.launches import as_if_on
from bench.proof.no_op_driver import NoOpDriver

checks = {check.name: check for check in prepare.ragged()}
with tempfile.TemporaryDirectory() as folder:
    driver = NoOpDriver(Path(folder), 90)
    with as_if_on(90):
        prepare.operation(checks[sys.argv[1]], torch.bfloat16, torch.device("cpu"))()
    assert driver.launches
"""


def test_what_is_prepared_a_second_process_does_not_compile(tmp_path: Path):
    pytest.importorskip("triton")
    if not (shutil.which("gcc") or shutil.which("cc")):
        pytest.skip("needs a C compiler")
    from bench.proof import prepare
    from bench.proof.launches import recorded

    check = next(c for c in prepare.ragged() if c.entry.op == "swiglu")
    with recorded(90) as made:
        prepare.operation(check, torch.bfloat16)()
    with knobs_cache(tmp_path):
        assert made and not any(prepare.compiled(launch, 90) for launch in made)

    def kernels() -> set[str]:
        return {str(path) for path in tmp_path.rglob("*.cubin")}

    def launch() -> None:
        environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", SECOND, check.name], check=True, cwd=ROOT, env=environment)

    there = kernels()
    launch()
    assert kernels() == there
    shutil.rmtree(tmp_path)
    launch()
    assert len(kernels()) == len(there)  # it would have compiled them


@contextmanager
def knobs_cache(folder: Path) -> Iterator[None]:
    from triton import knobs

    with knobs.cache.scope():
        knobs.cache.dir = str(folder)
        yield


@pytest.mark.long
def test_all_that_the_toy_day_launches_is_prepared(tmp_path: Path):
    pytest.importorskip("triton")
    assert "kernels compiled" in bench("gpu", "--toy", "--prepare", "--out", str(tmp_path))
    assert len(list(tmp_path.rglob("*.cubin"))) > 100


def test_every_launch_of_the_day_is_recorded_on_both_architectures():
    """On tensors without data, every path of every check: a call that does not fit a kernel shows here."""
    pytest.importorskip("triton")
    from bench.proof import prepare

    for architecture in (80, 90):
        assert len(prepare.distinct(architecture, toy=True)) > 50


# what a GPU is asked


def test_the_gpus_clock_and_counters_are_asked_by_their_names(monkeypatch: pytest.MonkeyPatch):
    """Stand-ins with the signatures of torch.cuda's, and tensors that are on a GPU but for their data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    asked = ("Event", "_sleep", "synchronize", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated")
    cuda = {name: create_autospec(getattr(torch.cuda, name)) for name in asked}
    for name, stand_in in cuda.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    cuda["Event"].return_value.elapsed_time.return_value = 2.0
    cuda["max_memory_allocated"].return_value, cuda["memory_allocated"].return_value = 30, 10
    device = torch.device("cuda")
    with FakeTensorMode():
        x = torch.empty(4, 4, device=device)
        assert timing.in_turn({"a": lambda: x @ x, "b": lambda: x + x}, device, 2)["a"].median == 0.002
        wall, host = timing.wall_and_host(lambda: x @ x, device, 3)
        assert wall.median >= host > 0 and cuda["synchronize"].called
        assert timing.peak_bytes(lambda: x @ x, device) == 20


def test_a_profile_counts_time_once_where_kernels_overlap():
    seen = timing.summed([("a", 0.0, 10.0), ("b", 5.0, 12.0), ("a", 20.0, 21.0)])
    assert seen.busy == pytest.approx(13e-6) and seen.launches == 3
    assert seen.kernels == [("a", 2, pytest.approx(11e-6)), ("b", 1, pytest.approx(7e-6))]
