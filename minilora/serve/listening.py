"""A socket, uvicorn on it, and what one connection may take."""

import asyncio
import socket

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import UsageError
from .app import Guard

GRACE = 30  # seconds for answers that are being written when a signal comes
IDLE = 75  # seconds until an idle connection is closed: later than clients do, who could be sending at that moment
# bytes of a request's headers that come in pieces; of those that come at once one read from the socket is the bound
HEADERS = 1 << 16


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one. UsageError if it cannot be had."""
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=1024
        )
    except OSError as error:
        raise UsageError(f"{host} port {port}: {error.strerror}", "Give another --port or --host.") from None


class Connection(H11Protocol):
    """uvicorn's, which waits without end for a request that does not come, and takes any number of connections; this does not."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        assert isinstance(self.config.app, Guard)
        self._guards = self.config.app.guards
        self._late = self.loop.call_later(self._guards.header_timeout, self.timeout_keep_alive_handler)
        if len(self.connections) > self._guards.connections:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle and not self.cycle.response_complete:
            self._late.cancel()
        elif self._late.cancelled():  # one time for all of the headers, however they drip
            self._late = self.loop.call_later(self._guards.header_timeout, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._late.cancel()


def server_of(app: Guard) -> uvicorn.Server:
    """The server of an application; its run(sockets=[...]) ends after a signal, and in a thread when should_exit is set."""
    config = uvicorn.Config(
        app, http=Connection, ws="none", lifespan="on", log_level="error", access_log=False, server_header=False, proxy_headers=False,
        h11_max_incomplete_event_size=HEADERS, timeout_graceful_shutdown=GRACE, timeout_keep_alive=IDLE,
    )  # fmt: skip
    server = uvicorn.Server(config)
    app.closing = lambda: server.should_exit
    return server
