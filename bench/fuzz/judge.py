"""What becomes of one input: a value, or a MiniloraError with the code that fits. Anything else is a fault."""

import gc
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from minilora.errors import MiniloraError

from .room import ROOM, SECRET
from .tripwire import armed

SECONDS = 2.0  # of CPU
# by the clock, several times: what waits for a pipe uses no CPU, and a process that was stopped for a while has done nothing wrong
WAITING, TIMES_WAITED = 7.0, 3
TIMES, MORE = 10, 64 << 20  # bytes: so many times the input, and so much more
CODES = {2, 3, 4}


class Fault(Exception):
    """A target did with an input what it never may; `kind` is the same for inputs that show one fault."""

    def __init__(self, kind: str, told: str):
        super().__init__(f"{kind}: {told}")
        self.kind = kind


class _TooLong(BaseException):
    pass


def verdict(target: ModuleType, data: bytes, codes: Sequence[int] = ()) -> str:
    """ "value" or the code of the error; Fault for another exception, a code that does not belong there, or a broken bound."""
    return judged(target, data, codes)[0]


def judged(target: ModuleType, data: bytes, codes: Sequence[int] = ()) -> tuple[str, str]:
    """The verdict and what the error says."""
    name = target.__name__.rpartition(".")[2]
    allowed = {*CODES, *codes, *getattr(target, "CODES", ())}
    try:
        with bounded(len(data), name, (), (SECRET,), getattr(target, "CHILDREN", ()), getattr(target, "LINKS", True)):
            target.target(data)
    except MiniloraError as error:
        if error.code not in allowed:
            raise Fault(f"{name} code {error.code}", str(error)) from None
        return str(error.code), error.what
    except _TooLong:  # at the very end
        raise Fault(f"{name} time", "at the end") from None
    except Fault:
        raise
    except AssertionError as error:
        raise Fault(f"{name} {_place(error)}", str(error)) from error
    except Exception as error:
        raise Fault(f"{name} {type(error).__name__} at {_place(error)}", str(error)) from error
    return "value", ""


@contextmanager
def bounded(
    size: int,
    name: str,
    writable: Sequence[Path] = (),
    secrets: Sequence[Path] = (),
    children: Sequence[str] = (),
    links: bool = True,
) -> Iterator[None]:
    """Fault if the block takes more time or memory than an input of that size is worth, or touches what it may not."""
    late, waited = False, 0

    def stop(number: int, _: object) -> None:
        nonlocal late, waited
        waited += number == signal.SIGALRM
        if number == signal.SIGPROF or waited == TIMES_WAITED:
            late = True
            raise _TooLong

    before = [signal.signal(s, stop) for s in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WAITING, WAITING)
    start, rest = time.process_time(), _forget_peak()
    seen: list[str] = []
    temporary, tempfile.tempdir = tempfile.tempdir, str(ROOM)
    try:
        with armed((*writable, ROOM), secrets, children, links) as seen:
            yield
    except _TooLong:
        late = True
    except BaseException:
        if not late and not seen:
            raise
    finally:
        tempfile.tempdir = temporary
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for s, handler in zip((signal.SIGPROF, signal.SIGALRM), before, strict=True):
            signal.signal(s, handler)
    if seen:
        raise Fault(f"{name} touched", seen[0])
    if late or time.process_time() - start > SECONDS:
        raise Fault(f"{name} time", f"{time.process_time() - start:.1f} s of CPU")
    grown = _memory("VmHWM") - rest
    if grown > TIMES * size + MORE:
        gc.collect()
        raise Fault(f"{name} memory", f"{grown >> 20:,} MiB for {size:,} bytes")


def _memory(key: str) -> int:
    """Bytes that /proc/self/status tells."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(key))


def _forget_peak() -> int:
    """What is resident now; from here on the peak is counted anew."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _memory("VmRSS")


def _place(error: BaseException) -> str:
    """The innermost line of minilora that an exception came through, without its number."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/minilora/" in f.filename or "/models/" in f.filename or "/kernels/" in f.filename]
    return f"{Path((ours or frames)[-1].filename).name}:{(ours or frames)[-1].name}" if frames else "nowhere"


def is_fault(target: ModuleType) -> Callable[[bytes], bool]:
    """Whether an input shows a fault."""

    def check(data: bytes) -> bool:
        try:
            verdict(target, data)
        except Fault:
            return True
        return False

    return check
