"""A cluster of two hosts on one machine: network namespaces with a cable between them, and a host name each."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rank_runs import ENVIRONMENT

NAMES = ("alpha", "beta")


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True)


def unavailable() -> str:
    """Why there can be no such cluster here; empty where there can."""
    if not shutil.which("ip") or not shutil.which("unshare"):
        return "iproute2 or unshare is not installed"
    probe = subprocess.run(
        ["unshare", "--net", "--uts", "ip", "link", "add", "veth0", "type", "veth", "peer", "veth1"],
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if probe.returncode == 0 else f"no network namespaces here: {probe.stderr.strip()}"


class Cluster:
    """Hosts 0 and 1, which reach each other at 10.77.0.1 and 10.77.0.2 as long as the cable is there."""

    def __init__(self) -> None:
        self.spaces = [f"minilora-{os.getpid()}-{name}" for name in NAMES]

    def start(self, host: int, ranks: int, *words: str) -> subprocess.Popen:
        """torchrun of a host, of the same run on both."""
        named = [
            "ip",
            "netns",
            "exec",
            self.spaces[host],
            "unshare",
            "--uts",
            "sh",
            "-c",
            f'hostname {NAMES[host]} && exec "$@"',
            "sh",
        ]
        nodes = f"--nnodes=2 --node-rank={host} --nproc-per-node={ranks} --master-addr=10.77.0.1 --master-port=29500 --local-addr=10.77.0.{host + 1}"
        command = [*named, sys.executable, "-m", "torch.distributed.run", *nodes.split(), *words]
        environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "eth0"}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def plug(self, state: str) -> None:
        """Put the cable in (up) or cut it (down), at the second host."""
        ip(f"-n {self.spaces[1]} link set eth0 {state}")


@contextmanager
def cluster() -> Iterator[Cluster]:
    found = Cluster()
    first, second = found.spaces
    try:
        for space in found.spaces:
            ip(f"netns add {space}")
            ip(f"-n {space} link set lo up")
        ip(f"link add eth0 netns {first} type veth peer name eth0 netns {second}")
        for host, space in enumerate(found.spaces):
            ip(f"-n {space} addr add 10.77.0.{host + 1}/24 dev eth0")
            ip(f"-n {space} link set eth0 up")
        yield found
    finally:
        for space in found.spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)
