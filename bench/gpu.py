"""The whole verification and measurement on a GPU, in one command and one folder of results.

    python -m bench.gpu --out DIR [--minutes 10] [--toy]

In this order: the machine and its measured roof, every operation against fp64 in bf16, fp16 and fp32, compute-sanitizer's
memcheck and racecheck over the kernels at toy size where it is installed, the table of kernels, and the table of training
steps. Each stage is a command of its own that writes its file into DIR when it is done; one that fails is told and the rest
goes on, and what no longer fits the minutes is skipped and says so. summary.md has all tables. No network, and no package
beyond the engine's own. --toy tries it all out in a minute or so, also without a GPU: its figures mean nothing.
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

ROOT = Path(__file__).parent.parent
REPORTING = 20.0  # seconds that a stage has beyond its own deadline to write what it found
SANITIZERS = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")


class Stage(NamedTuple):
    """A command that writes into `file`, with its share of the minutes; a timed one is told how many seconds it has."""

    title: str
    file: str
    share: float
    command: list[str]
    timed: bool = True


def stages(out: Path, toy: bool) -> list[Stage]:
    """What is run, the most telling first."""
    python = [sys.executable, "-m"]

    def bench(title: str, file: str, share: float, module: str, *words: str) -> Stage:
        return Stage(title, file, share, [*python, f"bench.{module}", *words, "--save", str(out / file)])

    machine = bench("Machine", "machine.json", 0.05, "roof")._replace(timed=False)
    if toy:
        return [
            machine,
            bench("Parity", "parity.json", 0.35, "proof.parity", "--toy", "--dtypes", "bfloat16"),
            *sanitized(0.1),
            bench("Kernels", "kernels.json", 0.25, "kernels", "--models", "toy", "--tokens", "16", "--rounds", "1"),
            bench(
                "Training steps",
                "steps.json",
                0.15,
                "step",
                "--models",
                "toy",
                "--tokens",
                "16",
                "--document",
                "8",
                "--rounds",
                "1",
            ),
        ]
    rest = ("qwen2.5-0.5b", "qwen3-8b", "glm-4-9b", "chatglm-6b")
    return [
        machine,
        bench("Parity", "parity.json", 0.25, "proof.parity"),
        *sanitized(0.08),
        bench(
            "Kernels at the sizes of Qwen2.5-7B", "kernels.json", 0.22, "kernels", "--models", "qwen2.5-7b", "--compile"
        ),
        bench(
            "Training steps",
            "steps.json",
            0.2,
            "step",
            "--models",
            "qwen2.5-0.5b",
            "qwen2.5-7b",
            "qwen2.5-1.5b",
            "--compile",
            "qwen2.5-0.5b",
        ),
        bench("Kernels at other sizes", "kernels-rest.json", 0.12, "kernels", "--models", *rest, "--rounds", "10"),
    ]


def sanitized(share: float) -> list[Stage]:
    """memcheck and racecheck, where compute-sanitizer is; everything in one process, that it sees."""
    found = next((path for name in SANITIZERS if (path := shutil.which(name))), None)
    run = [
        sys.executable,
        "-m",
        "bench.proof.parity",
        "--toy",
        "--alone",
        "--dtypes",
        "bfloat16",
        "--lines",
        os.devnull,
    ]
    return [
        Stage(
            f"compute-sanitizer {tool}",
            f"{tool}.txt",
            share / 2,
            [found, "--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only", *run],
            timed=False,
        )
        for tool in ("memcheck", "racecheck")
        if found
    ]


def run(stage: Stage, out: Path, seconds: float) -> tuple[str, str]:
    """(how it ended, what it printed)."""
    command = [*stage.command, *(["--seconds", f"{seconds:.0f}"] if stage.timed else [])]
    # without the allocator's pool a read past a tensor's end is one past an allocation's
    plain = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if stage.file.endswith(".txt") else {}
    start = time.monotonic()
    limit = seconds + (REPORTING if stage.timed else 0)
    # a session of its own: a stage that is stopped takes its workers with it
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **plain},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=limit)
        end = "done" if process.returncode == 0 else f"**failed** with exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        end = "**stopped**: out of time"
    if stage.file.endswith(".txt"):
        (out / stage.file).write_text(said)
        said = "\n".join(["```", *said.splitlines()[-12:], "```"])
    return f"{end}, {time.monotonic() - start:.0f} s", said


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to see that everything runs")
    args = parser.parse_args(argv)
    out: Path = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    start, share = time.monotonic(), 0.0
    parts, ends = [], []
    for stage in stages(out, args.toy):
        share += stage.share
        # what earlier stages left is the next one's
        left = start + 60 * args.minutes * share - time.monotonic() - (REPORTING if stage.timed and not args.toy else 0)
        end, said = run(stage, out, left) if left > 5 else ("skipped: no time was left", "")
        ends.append(f"| {stage.title} | {end} |")
        parts.append(f"## {stage.title}\n\n{end}\n\n{said}")
        print(ends[-1], flush=True)
        summary = ["# Results of bench.gpu", "", "| stage | how it ended |\n|---|---|", *ends, "", *parts]
        (out / "summary.md").write_text("\n".join(summary) + "\n")
    raise SystemExit(0 if all("| done" in end or "skipped" in end for end in ends) else 1)


if __name__ == "__main__":
    main()
