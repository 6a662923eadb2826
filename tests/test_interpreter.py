"""The Triton kernels on the CPU: Triton's interpreter must be chosen before triton is imported, so in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent
# operations with kernels, by how their tests are called in tests/test_kernels.py
WITH_KERNELS = "rms_norm or swiglu or rope or cross_entropy or lora_linear and not of_any"  # ranks and shapes: in own


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["tests/interpreter", "-m", "not long"], id="own"),
        pytest.param(["tests/interpreter", "-m", "long"], id="own long", marks=pytest.mark.long),
        pytest.param(["tests/test_kernels.py", "tests/test_lora_linear_group.py", "-k", WITH_KERNELS], id="shared"),
    ],
)
def test_kernels_on_the_interpreter(arguments: list[str]):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
