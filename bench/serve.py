"""Many clients at once on `minilora serve`: what they get, how fast, and what it costs in memory; and other tools' batches beside it.

    python -m bench.serve [--model DIR] [--adapter NAME=DIR ...] [--clients 200] [--seconds 60] [--slots 32] [--save FILE]
                          [--side hf=PYTHON] [--side llama=PYTHON --gguf FILE] [--rounds 5] [--round-seconds 10]

One client first, then all of them, each for so long, on one server that this starts. A client asks one question after the other, of
the models in turn, half of them as a stream; who is told 429 waits as long as Retry-After says. Of 20 clients one sends broken JSON, and
one cuts its streams after the first piece. Answers are greedy, of --max-tokens at most. The memory is the server's resident set, once a
second; `growth` is by how much its mean over the last quarter of the time is above that over the second. On a machine with other work,
tokens per second of the server's own CPU time are the fairer ratio; both are printed.

With --side, rounds follow in which the server, under all clients, and each side take turns. A side has no server: it answers the same
prompts in batches of --slots in a process of its own (serve_side.py). `minilora` does so with our own decoder, `hf` with transformers'
generate, `llama` with llama.cpp's batches, on a GGUF file of the same model (minilora export --for gguf --type f32). All compute in
fp32 with as many threads, greedy, to the same stop ids and --max-tokens. In these rounds no client is rude. The clients run in this
process, on the cores of the server: that is in its seconds, and not in its CPU seconds.
"""

import argparse
import asyncio
import contextlib
import json
import operator
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch

from bench.roof import machine
from bench.sides import Side, interpreters, spread
from minilora.files.model_folder import ModelFolder
from minilora.sampling import read_generation
from minilora.text.tokenizer import load_tokenizer

SERVER = "minilora serve"
THREADS = "OMP_NUM_THREADS"
SIDE = Path(__file__).parent / "serve_side.py"
DEMO = Path(__file__).parent.parent / "minilora" / "demo" / "mini"
QUESTIONS = ("Who are you?", "你是谁？", "What is 2 plus 3?", "天空是什么颜色？")
TOLD = 429
BREAKS, CUTS = 7, 11  # which of 20 clients sends broken JSON, and which cuts its streams


