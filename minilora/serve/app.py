"""The endpoint: routes of OpenAI's API, what guards them, and errors in OpenAI's form."""

import asyncio
import contextlib
import hmac
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from http.cookies import SimpleCookie
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..errors import quote
from .bodies import Asking, Limits, Refused, read_chat, read_completion
from .engine import FAILED, Busy, Engine
from .models import Models
from .replies import Answer, Reply

SSE = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
LOCAL = {"localhost", "127.0.0.1", "[::1]"}
OPEN = {"/", "/page.js", "/page.css", "/key", "/health"}  # paths that need no key: none of them tells anything
COOKIE = "minilora_key"


@dataclass(frozen=True)
class Guards:
    """What a server lets in.

    Its key (none: whoever reaches it), bytes of a body, how many connections, and seconds of an answer, headers, a body, one write.
    """

    key: str | None = None
    max_body: int = 1 << 20
    timeout: float = 600.0
    connections: int = 768  # below the 1,024 files that a process may open where nobody says otherwise
    header_timeout: float = 30.0
    body_timeout: float = 30.0
    write_timeout: float = 30.0


class Endpoint:
    """The routes under /v1 of the models of an engine."""

    def __init__(self, models: Models, engine: Engine, limits: Limits, guards: Guards):
        self.models, self.engine, self.limits, self.guards = models, engine, limits, guards

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self.list),
            Route("/v1/models/{name:path}", self.one),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
        ]

    async def list(self, http: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._about(name) for name in self.models.all]})

    async def one(self, http: Request) -> Response:
        name = http.path_params["name"]
        if name not in self.models.all:
            raise Refused(
                404, f"there is no such model here, but {', '.join(self.models.all)}", None, "model_not_found"
            )
        return JSONResponse(self._about(name))

    def _about(self, name: str) -> dict[str, Any]:
        base = self.models.base.name
        about = {"id": name, "object": "model", "created": 0, "owned_by": "minilora"}
        return about | {"root": base, "parent": None if name == base else base, "max_model_len": self.limits.context}

    async def chat(self, http: Request) -> Response:
        return await self._answer(http, read_chat)

    async def complete(self, http: Request) -> Response:
        return await self._answer(http, read_completion)

    async def _answer(self, http: Request, read: Callable[[bytes, Models, Limits], Asking]) -> Response:
        raw = await read_body(http, self.guards)
        asking = await asyncio.to_thread(read, raw, self.models, self.limits)
        changed = asyncio.Event()
        requests = asking.requests(changed.set)
        try:
            self.engine.submit(requests)
        except Busy:
            raise Refused(429, "all slots are taken and the queue is full: ask again soon", code="queue_full") from None
        reply = Reply(asking, [Answer(r, asking) for r in requests])
        steps = self._steps(reply, changed)
        if asking.stream:
            return _Stream(steps, lambda: self.engine.release(requests))
        try:
            await _unless_gone(http, _all(steps))
            return JSONResponse(reply.whole())
        finally:
            self.engine.release(requests)

    async def _steps(self, reply: Reply, changed: asyncio.Event) -> AsyncIterator[dict[str, Any]]:
        """Chunks of the answers as they grow; raises Refused if they cannot be finished."""
        indices = range(len(reply.answers))
        for index in indices if reply.asking.chat else ():
            yield reply.opening(index)
        deadline = asyncio.get_running_loop().time() + self.guards.timeout
        while not all(answer.finish_reason for answer in reply.answers):
            try:
                async with asyncio.timeout_at(deadline):
                    await changed.wait()
            except TimeoutError:
                what = f"no complete answer within {self.guards.timeout:g} seconds"
                raise Refused(504, what, code="timeout") from None
            changed.clear()
            for index in indices:
                for chunk in reply.chunks(index):
                    if reply.answers[index].finish_reason == FAILED:
                        raise Refused(500, "this request could not be computed; the server's log says why")
                    yield chunk
        if reply.asking.include_usage:
            yield reply.usage_chunk()


