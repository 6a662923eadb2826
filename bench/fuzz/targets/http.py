"""A request to the endpoint: a method and a path on the first line, headers up to an empty line, the body. No socket: the ASGI application is called.

The model's answers are made up at once. The status is below 500, the body says what is wrong in OpenAI's form, and nothing of a traceback.
"""

import asyncio
import atexit
import json
from collections import deque
from collections.abc import Sequence
from functools import cache
from random import Random
from typing import Any

from minilora.errors import UsageError
from minilora.files.model_folder import ModelFolder
from minilora.sampling import GREEDY
from minilora.serve.app import Endpoint, Guards, application
from minilora.serve.bodies import NEUTRAL, NOT_NEEDED, Limits
from minilora.serve.engine import Engine
from minilora.serve.models import Asked
from minilora.serve.page import page_routes
from minilora.serve.runs import run_routes
from minilora.serve.server import open_models

from ..mutator import mutate as mutated
from ..room import ROOM, tiny

CHAT = {"model": "tiny", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hé"}]}], "max_tokens": 4,
        "temperature": 0.5, "top_p": 0.9, "stop": ["x"], "n": 2, "seed": 1, "logprobs": True, "top_logprobs": 2, "stream": False}  # fmt: skip
TOOLS = {"model": "tiny", "messages": [{"role": "user", "content": "q"}], "tool_choice": "auto",
         "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"k": {"type": "string"}}}}}]}  # fmt: skip


def _request(first: str, body: Any = None, **headers: str) -> bytes:
    headers = {"host": "localhost:8000", "content-type": "application/json"} | headers
    raw = b"" if body is None else json.dumps(body).encode()
    return "\n".join([first, *(f"{k}: {v}" for k, v in headers.items()), "", ""]).encode() + raw


SEEDS = [
    _request("POST /v1/chat/completions", CHAT), _request("POST /v1/chat/completions", TOOLS),
    _request("POST /v1/chat/completions", CHAT | {"stream": True, "stream_options": {"include_usage": True}}),
    _request("POST /v1/completions", {"model": "tiny", "prompt": ["a", "b"], "max_tokens": 2, "echo": False, "logprobs": 1}),
    _request("POST /v1/completions", {"model": "tiny", "prompt": [[1, 2], [3]], "stream": True}),
    _request("GET /v1/models"), _request("GET /v1/models/tiny"), _request("GET /"), _request("GET /health"), _request("GET /runs"), _request("GET /runs/a/metrics"),
    _request("GET /page.js"), _request("POST /key", {"key": "x"}), _request("GET /v1/models", authorization="Bearer x", cookie="minilora_key=x", origin="http://evil"),
    _request("OPTIONS /v1/chat/completions", origin="http://evil"), _request("GET /v1/models", host="evil.example"),
]  # fmt: skip
WORDS = [*CHAT, *NEUTRAL, *NOT_NEEDED, "tool_calls", "tool_call_id", "arguments", "role", "content", "assistant", "tool", "developer", "prompt", "logit_bias", "stream_options",
         "include_usage", "/v1/models/", "/../", "%2e%2e%2f", "%00", "GET ", "PUT ", "DELETE ", "HEAD ", "content-length: 99\n", "transfer-encoding: chunked\n", "host: localhost\n",
         "authorization: Bearer \n", "cookie: minilora_key=\n", "\\ud800", "{\"type\": \"image_url\"}"]  # fmt: skip


class _Instant(Engine):
    """An engine that answers at once, with the prompt's last ids."""

    def submit(self, requests: Sequence[Asked]) -> None:
        super().submit(requests)
        self.waiting = deque()
        for request in requests:
            request.finish_reason = "length"
            request.changed()


@cache
def _application() -> Any:
    models = open_models(ModelFolder(tiny()), {}, compute="float32", device="cpu")
    guards, engine = Guards(), _Instant(models, 4, 16)
    routes = Endpoint(models, engine, Limits(200, 8, GREEDY, frozenset()), guards).routes()
    return application(routes + page_routes(guards) + run_routes(ROOM), guards, engine)


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    atexit.register(loop.close)
    return loop


def prepare() -> None:
    _application()
    _loop().run_until_complete(asyncio.to_thread(int))  # a thread is there from here on


def target(data: bytes) -> None:
    head, _, body = data.partition(b"\n\n")
    first, *lines = head.split(b"\n")
    method, _, path = first.partition(b" ")
    path, _, query = path.partition(b"?")
    headers = [tuple(part.strip() for part in line.partition(b":")[::2]) for line in lines if line.strip()]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method.decode("latin-1").upper() or "GET", "scheme": "http",
        "path": path.decode("utf-8", "replace") or "/", "raw_path": path, "query_string": query, "root_path": "", "server": ("127.0.0.1", 8000), "client": ("127.0.0.1", 9),
        "headers": [(name.lower(), value) for name, value in headers],
    }  # fmt: skip
    status, answer = _loop().run_until_complete(_asked(scope, body))
    assert b"Traceback" not in answer and status < 500, (status, answer[:300])
    if status >= 400:
        raise UsageError(f"{status} {json.loads(answer)['error']['message']}")


async def _asked(scope: dict[str, Any], body: bytes) -> tuple[int, bytes]:
    """The status and the body of the answer."""
    sent: list[dict[str, Any]] = []
    pieces = [{"type": "http.request", "body": body, "more_body": False}]
    silent = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if not pieces:
            await silent.wait()
        return pieces.pop()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await _application()(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def mutate(data: bytes, random: Random, other: bytes) -> bytes:
    """The body changed as JSON, mostly, under a head that stays."""
    head, mark, body = data.partition(b"\n\n")
    if random.random() < 0.75:
        return head + b"\n\n" + mutated(body, random, WORDS, other.partition(b"\n\n")[2])
    return mutated(head, random, WORDS, other) + mark + body