@dataclass
class Load:
    """What the clients got."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of the server
    tokens: int = 0
    answers: Counter[str] = field(default_factory=Counter)  # by status, or by what went wrong
    waits: list[float] = field(default_factory=list)  # seconds of each answer, or to the first piece of a stream
    memory: list[float] = field(default_factory=list)  # MB, once a second

    def figures(self) -> dict[str, Any]:
        quarter = max(len(self.memory) // 4, 1)
        early, late = (
            statistics.mean(self.memory[quarter : 2 * quarter] or self.memory),
            statistics.mean(self.memory[-quarter:]),
        )
        return {
            "seconds": round(self.seconds, 1), "tokens_per_second": round(self.tokens / self.seconds, 1),
            "tokens_per_cpu_second": round(self.tokens / self.cpu_seconds, 1), "answers": dict(self.answers),
            "median_wait": round(statistics.median(self.waits), 3) if self.waits else None,
            "memory_mb": round(late, 1), "growth_mb": round(late - early, 1),
        }  # fmt: skip


async def client(
    number: int,
    http: httpx.AsyncClient,
    models: list[str],
    until: float,
    max_tokens: int,
    load: Load,
    rude: bool = True,
) -> None:
    """Ask until the time is over; if some are rude, by its number this one may be."""
    manners = number % 20 if rude else 0
    turn = number
    while time.monotonic() < until:
        messages = [{"role": "user", "content": QUESTIONS[turn % len(QUESTIONS)]}]
        stream = turn % 2 == 0 or manners == CUTS
        body = {
            "model": models[turn % len(models)],
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": 0,
            "repetition_penalty": 1,
            "stream": stream,
        }
        turn += 1
        began = time.monotonic()
        try:
            if manners == BREAKS:
                response = await http.post(
                    "/v1/chat/completions", content=json.dumps(body)[:-1], headers={"Content-Type": "application/json"}
                )
                load.answers["broken JSON: " + str(response.status_code)] += 1
                await asyncio.sleep(0.1)
            elif stream:
                body["stream_options"] = {"include_usage": True}
                async with http.stream("POST", "/v1/chat/completions", json=body) as response:
                    await _read_stream(response, manners == CUTS, began, load)
            else:
                response = await http.post("/v1/chat/completions", json=body)
                load.answers[str(response.status_code)] += 1
                if response.status_code == 200:
                    load.tokens += response.json()["usage"]["completion_tokens"]
                    load.waits.append(time.monotonic() - began)
            if response.status_code == TOLD:
                await asyncio.sleep(float(response.headers["Retry-After"]))
        except httpx.HTTPError as error:
            load.answers[type(error).__name__] += 1


async def _read_stream(response: httpx.Response, cut: bool, began: float, load: Load) -> None:
    """Read a stream to its end, or cut it after the first piece."""
    if response.status_code != 200:
        load.answers[str(response.status_code)] += 1
        return
    first, done = True, False
    async for line in response.aiter_lines():
        if not line.startswith("data: "):
            continue
        done = line == "data: [DONE]"
        chunk = {} if done else json.loads(line[6:])
        load.tokens += (chunk.get("usage") or {}).get("completion_tokens", 0)
        if first and any(choice["delta"].get("content") for choice in chunk.get("choices", [])):
            load.waits.append(time.monotonic() - began)
            first = False
            if cut:
                load.answers["cut"] += 1
                return
        if "error" in chunk:
            load.answers["error in a stream"] += 1
            return
    load.answers["200" if done else "a stream without an end"] += 1


async def _watch(pid: int, load: Load) -> None:
    while True:
        status = Path(f"/proc/{pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+)", status)
        load.memory.append(int(found[1]) / 1024 if found else 0.0)
        await asyncio.sleep(1)


def _cpu_seconds(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


async def measure(url: str, pid: int, clients: int, seconds: float, max_tokens: int, rude: bool = True) -> Load:
    """Let so many clients ask for so long."""
    limits, load = httpx.Limits(max_connections=None, max_keepalive_connections=None), Load()
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
        models = [model["id"] for model in (await http.get("/v1/models")).json()["data"]]
        watching = asyncio.create_task(_watch(pid, load))
        began, cpu = time.monotonic(), _cpu_seconds(pid)
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(client(number, http, models, began + seconds, max_tokens, load, rude))
        load.seconds, load.cpu_seconds = time.monotonic() - began, _cpu_seconds(pid) - cpu
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
    return load


def job_of(model: str, slots: int, max_tokens: int) -> dict[str, Any]:
    """What the sides answer: the clients' prompts as the server renders them, and where an answer ends."""
    folder = ModelFolder(model)
    tokenizer = load_tokenizer(folder)
    prompts = [tokenizer.render([{"role": "user", "content": text}], prompt=True)[0] for text in QUESTIONS]
    stop = sorted(tokenizer.stop_ids | read_generation(folder)[1])
    return {
        "prompts": prompts, "stop": stop, "max_tokens": max_tokens, "slots": slots, "threads": int(os.environ[THREADS]),
    }  # fmt: skip


