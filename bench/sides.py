"""The sides of a comparison: processes that stay alive, each in an interpreter of its own, asked in turn."""

import json
import statistics
import subprocess
from typing import Any


class Side:
    """A process that answers each line with a number by one line of JSON."""

    def __init__(self, name: str, command: list[str]):
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, number: int) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"side {self.name} stopped with exit code {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def spread(values: list[float], digits: int) -> str:
    """The median of values and their range."""
    low, middle, high = (f"{v:,.{digits}f}" for v in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high})"


def interpreters(given: list[str]) -> dict[str, str]:
    """NAME=PYTHON words as a dictionary."""
    return dict(word.split("=", 1) for word in given)
