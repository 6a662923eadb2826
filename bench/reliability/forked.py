"""A fork server: torch is imported once, and each trial is a fork that runs one command as the shell would and ends."""

import gc
import io
import os
import pickle
import select
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from minilora import __main__ as command_line
from minilora.checkpoint import convert, unpickle
from minilora.files.atomic import write_file
from minilora.machine import compute
from minilora.run import ending, step
from minilora.text import own_template

KILLED = -signal.SIGKILL


class Ended(NamedTuple):
    code: int  # minus the number of the signal that ended it
    said: str  # on both streams


class Child(NamedTuple):
    pid: int
    screen: int  # a file in memory

    def wait(self) -> Ended:
        _, status = os.waitpid(self.pid, 0)
        size = os.fstat(self.screen).st_size
        said = os.pread(self.screen, size, 0).decode("utf-8", "replace")
        os.close(self.screen)
        return Ended(os.waitstatus_to_exitcode(status), said)


def start(call: Callable[[], int]) -> Child:
    """A fork that ends with the exit code which `call` returns."""
    screen = os.memfd_create("screen")
    pid = os.fork()
    if pid:
        return Child(pid, screen)
    try:
        gc.freeze()  # what was there before is not looked through, and so not copied
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background may ignore it
        for stream in (1, 2):
            os.dup2(screen, stream)
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", closefd=False) for stream in (1, 2))
        code = call()
        sys.stdout.flush()
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:  # noqa: BLE001 a fork never returns
        traceback.print_exc()
        code = 99
    sys.stderr.flush()
    os._exit(code)


def run(call: Callable[[], int]) -> Ended:
    return start(call).wait()


def returned(call: Callable[[], Any]) -> Any:
    """What a call returns in a fork."""
    with tempfile.TemporaryFile() as file:

        def to_file() -> int:
            pickle.dump(call(), file)
            file.flush()
            return 0

        ended = run(to_file)
        assert ended.code == 0, ended
        file.seek(0)
        return pickle.load(file)


def killed_after(seconds: float, call: Callable[[], int]) -> Ended:
    """SIGKILL after so many seconds, if it has not ended by then."""
    child = start(call)
    ended = os.pidfd_open(child.pid)
    select.select([ended], [], [], seconds)
    os.close(ended)
    os.kill(child.pid, signal.SIGKILL)
    return child.wait()


def command(words: list[str]) -> int:
    """One command of minilora, as `minilora WORDS` in a process of its own."""
    sys.argv = ["minilora", *words]
    return command_line.main()


def prepare(words: list[str]) -> None:
    """One command in this process, of which nothing is shown: what it imports is there in all later forks."""
    with redirect_stdout(io.StringIO()):
        assert command_line.main(words) == 0


@contextmanager
def workplace() -> Iterator[Path]:
    """A folder in memory, where a flush costs nothing and a kill leaves the same as on a disk. Meanwhile this process and its forks leave
    out what costs most of a tiny command: measured speeds, the picture, a second process that imports torch.
    """
    memory = Path("/dev/shm")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)))
        for module, name, stand_in in (
            (step, "peak_flops", lambda device, dtype: 1e10),
            (compute, "measured_rates", lambda k, n, stored: compute.Rates(1e9, 1e10)),
            (ending, "plot_loss", _plot),
            (convert, "_unpickle", lambda source, target: print(unpickle.rewrite(source, target))),
            (own_template, "CACHE", folder / "cache"),
        ):
            stack.enter_context(mock.patch.object(module, name, stand_in))
        torch.set_num_threads(1)
        yield folder


def _plot(folder: Path) -> str:
    write_file(folder / "loss.png", b"picture")
    return str(folder / "loss.png")
