"""`minilora train --watch`: the page of one run, from a thread of the process that trains."""

import threading
from pathlib import Path

from ..terminal import say
from .app import Guards, application
from .listening import listen, server_of
from .page import page_routes
from .runs import run_routes


def watch(run: Path, port: int) -> None:
    """Show a run as long as this process lives; port 0 takes a free one. UsageError for a port that is taken."""
    listening, guards = listen("127.0.0.1", port), Guards()
    server = server_of(application(page_routes(guards) + run_routes(run), guards))
    threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="watch", daemon=True).start()
    say(f"watch   http://127.0.0.1:{listening.getsockname()[1]}")
