"""Compile every kernel launch of every operation for sm_80 and sm_90, without a GPU, and print what it needs.

    PYTHONPATH=. python tests/compiled.py > tests/compiled.json

The launches are recorded from the operations themselves, on tensors without data: what is compiled here, with which hints
and how many warps, is what a GPU would run.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minilora.kernels import rms_norm, rope, swiglu
from minilora.kernels.dispatch import use_triton

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
TOKENS = 4099  # not a multiple of 16: no size that varies may be taken for aligned
# sizes that models have, with one launch for each configuration: the operation, its example's sizes and form, what is trained
GLM = {"rotated": 64, "interleaved": True}
CALLS: dict[str, tuple[Callable, Callable, tuple[int, ...], dict[str, Any], tuple[int, ...]]] = {
    "rms_norm 128 frozen": (rms_norm.rms_norm, rms_norm.example, (128,), {}, (0,)),
    "rms_norm 896 trained": (rms_norm.rms_norm, rms_norm.example, (896,), {}, (0, 1)),
    "rms_norm 2048 trained": (rms_norm.rms_norm, rms_norm.example, (2048,), {}, (0, 1)),
    "rms_norm 3584 frozen": (rms_norm.rms_norm, rms_norm.example, (3584,), {}, (0,)),
    "rms_norm 3584 trained": (rms_norm.rms_norm, rms_norm.example, (3584,), {}, (0, 1)),
    "rms_norm 4096 once": (rms_norm.rms_norm, rms_norm.example, (4096,), {"once": True}, (0,)),
    "rms_norm 8192 frozen": (rms_norm.rms_norm, rms_norm.example, (8192,), {}, (0,)),
    "rms_norm 8192 trained": (rms_norm.rms_norm, rms_norm.example, (8192,), {}, (0, 1)),
    "add_rms_norm 896 frozen": (rms_norm.add_rms_norm, rms_norm.add_example, (896,), {}, (0, 1)),
    "add_rms_norm 3584 frozen": (rms_norm.add_rms_norm, rms_norm.add_example, (3584,), {}, (0, 1)),
    "add_rms_norm 4096 once": (rms_norm.add_rms_norm, rms_norm.add_example, (4096,), {"once": True}, (0, 1)),
    "add_rms_norm 8192 trained": (rms_norm.add_rms_norm, rms_norm.add_example, (8192,), {}, (0, 1, 2)),
    "swiglu 4864": (swiglu.swiglu, swiglu.example, (4864,), {}, (0, 1)),
    "rope 2x64": (rope.rope, rope.example, (2, 64), {}, (0,)),
    "rope 28x128": (rope.rope, rope.example, (28, 128), {}, (0,)),
    "rope 32x128 of which 64 interleaved": (rope.rope, rope.example, (32, 128), GLM, (0,)),
}


class Recorder:
    """Stands where a kernel stands and keeps what it is launched with."""

    def __init__(self, kernel: Any, launches: list[Any]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int]) -> Any:
        assert len(grid) == 1, "one dimension: the others end at 65535"
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


def launches(name: str, dtype: torch.dtype) -> list[Any]:
    """(kernel, arguments, options) of the forward and of the backward of one call."""
    op, example, sizes, form, trained = CALLS[name]
    found: list[Any] = []
    module = vars(sys.modules[op.__module__])
    before = {name: kernel for name, kernel in module.items() if name.endswith("_kernel")} | {"use_triton": use_triton}
    args = example(TOKENS, *sizes, dtype, "meta", **form)[0]
    leaves = [a.requires_grad_(i in trained) if isinstance(a, torch.Tensor) else a for i, a in enumerate(args)]
    module.update({name: Recorder(kernel, found) for name, kernel in before.items()}, use_triton=lambda *_: True)
    try:
        out = op(*leaves)
        outputs = out if isinstance(out, tuple) else (out,)
        torch.autograd.backward(outputs, [torch.empty_like(o) for o in outputs])
    finally:
        module.update(before)
    assert len(found) == 2, "a forward and a backward"
    return found


def specialised(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[ASTSource, dict[str, Any]]:
    """What the just-in-time compiler makes of a launch: ints that are 1, or multiples of 16; memory aligned to 16 bytes."""
    given = dict(zip(kernel.arg_names, args, strict=False))
    given |= {k: v for k, v in options.items() if k in kernel.arg_names}
    signature, constants, hints = {}, {}, {}
    for p in kernel.params:
        value, hint = given[p.name], not p.do_not_specialize
        if p.is_constexpr or value is None or (hint and isinstance(value, int) and value == 1):
            signature[p.name], constants[(p.num,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[p.name] = "*" + NAMES[value.dtype]
        else:
            signature[p.name] = "fp32" if isinstance(value, float) else "i32"
            hint = hint and not p.do_not_specialize_on_alignment and isinstance(value, int) and value % 16 == 0
        if hint:
            hints[(p.num,)] = [["tt.divisibility", 16]]
    rest = {k: v for k, v in options.items() if k not in kernel.arg_names}
    return ASTSource(kernel, signature, constants, hints), rest


def usage(cubin: bytes) -> dict[str, int]:
    """Registers and stack bytes by the cuobjdump that comes with triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(found["REG"]), "spills": int(found["STACK"]) + int(found["LOCAL"])}


def table() -> dict[str, dict[str, int]]:
    rows, seen = {}, set()
    for name in CALLS:
        for dtype in (torch.bfloat16, torch.float16):
            both = zip(("forward", "backward"), launches(name, dtype), strict=True)
            for phase, (kernel, args, options) in both:
                source, rest = specialised(kernel, args, options)
                if (source.hash(), rest["num_warps"]) in seen:
                    continue
                seen.add((source.hash(), rest["num_warps"]))
                for arch in (80, 90):
                    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=rest)
                    threads = 32 * rest["num_warps"]
                    wide = len(re.findall(r"ld\.global\S*\.v[248]\.b(32|64)", made.asm["ptx"]))
                    key = f"{name} {phase} {NAMES[dtype]} sm_{arch}"
                    rows[key] = {
                        **usage(made.asm["cubin"]),
                        "shared": made.metadata.shared,
                        "threads": threads,
                        "wide_loads": wide,
                    }
    return rows


if __name__ == "__main__":
    lines = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in table().items()]
    print(f'{{"triton": "{triton.__version__}", "kernels": {{', ",\n".join(lines), "}}", sep="\n")
