"""What every rank finds wrong before they have joined, such as a flag or a path, is said once."""

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import MiniloraError

HEAD_START = 2.0  # seconds in which torchrun ends the others when one has failed; ten times what it takes


@contextmanager
def said_once() -> Iterator[None]:
    """Rank 0 fails at once, and torchrun ends the other ranks of its machine, which wait for that before they say the same.

    One that is still there has found what its machine or itself alone has: it says which rank it is, and where.
    """
    said = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK"))
    rank, local = (int(text) if text.isdecimal() else 0 for text in said)  # join() tells what they lack
    try:
        yield
    except KeyboardInterrupt:
        if rank:  # it comes to all
            raise SystemExit(130) from None
        raise
    except Exception as error:
        if rank and not _joined():  # from then on Ranks.ending_as_one decides
            time.sleep(HEAD_START + local / 2)
            if isinstance(error, MiniloraError):
                error.what = f"rank {rank} on {socket.gethostname()}: {error.what}"
        raise


def _joined() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized()
