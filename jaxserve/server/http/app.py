"""The HTTP application: all routes over one context."""

import importlib.metadata
import logging
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.core.errors import JaxserveError
from jaxserve.server.context import ServerContext
from jaxserve.server.http import errors
from jaxserve.server.http.body import ReadBody
from jaxserve.server.http.chat import chat_router
from jaxserve.server.http.completions import completions_router
from jaxserve.server.http.embeddings import embeddings_router
from jaxserve.server.http.generation import checked_id
from jaxserve.server.http.info import info_router
from jaxserve.server.http.responses import responses_router
from jaxserve.server.http.tokens import tokens_router
from jaxserve.server.log_format import about_request
from jaxserve.server.page.router import PUBLIC_PATHS, page_router
from jaxserve.server.security.http_guard import RequireKey

log = logging.getLogger(__name__)

DEFAULT_MAX_BODY_BYTES = 16 * 2**20
_OPEN_PATHS = ("/health", "/ping", *PUBLIC_PATHS)

_ROUTERS = (
    page_router, info_router, chat_router, completions_router, responses_router,
    embeddings_router, tokens_router,
)  # fmt: skip


def make_app(
    context: ServerContext,
    *,
    routers: Sequence[APIRouter] = (),
    middlewares: Sequence[Middleware] = (),
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
    cors_origins: Sequence[str] = (),
) -> FastAPI:
    """The application; whoever calls it needs an API key if the context has any.

    Args:
        context: the server's; requests are answered with 503 until it has an engine.
        routers: more routes.
        middlewares: ASGI applications around all routes, the outermost first. What they raise
            is answered as if a route had raised it.
        max_body_bytes: larger bodies are refused with 413.
        cors_origins: origins whose web pages may call; "*" stands for all.
    """
    guards = [Middleware(AnswerErrors)]
    if cors_origins:  # around all else: pages may read refusals, and their preflights have no key
        guards.insert(0, _cors(cors_origins))
    if context.keys is not None:
        guards.append(Middleware(RequireKey, keys=context.keys, open_paths=_OPEN_PATHS))
    guards.append(Middleware(ReadBody, max_bytes=max_body_bytes))
    app = FastAPI(
        title="jaxserve",
        version=importlib.metadata.version("jaxserve"),
        docs_url=None,  # these pages load their scripts from elsewhere
        redoc_url=None,
        middleware=[*guards, *middlewares],
        exception_handlers=EXCEPTION_HANDLERS,
    )
    for make_router in _ROUTERS:
        app.include_router(make_router(context))
    for router in routers:
        app.include_router(router)
    return app


def _cors(origins: Sequence[str]) -> Middleware:
    """Lets a browser's scripts call, with an API key in their `Authorization` header."""
    return Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=("GET", "HEAD", "POST"),
        allow_headers=("*",),
        expose_headers=("X-Request-Id", "Retry-After"),
    )


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, JaxserveError)
    return _answer_to(error, request.scope)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return errors.response_to_validation(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return errors.response_to_http_exception(error)


# What routes raise, and how it is answered.
EXCEPTION_HANDLERS: dict[Any, Any] = {
    JaxserveError: _on_error,
    RequestValidationError: _on_validation_error,
    HTTPException: _on_http_exception,
}


def _answer_to(error: JaxserveError, scope: Scope) -> Response:
    status = errors.kind_of(error).status
    log.debug("%s: %d: %s", scope["path"], status, error)
    if status == 500:
        log.error("%s failed", scope["path"], exc_info=error)
    return errors.response_to(error)


class AnswerErrors:
    """The outermost layer: every answer has an `X-Request-Id`, and every failure an answer.

    Args:
        app: what it is around.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Go on to the application, and answer what it raises."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False
        given = Headers(scope=scope).get("x-request-id")
        request_id = given or uuid.uuid4().hex

        async def send_marked(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message).setdefault("X-Request-Id", request_id)
            await send(message)

        with about_request(request_id):
            try:
                if given is not None:
                    request_id = uuid.uuid4().hex  # for a refusal of the given one
                    request_id = checked_id(given, "X-Request-Id")
                await self._app(scope, receive, send_marked)
            except errors.ClientGone:
                log.debug("%s: the client went away", scope["path"])
            except Exception as error:
                if started:  # too late to say anything: the connection is cut
                    raise
                await _refusal(error, scope)(scope, receive, send_marked)


def _refusal(error: Exception, scope: Scope) -> Response:
    if isinstance(error, JaxserveError):
        return _answer_to(error, scope)
    log.error("%s failed", scope["path"], exc_info=error)
    return errors.response_to_bug()