class _Stream(StreamingResponse):
    """Chunks as server-sent events; `close` is called at the end, whichever it is."""

    def __init__(self, chunks: AsyncIterator[dict[str, Any]], close: Callable[[], None]):
        super().__init__(_events(chunks), media_type="text/event-stream", headers=SSE)
        self._close = close

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _events(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    try:
        async for chunk in chunks:
            yield event(chunk)
        yield "data: [DONE]\n\n"
    except Refused as refused:  # the status is sent already
        yield event(refused.body())


def event(value: Any) -> str:
    """A value as a server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _all(steps: AsyncIterator[Any]) -> None:
    async for _ in steps:
        pass


async def _unless_gone(http: Request, work: Awaitable[None]) -> None:
    """Do the work; ClientDisconnect as soon as the client is gone."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.create_task(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


async def read_body(http: Request, guards: Guards) -> bytes:
    """The body of a JSON request; raises Refused for another type, one that is too long, or one that does not come."""
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # a web page can post other types to this machine without asking its owner's browser
        raise Refused(415, "Content-Type is not application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(guards.body_timeout):
            async for piece in http.stream():
                body += piece
                if len(body) > guards.max_body:
                    raise Refused(413, f"the body is longer than {guards.max_body:,} bytes")
    except TimeoutError:
        raise Refused(408, f"the body did not come within {guards.body_timeout:g} seconds") from None
    return bytes(body)


class Guard:
    """Around the whole application: who may ask, under which name, and how long a client may take to read."""

    def __init__(self, app: Any, guards: Guards):
        self.app, self.guards = app, guards
        self.closing: Callable[[], bool] = lambda: False  # whether the server waits for its last answers

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["closing"] = self.closing
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self._refused(scope["path"], headers)
        if refused:
            await refusal(refused)(scope, receive, send)
        else:
            await self._answer(scope, receive, send)

    def _refused(self, path: str, headers: dict[str, str]) -> Refused | None:
        """Why a request is not answered, if it is not."""
        if self.guards.key is not None:
            if path in OPEN or same(self.guards.key, given_key(headers)):
                return None
            return Refused(401, "the API key is missing or wrong", code="invalid_api_key")
        host = headers.get("host", "")
        if re.sub(r":\d*$", "", host) not in LOCAL:
            # a page of another name that resolves to this machine (DNS rebinding)
            return Refused(421, "this server answers to localhost alone")
        if headers.get("origin", f"http://{host}").partition("://")[2] != host:
            return Refused(403, "this server answers to its own page, not to those of others")
        return None

    async def _answer(self, scope, receive, send) -> None:
        """Let the application answer; a client that does not read what it asked for is left."""
        stuck = False

        async def timely(message) -> None:
            nonlocal stuck
            try:
                async with asyncio.timeout(self.guards.write_timeout):
                    await send(message)
            except TimeoutError:
                stuck = True
                raise

        try:
            await self.app(scope, receive, timely)
        except Exception:
            if not stuck:
                raise


def same(key: str, given: str) -> bool:
    return hmac.compare_digest(key.encode(), given.encode("utf-8", "surrogateescape"))


def given_key(headers: dict[str, str]) -> str:
    """The key of a request: a bearer token, or the cookie of the page."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    with contextlib.suppress(Exception):  # a cookie that is none
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        return cookie.value if cookie else ""
    return ""


def refusal(refused: Refused) -> Response:
    headers = {"Retry-After": "1"} if refused.status == 429 else {}
    headers |= {"WWW-Authenticate": "Bearer"} if refused.status == 401 else {}
    return JSONResponse(refused.body(), refused.status, headers)


async def _on_refused(http: Request, refused: Any) -> Response:
    return refusal(refused)


async def _on_http(http: Request, error: Any) -> Response:
    return refusal(Refused(error.status_code, f"{error.detail}: {http.method} {quote(http.url.path)}"))


async def _on_gone(http: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _on_bug(http: Request, error: Exception) -> Response:
    return refusal(Refused(500, "this is a bug of minilora; the server's log says more"))


HANDLERS: dict[Any, Callable[[Request, Any], Awaitable[Response]]] = {
    Refused: _on_refused, HTTPException: _on_http, ClientDisconnect: _on_gone, Exception: _on_bug,
}  # fmt: skip


def application(routes: list[Route], guards: Guards, engine: Engine | None = None) -> Guard:
    """The ASGI application of some routes; the engine runs while it does."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with engine or contextlib.nullcontext():
            yield

    return Guard(Starlette(routes=routes, exception_handlers=HANDLERS, lifespan=lifespan), guards)
