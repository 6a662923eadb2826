"""Ranks that are forks of this process: torch is loaded once for all of them, and for torchrun not at all."""

import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist


def forked(count: int, rank: Callable[[], None]) -> None:
    """What each of so many ranks does, with what torchrun sets. All must succeed."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    children = [_fork(number, count, port, rank) for number in range(count)]
    # opened when all are forks, so that none inherits a connection of another one and counts its bytes
    store = dist.TCPStore("localhost", port, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False)
    codes = [os.waitpid(child, 0)[1] for child in children]
    del store
    assert not any(codes), codes


def _fork(number: int, count: int, port: int, rank: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    try:
        torch.set_num_threads(1)
        rank()
        os._exit(0)
    finally:
        traceback.print_exc()
        os._exit(1)
