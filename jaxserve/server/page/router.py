"""The routes of the page: `/`, the files it is made of, and `/live`."""

import hashlib
from importlib import resources

import orjson
from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from jaxserve.server.context import ServerContext
from jaxserve.server.page.live import LiveView

# Routes that answer without an API key: a browser cannot bring one when it opens a page, and
# nothing in these files is secret. `/live` is not among them.
PUBLIC_PATHS = ("/", "/page/")

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# The page loads, and talks to, nothing but this server, runs no script but its own files, and
# is shown in no other page's frame.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # ask each time; unchanged files are answered with 304
}


class _File:
    """One file of the page, read once."""

    def __init__(self, name: str, content: bytes) -> None:
        self.content = content
        self.headers = {
            **_HEADERS,
            "Content-Type": _TYPES[name.rpartition(".")[2]],
            "ETag": f'"{hashlib.blake2b(content, digest_size=12).hexdigest()}"',
        }

    def answer(self, request: Request) -> Response:
        """The file, or that the browser's copy is still good."""
        if request.headers.get("if-none-match") == self.headers["ETag"]:
            return Response(status_code=304, headers=self.headers)
        return Response(self.content, headers=self.headers)


def page_router(context: ServerContext) -> APIRouter:
    """The routes, for the engine of a context."""
    static = resources.files("jaxserve.server.page") / "static"
    files = {file.name: _File(file.name, file.read_bytes()) for file in static.iterdir()}
    live = LiveView(context)
    router = APIRouter()

    @router.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        """The page."""
        return files["index.html"].answer(request)

    @router.get("/page/{name}", include_in_schema=False)
    async def file(name: str, request: Request) -> Response:
        """A file that the page is made of."""
        if name not in files:
            raise HTTPException(404, f"the page has no file {name!r}")
        return files[name].answer(request)

    @router.get("/live")
    async def snapshot(since: str = "") -> Response:
        """What the engine does; see `page/live.py`."""
        content = orjson.dumps(live.snapshot(since))
        headers = {"Cache-Control": "no-store"}
        return Response(content, media_type="application/json", headers=headers)

    return router
