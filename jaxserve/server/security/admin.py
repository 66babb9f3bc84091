"""The admin surface: what only whoever runs the server may do. Off by default; loopback only."""

import logging
from collections.abc import Callable
from typing import Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve.core.errors import PermissionDenied
from jaxserve.server.context import ServerContext
from jaxserve.server.http.app import DEFAULT_MAX_BODY_BYTES, EXCEPTION_HANDLERS, AnswerErrors
from jaxserve.server.http.body import ReadBody
from jaxserve.server.profiling import profile_router

log = logging.getLogger(__name__)

ADMIN_HOST = "127.0.0.1"
_HOSTS = ("127.0.0.1", "localhost")


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class AbortBody(_Body):
    """Which request to end."""

    request_id: str


class LogLevelBody(_Body):
    """How much to log from now on."""

    level: Literal["debug", "info", "warning", "error"]


def make_admin_app(context: ServerContext, drain: Callable[[], None]) -> FastAPI:
    """The application of the admin port.

    Args:
        context: the server's.
        drain: begins to drain the server, as SIGTERM does.
    """
    app = FastAPI(
        title="jaxserve admin",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        middleware=[
            Middleware(AnswerErrors),
            Middleware(RefuseBrowsers),
            Middleware(ReadBody, max_bytes=DEFAULT_MAX_BODY_BYTES),
        ],
        exception_handlers=EXCEPTION_HANDLERS,
    )
    app.include_router(profile_router(context))

    @app.get("/admin/requests")
    async def requests() -> dict[str, object]:
        """The requests under way."""
        active = context.engine_for().active_requests()
        return {"requests": [request._asdict() for request in active]}

    @app.post("/admin/abort")
    async def abort(body: AbortBody) -> dict[str, object]:
        """End a request, whosever it is."""
        aborted = context.abort(body.request_id)
        log.warning("admin: abort of %s: %s", body.request_id, aborted)
        return {"aborted": aborted}

    @app.post("/admin/drain", status_code=202)
    async def begin_drain() -> dict[str, object]:
        """Refuse new requests, let the running ones finish, then end the server."""
        log.warning("admin: drain")
        drain()
        return {"draining": True}

    @app.post("/admin/log-level")
    async def log_level(body: LogLevelBody) -> dict[str, object]:
        """Log more, or less."""
        logging.getLogger("jaxserve").setLevel(body.level.upper())
        return {"level": body.level}

    return app


class RefuseBrowsers:
    """Refuses what a web page could make a browser on this machine send.

    Such a request names its page's origin, or, if the page's own name was made to point here
    (DNS rebinding), that name as the host.

    Args:
        app: what it is around; it must answer `PermissionDenied` further out.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Go on to the application.

        Raises:
            PermissionDenied: the request is a web page's.
        """
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            host = headers.get("host", "").rpartition(":")[0] or headers.get("host", "")
            if "origin" in headers or "sec-fetch-site" in headers or host not in _HOSTS:
                raise PermissionDenied("the admin surface is not for web pages")
        await self._app(scope, receive, send)
