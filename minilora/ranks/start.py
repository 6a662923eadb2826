"""`--gpus N`: the same command again as N ranks of this machine, started by torchrun."""

import logging
import os
import tempfile
from pathlib import Path

from .ranks import EXIT_CODES

LOST = 10
SAVING = 120  # seconds that ranks have to save their state when a signal ends them


def train_on(count: int, words: list[str]) -> int:
    """Run `minilora WORDS` as `count` ranks; returns the exit code of the run.

    torchrun itself only says that some rank failed, so each rank notes its own code.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    from ..machine.cpu import usable_cpus

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cpus() // count)))  # torchrun would take 1, and say so
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks say what happened
    how = ["--standalone", f"--nproc-per-node={count}", f"--shutdown-timeout={SAVING}", "-m", "minilora", *words]
    with tempfile.TemporaryDirectory() as folder:
        codes = Path(folder) / "codes"
        os.environ[EXIT_CODES] = str(codes)
        try:
            run(parse_args(how))
            return 0
        except (ChildFailedError, SignalException):
            told = [int(line) for line in codes.read_text().split()] if codes.exists() else []
    # those that only found another one gone say 10; the one that knows better says why
    return next((code for code in told if code != LOST), LOST)
