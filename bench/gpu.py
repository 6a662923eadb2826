"""The whole verification and measurement on a GPU, in one command and one folder of results.

    python -m bench.gpu --out DIR [--minutes 10] [--toy]
    python -m bench.gpu --out DIR --prepare      compile all kernels beforehand, on a machine that needs no GPU

In this order: the machine and its measured roof, every operation against fp64 in bf16, the wide products at the sizes of Qwen2.5-7B, the
training steps of 7B and 0.5B with traces, those of 7B on all GPUs where there are several, the other kernels of 7B, streams of several
lengths, then fp16 and fp32 and other models; from 20 minutes on torch.compile of the peers and compute-sanitizer too. Each stage is a command of its own that writes each figure into DIR when it
is there; one that fails says so and the rest goes on, and what no longer fits the minutes is skipped and says so. summary.md has all
tables. No network, and no package beyond the engine's own; peers are measured where they are installed. --toy tries it all out in a minute
or so, also without a GPU: its figures mean nothing.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from torch.cuda import device_count

ROOT = Path(__file__).parent.parent
REPORTING = 20.0  # seconds that a stage has beyond its own deadline to end
SANITIZERS = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")


class Stage(NamedTuple):
    """A command that writes into `file`, with its share of the minutes; a timed one is told how many seconds it has."""

    title: str
    file: str
    share: float
    command: list[str]
    timed: bool = True


def stages(out: Path, minutes: float, toy: bool) -> list[Stage]:
    """What is run, the most telling first."""

    def bench(title: str, file: str, share: float, words: str, *more: str) -> Stage:
        command = [sys.executable, "-m", *f"bench.{words}".split(), *more, "--save", str(out / file)]
        return Stage(title, file, share, command)

    def step(title: str, file: str, share: float, words: str, *sides: str) -> Stage:
        chosen = ("--sides", *sides) if sides else ()
        return bench(title, file, share, f"step {words}", "--trace", str(out / "traces"), *chosen)

    machine = bench("Machine", "machine.json", 4, "roof")._replace(timed=False)
    if toy:
        return [
            machine,
            bench("Parity", "parity.json", 30, "proof.parity --toy --dtypes bfloat16"),
            bench("Kernels", "kernels.json", 20, "kernels --models toy --tokens 16 --rounds 1"),
            step("Training steps", "steps.json", 15, "--models toy --tokens 16 --document 8 --rounds 1"),
            bench(
                "One rank and two",
                "ranks.json",
                5,
                "ranks --models toy --ranks 1 2 --device cpu --tokens 16 --document 8 --rounds 1",
            ),
            *sanitized(10),
        ]
    most = ("minilora", "peft style")
    over_gpus = [bench("Qwen2.5-7B on one GPU and on all", "ranks.json", 8, "ranks --models qwen2.5-7b")] * (
        device_count() > 1
    )
    found = [
        machine,
        bench("Parity in bf16", "parity.json", 12, "proof.parity --dtypes bfloat16"),
        bench("The wide products of Qwen2.5-7B", "products.json", 10, "kernels --models qwen2.5-7b --only lora_ linear_"),
        step("Training steps of Qwen2.5-7B", "steps-7b.json", 18, "--models qwen2.5-7b"),
        *over_gpus,
        bench("Tiles of the Triton GEMMs", "tiles.json", 8, "tiles --time"),
        step("Training steps of Qwen2.5-0.5B", "steps-0.5b.json", 10, "--models qwen2.5-0.5b --tokens 2048 8192"),
        bench("The other kernels of Qwen2.5-7B", "kernels.json", 10, "kernels --models qwen2.5-7b", "--only", "attention", "rms_", "rope", ": swiglu", ": cross_"),
        step("Lengths of a stream", "lengths.json", 12, "--models qwen2.5-7b qwen2.5-0.5b qwen2.5-1.5b --tokens 1024 2048 4096", *most),
        bench("Parity in fp16 and fp32", "parity-rest.json", 12, "proof.parity --dtypes float16 float32"),
        bench("Kernels of other models", "kernels-rest.json", 12, "kernels --models qwen2.5-0.5b qwen3-8b glm-4-9b chatglm-6b --rounds 10"),
    ]  # fmt: skip
    if minutes >= 20:
        found += [
            bench("Kernels beside torch.compile", "compiled.json", 15, "kernels --models qwen2.5-7b --rounds 10 --compile"),
            step("A step under torch.compile", "steps-compiled.json", 10, "--models qwen2.5-0.5b", *most, "peft style, torch.compile"),
            *sanitized(20),
        ]  # fmt: skip
    return found


def sanitized(share: float) -> list[Stage]:
    """memcheck and racecheck, where compute-sanitizer is; everything in one process, that it sees."""
    found = next((path for name in SANITIZERS if (path := shutil.which(name))), None)
    words = f"-m bench.proof.parity --toy --alone --dtypes bfloat16 --lines {os.devnull}"
    return [
        Stage(
            f"compute-sanitizer {tool}",
            f"{tool}.log",
            share / 2,
            [found, "--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only",
             sys.executable, *words.split()],
            timed=False,
        )
        for tool in ("memcheck", "racecheck")
        if found
    ]  # fmt: skip


def run(stage: Stage, out: Path, seconds: float) -> tuple[str, str]:
    """(how it ended, its table, or what it printed)."""
    command = [*stage.command, *(["--seconds", f"{seconds:.0f}"] if stage.timed else [])]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache_of(out))}
    if stage.file.endswith(".log"):
        # without the allocator's pool a read past a tensor's end is one past an allocation's
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    start = time.monotonic()
    limit = seconds + (REPORTING if stage.timed else 0)
    with (out / stage.file).with_suffix(".log").open("w+") as log:
        # a session of its own: a stage that is stopped takes its workers with it
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit)
            end = "done" if code == 0 else f"**failed** with exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            end = "**stopped**: out of time"
        log.seek(0)
        said = log.read()
    end += f", {time.monotonic() - start:.0f} s"
    table = (out / stage.file).with_suffix(".md")
    if end.startswith("done") and table.exists():
        return end, table.read_text()
    if end.startswith("done") and not stage.file.endswith(".log"):
        return end, said
    # what is there of the table, and what the command said last
    last = "\n".join(["```", *said.splitlines()[-12:], "```"])
    return end, (table.read_text() + "\n" if table.exists() else "") + last


def cache_of(out: Path) -> Path:
    """Where Triton keeps what it compiled: --prepare fills it beforehand."""
    return out / "triton-cache"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=10.0, help="5, 10 or 30, or what there is (10)")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--prepare", action="store_true", help="compile the kernels into DIR, and measure nothing")
    args = parser.parse_args(argv)
    out: Path = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.prepare:
        words = ["--cache", str(cache_of(out)), *["--toy"] * args.toy]
        raise SystemExit(
            subprocess.run([sys.executable, "-m", "bench.proof.prepare", *words], cwd=ROOT, check=False).returncode
        )
    start, shares = time.monotonic(), 0.0
    planned = stages(out, args.minutes, args.toy)
    whole = sum(stage.share for stage in planned)
    parts, ends = [], []
    for stage in planned:
        shares += stage.share / whole
        # what earlier stages left is the next one's
        left = (
            start + 60 * args.minutes * shares - time.monotonic() - (REPORTING if stage.timed and not args.toy else 0)
        )
        end, said = run(stage, out, left) if left > 5 else ("skipped: no time was left", "")
        ends.append(f"| {stage.title} | {end} |")
        parts.append(f"## {stage.title}\n\n{end}\n\n{said}")
        print(ends[-1], flush=True)
        summary = ["# Results of bench.gpu", "", "| stage | how it ended |\n|---|---|", *ends, "", *parts]
        (out / "summary.md").write_text("\n".join(summary) + "\n")
    raise SystemExit(0 if all("| done" in end or "skipped" in end for end in ends) else 1)


if __name__ == "__main__":
    main()
