"""A socket, and uvicorn on it."""

import socket

import uvicorn

from ..errors import UsageError
from .app import Guard

GRACE = 30  # seconds for answers that are being written when a signal comes
IDLE = 75  # seconds until an idle connection is closed: later than clients do, who could be sending at that moment


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one. UsageError if it cannot be had."""
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=1024
        )
    except OSError as error:
        raise UsageError(f"{host} port {port}: {error.strerror}", "Give another --port or --host.") from None


def server_of(app: Guard) -> uvicorn.Server:
    """The server of an application; its run(sockets=[...]) ends after a signal, and in a thread when should_exit is set."""
    config = uvicorn.Config(
        app, ws="none", lifespan="on", log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=GRACE,
        timeout_keep_alive=IDLE,
    )  # fmt: skip
    server = uvicorn.Server(config)
    app.closing = lambda: server.should_exit
    return server
