"""What all tests have: one thread, and a CPU whose 16-bit products are slow, so that all compute in fp32 unless they say otherwise.

Tiny matrices gain nothing from two threads, and the last bits of a sum depend on their number. Measured rates of tiny products are
chance; here they are given.
"""

import gc
import os
from pathlib import Path

gc.disable()  # until all is collected: what is imported stays, and is not looked through again and again

import pytest
import torch

from minilora.machine import compute
from minilora.text import own_template

LONG_FILES = ("test_interpreter.py", "test_bench.py", "test_demo.py", "test_compile.py")
torch.set_num_threads(1)
# run by test_interpreter.py, in a process of their own
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["kernels/interpreter"]


@pytest.fixture(autouse=True)
def slow_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = compute.Rates(1e9, 1e10)
    monkeypatch.setattr(compute, "measured_rates", lambda k, n, stored: rates)


@pytest.fixture(autouse=True)
def cache_of_templates(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of templates that all tests of a session share, and not the user's."""
    folder = tmp_path_factory.getbasetemp() / "cache" / "templates"
    monkeypatch.setattr(own_template, "CACHE", folder)
    return folder


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # the library that Triton is bound with tells what is left at the end


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first, so that no worker of pytest-xdist ends with one while the others have nothing left."""
    items.sort(key=lambda item: item.path.name not in LONG_FILES)