def beside(args: argparse.Namespace, url: str, pid: int) -> dict[str, Any]:
    """Rounds of the server and of every side in turn: tokens a second, CPU milliseconds a token, and whose tokens are ours."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file, contextlib.ExitStack() as stack:
        json.dump(job_of(args.model, args.slots, args.max_tokens), file)
        file.flush()

        def served() -> dict[str, Any]:
            load = asyncio.run(measure(url, pid, args.clients, args.round_seconds, args.max_tokens, rude=False))
            return {"seconds": load.seconds, "cpu_seconds": load.cpu_seconds, "tokens": load.tokens}

        turns = {SERVER: served}
        for name, python in ({"minilora": sys.executable} | interpreters(args.side)).items():
            path = args.gguf if name == "llama" else args.model
            side = Side(name, [python, str(SIDE), name, "--model", path, "--job", file.name])
            stack.callback(side.close)
            side.ask(1)  # warm up
            turns[name] = partial(side.ask, args.round_seconds)
        costs: dict[str, list[dict[str, Any]]] = {name: [] for name in turns}
        for r in range(args.rounds):
            for name in [*turns][:: 1 if r % 2 else -1]:
                costs[name].append(turns[name]())
                print(f"round {r + 1}: {name} {costs[name][-1] | {'answers': None}}", flush=True)
    ours = costs["minilora"][0]["answers"]
    return {
        name: {
            "tokens_per_second": [c["tokens"] / c["seconds"] for c in rounds],
            "cpu_ms_per_token": [1e3 * c["cpu_seconds"] / c["tokens"] for c in rounds],
        } | ({"same_answers": sum(map(operator.eq, rounds[0]["answers"], ours)) / len(ours)} if name != SERVER else {})
        for name, rounds in costs.items()
    }  # fmt: skip


def report(sides: dict[str, Any]) -> str:
    """A table of the sides, and the server's ratio to each."""
    lines = ["| | tokens/s, median (range) | CPU ms a token | answers equal to minilora's |", "|---|---|---|---|"]
    for name, side in sides.items():
        same = f"{side['same_answers']:.0%}" if "same_answers" in side else ""
        speed, cost = spread(side["tokens_per_second"], 1), spread(side["cpu_ms_per_token"], 2)
        lines.append(f"| {name} | {speed} | {cost} | {same} |")
    for name in [name for name in sides if name != SERVER]:
        ratios = [
            spread([a / b for a, b in zip(sides[over][key], sides[under][key], strict=True)], 2)
            for key, over, under in (("tokens_per_second", SERVER, name), ("cpu_ms_per_token", name, SERVER))
        ]
        lines.append(f"| {SERVER} / {name} | {ratios[0]} | {ratios[1]}, tokens per CPU second | |")
    return "\n".join(lines)


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO))
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=40)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--side", action="append", default=[], metavar="NAME=PYTHON", help="hf or llama, and its interpreter"
    )
    parser.add_argument("--gguf", default="", help="the model for llama.cpp")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--round-seconds", type=float, default=10)
    parser.add_argument(
        "--save", metavar="FILE", help="write the figures to this json file, beside those of other models"
    )
    return parser


@contextlib.contextmanager
def server_of(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """The address and the process of `minilora serve`; its header is printed."""
    command = [
        sys.executable,
        "-u",
        "-m",
        "minilora",
        "serve",
        "--model",
        args.model,
        "--port",
        "0",
        "--slots",
        str(args.slots),
    ]
    command += ["--device", "cpu", *(word for adapter in args.adapter for word in ("--adapter", adapter))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        try:
            for line in server.stdout:
                print(line, end="")
                if line.startswith("ready"):
                    yield line.split()[1], server.pid
                    break
        finally:
            server.terminate()
            print(server.stdout.read(), end="")


def main() -> None:
    parser = parser_of()
    args = parser.parse_args()
    if args.side and args.adapter:
        parser.error("--side is for the base alone: leave --adapter out")
    os.environ[THREADS] = str(args.threads)
    load = [round(os.getloadavg()[0], 2)]
    with server_of(args) as (url, pid):
        figures = {}
        for clients in (1, args.clients):
            figures[clients] = asyncio.run(measure(url, pid, clients, args.seconds, args.max_tokens)).figures()
            print(f"{clients:>4} clients  {figures[clients]}", flush=True)
        ratios = {
            key: round(figures[args.clients][key] / figures[1][key], 2)
            for key in ("tokens_per_second", "tokens_per_cpu_second")
        }
        print(f"{args.clients} clients over one: {ratios}")
        found = {"clients": figures, "ratios": ratios, "slots": args.slots, "max_tokens": args.max_tokens}
        if args.side:
            found["sides"] = beside(args, url, pid)
            print(report(found["sides"]))
    if args.save:
        file = Path(args.save)
        before = json.loads(file.read_text()) if file.exists() else {}
        load.append(round(os.getloadavg()[0], 2))
        found["machine"] = machine(torch.device("cpu")) | {"threads": args.threads, "load_before_and_after": load}
        file.write_text(json.dumps(before | {Path(args.model).name: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
