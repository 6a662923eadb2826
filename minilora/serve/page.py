"""The page at / and what it is made of: three files, no build step, nothing from elsewhere."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..report.page import asset
from .app import COOKIE, Guards, read_body, same
from .bodies import Body, Refused

HERE = Path(__file__).parent
KINDS = {"page.html": "text/html", "page.js": "text/javascript", "page.css": "text/css"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'", "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache",
}  # fmt: skip


def page_routes(guards: Guards) -> list[Route]:
    """Routes of the page, and of the cookie by which it keeps the key."""

    async def part(http: Request) -> Response:
        name = http.url.path[1:] or "page.html"
        text = (HERE / name).read_text(encoding="utf-8")
        text = asset("page.css") + text if name == "page.css" else text  # it looks as the reports do
        return Response(text, media_type=KINDS[name], headers=HEADERS)

    async def health(http: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def no_models(http: Request) -> Response:
        return JSONResponse({"object": "list", "data": []})

    async def key(http: Request) -> Response:
        given = Body(await read_body(http, guards)).get("key", str, "")
        if guards.key is None or not same(guards.key, given):
            raise Refused(401, "this is not the API key", code="invalid_api_key")
        response = JSONResponse({"status": "ok"})
        response.set_cookie(COOKIE, given, httponly=True, samesite="strict")
        return response

    return [
        *(Route(path, part) for path in ("/", "/page.js", "/page.css")),
        Route("/health", health),
        Route("/key", key, methods=["POST"]),
        Route("/v1/models", no_models),  # unless an endpoint stands before
    ]
