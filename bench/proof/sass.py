"""What one block of a compiled kernel needs of a multiprocessor, read from its machine code.

The main loop is the innermost loop with the most tensor-core work, else the one that loads the most, else the whole kernel. For one pass of it by one block, in clock cycles of the multiprocessor if nothing else stood in the way:

    tensor   multiply-adds / rate                   shared   bytes in and out of shared memory / 128, without bank conflicts
    issue    warp instructions / 4                  fp32     additions, products and fused ones / lanes
    special  exp2, rsqrt, conversions / 16 lanes    memory   bytes of global loads and stores / fair share of the memory's rate

The largest is what binds the kernel. The operands of a GEMM come from L2 many times over, so `memory` is left out there; of the
others it counts also what caches may serve (weights, angles).

Rates a clock and multiprocessor: CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions" (fp32, special) and the limits
of its "Technical Specifications per Compute Capability"; NVIDIA A100 and H100 architecture white papers: 312 and 989.4 dense bf16
TFLOP/s are 108 x 1.41 GHz x 1024 and 132 x 1.83 GHz x 2048 multiply-adds, memory 2039 and 3350 GB/s;
GA102 white paper, RTX A6000: 154.8 TFLOP/s are 84 x 1.80 GHz x 512 multiply-adds, memory 768 GB/s. The rate of sm_80 is
taken for the warp-wide HMMA on sm_90 too: it does not reach the rate of HGMMA, and none is published.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Card(NamedTuple):
    hmma: int  # multiply-adds a clock
    hgmma: int
    fp32: int  # lanes
    memory: float  # bytes a clock
    shared: int  # bytes that all blocks share; one block may have 1 KiB less
    special: int = 16  # lanes
    registers: int = 65536
    warps: int = 64
    blocks: int = 32


CARDS = {
    80: Card(1024, 0, 64, 2039e9 / (108 * 1.41e9), 164 * 1024),
    86: Card(512, 0, 128, 768e9 / (84 * 1.8e9), 100 * 1024, warps=48, blocks=16),
    90: Card(1024, 2048, 128, 3350e9 / (132 * 1.83e9), 228 * 1024),
}


@dataclass(frozen=True)
class Code:
    """The instructions of a kernel, in order, and its branches back: (first, last) instruction of every loop."""

    instructions: list[str]
    loops: list[tuple[int, int]]


def disassemble(cubin: bytes) -> tuple[Code, dict[str, int]]:
    """The code, and the registers and stack bytes of a thread, by the tools that come with triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text, needs = (
            subprocess.run([TOOLS / tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for tool, flag in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage"))
        )
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", needs))
    return parse(text), {"registers": int(found["REG"]), "spills": int(found["STACK"]) + int(found["LOCAL"])}


def parse(text: str) -> Code:
    """Code from a listing of nvdisasm."""
    instructions, labels, loops = [], {}, []
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;?$", line):
            branch = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", found[1])
            if branch and labels.get(branch[1], len(instructions)) < len(instructions):
                loops.append((labels[branch[1]], len(instructions)))
            if not found[1].startswith("NOP"):
                instructions.append(found[1])
    return Code(instructions, loops)


def operation(instruction: str) -> str:
    """The name with its modifiers, without the predicate."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def _width(op: str) -> int:
    """Bytes that one lane moves."""
    found = re.search(r"\.[US]?(8|16|64|128)\b(?!B)", op.replace("LTC128B", ""))
    return int(found[1]) // 8 if found else 4


def global_bytes(instructions: list[str]) -> int:
    """Of one warp."""
    ops = [operation(i) for i in instructions]
    return sum(32 * _width(op) for op in ops if op.split(".")[0] in ("LDG", "STG", "LDGSTS"))


def multiply_adds(instruction: str) -> int:
    """Of one warp; a quarter of those of the four warps that share an HGMMA."""
    op = operation(instruction)
    if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", op):
        return int(found[1]) * int(found[2]) * int(found[3]) // 4
    if found := re.match(r"HMMA\.(16)(8)(\d+)", op):
        return int(found[1]) * int(found[2]) * int(found[3]) * (2 if "TF32" in op else 1)
    return 0


def shared_bytes(instruction: str) -> float:
    """Of one warp."""
    op = operation(instruction)
    kind = op.split(".")[0]
    if instruction.startswith("@!PT"):
        return 0.0  # ptxas puts in loads that never run, to keep others apart
    if kind in ("LDSM", "STSM"):
        return 128.0 * int((re.search(r"\.M\w*88\.(\d)", op) or [0, 1])[1])
    if kind in ("LDS", "STS", "LDGSTS"):
        return 32.0 * _width(op)
    if kind == "SHFL":
        return 128.0
    if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", op):
        m, n, k = map(int, found.groups())
        first = 0 if re.search(r"HGMMA\S*\s+R\d+,\s*R\d+,\s*gdesc", instruction) else m * k  # from registers, or not
        return 2 * (first + n * k) / 4
    return 0.0


def main_loop(code: Code) -> list[str]:
    """The instructions of the main loop, or all."""
    bodies = [code.instructions[a : b + 1] for a, b in code.loops]
    if any(multiply_adds(i) for i in code.instructions):
        return max(bodies, key=lambda body: (sum(map(multiply_adds, body)), -len(body)), default=code.instructions)
    loaded = [global_bytes([i for i in body if operation(i).startswith("LD")]) for body in [code.instructions, *bodies]]
    # what only stores is for rows without a target; what loads little stands before or after the work
    worth = [(n, -len(body), body) for n, body in zip(loaded[1:], bodies, strict=True) if n > loaded[0] / 4]
    return max(worth)[2] if worth else code.instructions


def cycles(body: list[str], warps: int, arch: int, streams: bool) -> dict[str, int]:
    """Clock cycles of the multiprocessor that a block needs of every pipe for one pass of the body.

    `streams`: what it loads comes from memory and not, as the operands of a GEMM, from a cache that others filled.
    """
    card, ops = CARDS[arch], [operation(i) for i in body]
    kinds = Counter(op.split(".")[0] for op in ops)
    mma = {kind: sum(multiply_adds(i) for i in body if operation(i).startswith(kind)) for kind in ("HMMA", "HGMMA")}
    lanes = 32 * warps
    found = {
        "tensor": warps * (mma["HMMA"] / card.hmma + (mma["HGMMA"] / card.hgmma if card.hgmma else 0)),
        "shared": warps * sum(map(shared_bytes, body)) / 128,
        "issue": warps * len(body) / 4,
        "fp32": lanes * sum(kinds[kind] for kind in ("FADD", "FMUL", "FFMA")) / card.fp32,
        "special": lanes * sum(kinds[kind] for kind in ("MUFU", "I2F", "F2I", "F2F")) / card.special,
    }
    if streams:
        found["memory"] = warps * global_bytes(body) / card.memory
    return {kind: round(n) for kind, n in found.items()}


def blocks(registers: int, shared: int, warps: int, arch: int) -> int:
    """Blocks that one multiprocessor holds at a time: registers by 256 a warp, warps by 4, 1 KiB of shared memory kept for each."""
    card = CARDS[arch]
    a_warp = -(-registers * 32 // 256) * 256
    return min(
        card.registers // a_warp // 4 * 4 // warps, card.warps // warps, card.blocks, card.shared // (shared + 1024)
    )
