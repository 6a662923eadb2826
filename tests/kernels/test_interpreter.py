"""The Triton kernels on the CPU: Triton's interpreter must be chosen before triton is imported, so in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
OWN = ROOT / "tests" / "kernels" / "interpreter"
# files that go through one process: it takes seconds to start
TOGETHER = [
    ["test_families.py", "test_benches.py"],
    ["test_lora_linear.py", "test_fp8_rows.py", "test_far.py"],
    ["test_shadow.py", "test_shadow_wide.py"],
    ["test_cross_entropy.py", "test_row_kernels.py", "test_kernel_paths.py"],
    ["test_dequantize.py", "test_experts.py"],
]
SHARED = ["tests/kernels/test_kernels.py", "tests/kernels/test_lora_linear_group.py"]
# what own has in another form, or for many minutes: derivatives by differences, bits of two calls, a whole vocabulary, bf16, layouts
SLOW = "gradcheck or same_call_twice or real_vocabulary or bfloat16 or rope_partial or rope_interleaved"
# operations with kernels, by how their tests are called there; ranks and shapes of LoRA are in own
ROWS = "rms_norm or swiglu or rope"
WIDE = "not (rms_norm or swiglu or rope) and (cross_entropy or lora_linear and not of_any)"


@pytest.mark.parametrize(
    "arguments",
    [
        *(pytest.param([*(str(OWN / name) for name in names), "-m", "not long"], id=names[0]) for names in TOGETHER),
        pytest.param([str(OWN), "-m", "long"], id="own long", marks=pytest.mark.long),
        pytest.param([*SHARED, "-k", f"({ROWS}) and not ({SLOW})"], id="shared rows"),
        pytest.param([*SHARED, "-k", f"({WIDE}) and not ({SLOW})"], id="shared wide"),
        pytest.param([*SHARED, "-k", f"({ROWS} or {WIDE}) and ({SLOW})"], id="shared long", marks=pytest.mark.long),
        pytest.param(["tests/kernels/test_lora_mlp.py"], id="shared mlp"),
    ],
)
def test_kernels_on_the_interpreter(arguments: list[str]):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


def test_every_file_goes_through_it():
    assert {name for names in TOGETHER for name in names} == {path.name for path in OWN.glob("test_*.py")}
