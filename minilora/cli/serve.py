"""minilora serve: a model and its adapters behind an OpenAI-style endpoint, and a page to talk with them and to watch runs."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Unpack

from ..errors import UsageError
from ..terminal import prints, say
from .arguments import Arg
from .shared_flags import Int8, Opening, Quant, adapter_folder, check_paths

LOCAL = ("127.0.0.1", "localhost", "::1")


def run(
    *,
    model: Annotated[str | None, Arg("folder of a Hugging Face checkpoint", "DIR", group="model")] = None,
    adapter: Annotated[
        list[str] | None, Arg("an adapter and what it is called; may be given several times", "NAME=DIR", group="model")
    ] = None,
    quant: Quant = "keep",
    int8: Int8 = False,
    runs: Annotated[str | None, Arg("folder of runs, or one run, for the page", "DIR")] = None,
    host: Annotated[str, Arg("address to listen on; any but this machine's own needs --api-key")] = "127.0.0.1",
    port: Annotated[int, Arg("0: any that is free", within=(0, 65535))] = 8000,
    api_key: Annotated[str | None, Arg("key that clients must send [MINILORA_API_KEY]", "KEY")] = None,
    slots: Annotated[int, Arg("answers at a time", within=(1, 4096), group="limits")] = 16,
    queue: Annotated[int, Arg("answers that may wait; more are told 429", within=(0, 2**20), group="limits")] = 128,
    context: Annotated[
        int | None, Arg("tokens of a prompt and its answer [4096, or the model's]", within=(2, 2**31), group="limits")
    ] = None,
    max_tokens: Annotated[
        int, Arg("longest answer, unless the request says", within=(1, 2**31), group="limits")
    ] = 1024,
    timeout: Annotated[float, Arg("seconds for an answer", within=(0.1, 86400), group="limits")] = 600.0,
    max_body: Annotated[int, Arg("bytes of a request", within=(1, 2**31), group="limits")] = 1 << 20,
    **opening: Unpack[Opening],
) -> None:
    adapters = _named(adapter or [])
    if model is None and (runs is None or adapters):
        raise UsageError("--model is missing", "Give a model, or --runs alone to watch runs.")
    check_paths(model)
    for folder in adapters.values():
        check_paths(None, folder)
    if runs is not None and not Path(runs).is_dir():
        raise UsageError(f"--runs is {runs}, which is not a folder", "Give the folder that holds the runs.")
    key = api_key or os.environ.get("MINILORA_API_KEY") or None
    if host not in LOCAL and key is None:
        raise UsageError(
            f"--host {host} lets others in, and there is no key", "Give --api-key, or set MINILORA_API_KEY."
        )
    if key is not None and not (key.isascii() and key.isprintable() and key == key.strip()):
        raise UsageError(
            "the API key has characters that a header cannot carry", "Take letters, digits and signs of ASCII."
        )
    require_serve()
    say(f"serve   {' '.join(filter(None, (model, *adapters.values(), runs)))}")
    from ..serve.app import Guards
    from ..serve.server import serve

    guards = Guards(key, max_body, timeout, max(Guards.connections, 2 * (slots + queue)))
    options = {"slots": slots, "queue": queue, "context": context, "max_tokens": max_tokens}
    serve(model, adapters, runs, host, port, guards, **options, quant=quant, int8=int8, **opening)


def require_serve() -> None:
    """UsageError unless the libraries of the extra are there."""
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise UsageError(f"{' and '.join(missing)} is not installed", "pip install 'minilora[serve]'")


def start_watch(run: str, port: int) -> None:
    """Show a run on a port of this machine as long as this process lives; UsageError for a port that is taken. Of several ranks, the first does it."""
    if not prints():
        return
    require_serve()
    from ..serve.watch import watch

    watch(Path(run), port)


def _named(given: list[str]) -> dict[str, str]:
    """Adapters by name; a folder without one is called as it is, or as the run that it is of."""
    found: dict[str, str] = {}
    for word in given:
        name, mark, place = word.partition("=")
        folder = Path(adapter_folder(place if mark else word))
        name = name if mark else Path(os.path.realpath(folder.parent if folder.name == "adapter" else folder)).name
        if not name or name in found:
            raise UsageError(f"--adapter {word}: there are two adapters of the name {name!r}" if name else f"--adapter {word} has no name",
                             "Give each a name of its own: --adapter NAME=DIR.")  # fmt: skip
        found[name] = str(folder)
    return found
