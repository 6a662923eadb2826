"""`--gpus N`: the same command again as N ranks of this machine, started by torchrun."""

import logging
import os
import sys
import tempfile
from pathlib import Path

from ..isolated import environment
from ..machine.cpu import usable_cpus

LOST = 10
SAVING = 120  # seconds that ranks have to save their state when a signal ends them
# names a file to which each rank adds its exit code: torchrun's own is 1 whatever happened
EXIT_CODES = "MINILORA_EXIT_CODES"


def several(gpus: int) -> bool:
    """Whether a command that was asked for so many GPUs starts the ranks: torchrun gives RANK to those that it starts."""
    return gpus > 1 and "RANK" not in os.environ


def run_on(gpus: int) -> int:
    """Run the command line of this process as so many ranks; returns the exit code of the run.

    torchrun itself only says that some rank failed, so each rank notes its own code.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.update(environment())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cpus() // gpus)))  # torchrun would take 1, and say so
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks say what happened
    how = ["--standalone", f"--nproc-per-node={gpus}", f"--shutdown-timeout={SAVING}", "-m", "minilora", *sys.argv[1:]]
    ended = LOST
    with tempfile.TemporaryDirectory() as folder:
        codes = Path(folder) / "codes"
        os.environ[EXIT_CODES] = str(codes)
        try:
            run(parse_args(how))
            return 0
        except ChildFailedError:
            pass
        except SignalException as stop:
            ended = 128 + stop.sigval
        told = [int(line) for line in codes.read_text().split()] if codes.exists() else []
    # those that only found another one gone say 10; the one that knows better says why
    return next((code for code in told if code != LOST), LOST if told else ended)
