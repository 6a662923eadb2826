"""`minilora doctor`: what it finds on this machine, on one with eight GPUs that is planted, and what it says where something is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minilora.__main__ import main
from minilora.files import speed
from minilora.ranks import bandwidth
from minilora.ranks.bandwidth import AllReduce, timed_all_reduce
from minilora.ranks.ranks import Ranks
from minilora.ranks.scale import SHAPES
from minilora.tools import doctor
from minilora.tools.doctor import Finding, binds, diagnose, graphics, network, output, processor, software, text_of

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speed, "SIZE", 1 << 20)


def test_a_machine_where_nothing_is_wrong(tmp_path, capsys):
    assert main(["doctor", "--output", str(tmp_path / "runs" / "first")]) == 0
    out = capsys.readouterr().out
    names = [line[:8].strip() for line in out.splitlines()]
    assert [n for n in names if n] == ["has", "cpu", "gpu", "compute", "ranks", "files", "binds", "ready"]
    assert len(names) <= 24 and "2 over gloo: each sends" in out and f"{tmp_path}: " in out
    assert not list(tmp_path.iterdir())


def test_of_torchruns_ranks_the_first_tells_what_all_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "measure", lambda device: AllReduce(100, 1e-7))
    assert diagnose(tmp_path, ranks=Ranks(1, 4)) == []
    assert "4 over gloo: each sends 1.5 GB/s" in text_of(diagnose(tmp_path, ranks=Ranks(0, 4)))


@pytest.mark.long
def test_torchruns_ranks_are_those_that_are_measured(tmp_path):
    how = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=3",
        "-m",
        "minilora",
        "doctor",
        "--output",
        str(tmp_path),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *how], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("over gloo") == 1 and "3 over gloo: each sends" in done.stdout


# something is wrong


def test_a_folder_that_cannot_be_written(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "timed_all_reduce", lambda ranks, device: AllReduce(100, 0.1))
    assert main(["doctor", "--output", "/proc/runs/first"]) == 6
    assert "mend    nothing can be written to /proc: give another --output" in capsys.readouterr().out


def test_a_full_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "file_speed", lambda folder: doctor.FileSpeed(1e9, 1e9, 10**6))
    _, found = output(tmp_path)
    # three times the adapter of r=16 and AdamW's two numbers
    assert found.code == 6 and f"{3 * 12 * SHAPES['Qwen2.5-7B'].trained(16) / 1e9:.1f} GB" in found.mend


def test_triton_is_needed_where_gpus_are():
    assert (
        software(8, triton="no-such-package").code == 2 and "pip install triton" in software(8, "no-such-package").mend
    )
    assert software(0, triton="no-such-package")[2:] == ("", 0) and "no triton" in software(0, "no-such-package").text


def test_a_driver_that_torch_cannot_use(tmp_path, monkeypatch):
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n")
    for cuda, word in ((None, "built for CPUs"), ("12.9", "newer driver")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        (found,) = graphics(0, driver=driver)
        assert found.code == 2 and word in found.mend
    assert graphics(0, driver=tmp_path / "none") == [Finding("gpu", "none")]


def test_little_memory(monkeypatch):
    monkeypatch.setattr(doctor, "free_gb", lambda device: 0.5)
    assert processor().code == 7


def test_ranks_that_cannot_meet(monkeypatch):
    """In time, with a reason, and without a process that is left."""
    started = []
    popen = subprocess.Popen

    def start(*words, **how):
        started.append(popen(*words, **how))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(bandwidth, "TIMEOUT", 0.2)
    found = timed_all_reduce(2, "cpu")
    assert "did not meet" in found.failure and [p.poll() for p in started] == [-9, -9]
    line = network(found, 2, CPU)
    assert line.code == 10 and "GLOO_SOCKET_IFNAME" in line.mend
    assert "ranks" not in binds(1e12, found, None, 20).text.split("\n")[0].replace("a rank on", "")


def test_a_rank_that_fails_says_why():
    assert "cuda" in timed_all_reduce(1, "cuda").failure.lower()  # there is none


def test_what_is_wrong_comes_last_and_its_code_is_the_exit_code(monkeypatch, capsys):
    found = [Finding("a", "one\ntwo"), Finding("b", "three", "do this", 6), Finding("", "four", "do that", 7)]
    assert text_of(found).split("\n") == [
        "a       one",
        "        two",
        "b       three",
        "        four",
        "mend    do this",
        "        do that",
    ]
    monkeypatch.setattr(doctor, "diagnose", lambda *_: found)
    assert main(["doctor"]) == 6


# eight GPUs


@pytest.fixture
def eight(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "NVIDIA A800-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (int(79e9 - i * 1e9), int(85e9)))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda i, j: (i, j) != (0, 5))


def test_eight_gpus_on_a_line(eight):
    gpu, more, peers = graphics(8, asked=16)
    assert gpu.text.startswith("8 x NVIDIA A800-SXM4-80GB, sm_80") and "72 of 85 GB free" in gpu.text and not gpu.mend
    assert more.code == 2 and "--gpus 8" in more.mend
    assert "not between 0-5:" in peers.text and not peers.mend


def test_what_binds():
    """By the cost model: products at a rate, gradients in proportion to the buffer, memory if not even NF4 fits."""
    shape = SHAPES["Qwen2.5-7B"]
    rate, reduced = shape.flops(2048, 16) / 2.0, AllReduce(4 * shape.trained(16), 3.0)
    assert "gradients between ranks: a step" in binds(rate, reduced, None, 20).text
    assert "2 s of products, 3 s of gradients" in binds(rate, reduced, None, 20).text
    assert binds(rate, None, None, 20).text.startswith("products: ")
    assert binds(rate, None, None, 4).text.startswith("memory: ")
