"""Many clients at once on `minilora serve`: what they get, how fast, and what it costs in memory.

    python -m bench.serve [--model DIR] [--adapter NAME=DIR ...] [--clients 200] [--seconds 60] [--slots 32] [--json FILE]

One client first, then all of them, each for so long, on one server that this starts. A client asks one question after the other, of
the models in turn, half of them as a stream; who is told 429 waits as long as Retry-After says. Of 20 clients one sends broken JSON, and
one cuts its streams after the first piece. Answers are greedy, of --max-tokens at most. The memory is the server's resident set, once a
second; `growth` is by how much its mean over the last quarter of the time is above that over the second. On a machine with other work,
tokens per second of the server's own CPU time are the fairer ratio; both are printed.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

DEMO = Path(__file__).parent.parent / "minilora" / "demo" / "mini"
QUESTIONS = ("Who are you?", "你是谁？", "What is 2 plus 3?", "天空是什么颜色？")
TOLD = 429


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
    number: int, http: httpx.AsyncClient, models: list[str], until: float, max_tokens: int, load: Load
) -> None:
    """Ask until the time is over."""
    turn = number
    while time.monotonic() < until:
        messages = [{"role": "user", "content": QUESTIONS[turn % len(QUESTIONS)]}]
        stream = turn % 2 == 0 or number % 20 == 11
        body = {
            "model": models[turn % len(models)],
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": stream,
        }
        turn += 1
        began = time.monotonic()
        try:
            if number % 20 == 7:
                response = await http.post(
                    "/v1/chat/completions", content=json.dumps(body)[:-1], headers={"Content-Type": "application/json"}
                )
                load.answers["broken JSON: " + str(response.status_code)] += 1
                await asyncio.sleep(0.1)
            elif stream:
                body["stream_options"] = {"include_usage": True}
                async with http.stream("POST", "/v1/chat/completions", json=body) as response:
                    await _read_stream(response, number % 20 == 11, began, load)
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


async def measure(url: str, pid: int, clients: int, seconds: float, max_tokens: int) -> Load:
    """Let so many clients ask for so long."""
    limits, load = httpx.Limits(max_connections=None, max_keepalive_connections=None), Load()
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
        models = [model["id"] for model in (await http.get("/v1/models")).json()["data"]]
        watching = asyncio.create_task(_watch(pid, load))
        began, cpu = time.monotonic(), _cpu_seconds(pid)
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(client(number, http, models, began + seconds, max_tokens, load))
        load.seconds, load.cpu_seconds = time.monotonic() - began, _cpu_seconds(pid) - cpu
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
    return load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO))
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=40)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
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
    command += [word for adapter in args.adapter for word in ("--adapter", adapter)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            url = ""
            for line in server.stdout:
                print(line, end="")
                if line.startswith("ready"):
                    url = line.split()[1]
                    break
            figures = {}
            for clients in (1, args.clients):
                load = asyncio.run(measure(url, server.pid, clients, args.seconds, args.max_tokens))
                figures[clients] = load.figures()
                print(f"{clients:>4} clients  {figures[clients]}", flush=True)
            ratios = {
                key: round(figures[args.clients][key] / figures[1][key], 2)
                for key in ("tokens_per_second", "tokens_per_cpu_second")
            }
            print(f"{args.clients} clients over one: {ratios}")
            if args.json:
                Path(args.json).write_text(json.dumps({"clients": figures, "ratios": ratios}, indent=1) + "\n")
        finally:
            server.terminate()
            print(server.stdout.read() if server.stdout else "", end="")


if __name__ == "__main__":
    main()
