"""A tiny model and its adapters behind a real server on a free port, in a thread; and the folder of a run."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tiny import make_model

from minilora import add_lora, load_model, save_adapter
from minilora.files.model_folder import ModelFolder
from minilora.lora import adapters
from minilora.sampling import GREEDY
from minilora.serve.app import Endpoint, Guards, application
from minilora.serve.bodies import Limits
from minilora.serve.engine import Engine
from minilora.serve.listening import listen, server_of
from minilora.serve.models import Models
from minilora.serve.page import page_routes
from minilora.serve.runs import run_routes
from minilora.serve.server import open_models

OPEN = Guards()


def make_models(folder: Path) -> Models:
    """A base called tiny and two adapters, one on all linears, one on the MLPs alone, in fp32."""
    make_model(folder / "tiny")
    made = {}
    for seed, (name, targets) in enumerate({"red": "all-linear", "blue": "mlp"}.items()):
        model = load_model(folder / "tiny", torch.float32, "cpu")
        add_lora(model, targets=targets, r=4, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for _, wrapper in adapters(model):
            wrapper.lora_B.data.normal_(0, 0.3, generator=generator)
        save_adapter(model, folder / name)
        made[name] = str(folder / name)
    return open_models(ModelFolder(folder / "tiny"), made, compute="float32", device="cpu")


@contextmanager
def running(
    models: Models | None, runs: Path | None = None, guards: Guards = OPEN, slots: int = 4, queue: int = 16, context: int = 200
) -> Iterator[tuple[str, Any]]:  # fmt: skip
    """The address of a server, and its engine."""
    routes, engine = [], None
    if models is not None:
        engine = Engine(models, slots, queue)
        limits = Limits(context, 64, GREEDY, frozenset())
        routes = Endpoint(models, engine, limits, guards).routes()
    routes += page_routes(guards) + run_routes(runs)
    listening = listen("127.0.0.1", 0)
    server = server_of(application(routes, guards, engine))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", engine
    finally:
        server.should_exit = True
        thread.join()


def step(number: int, **more) -> str:
    """A line of metrics.jsonl."""
    return json.dumps({"step": number, "loss": 1 / number, "lr": 0.1} | more) + "\n"


def make_run(folder: Path, steps: int = 3, of: int = 5) -> Path:
    """The folder of a run that took some of its steps."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("lr: 0.1\n")
    (folder / "data.json").write_text(json.dumps({"steps": of}))
    (folder / "metrics.jsonl").write_text("".join(map(step, range(1, steps + 1))))
    return folder
