"""The HTTP application of the metrics port, for scrapers that are to see nothing else."""

from fastapi import FastAPI
from starlette.middleware import Middleware

from jaxserve.server.context import ServerContext
from jaxserve.server.http.app import EXCEPTION_HANDLERS, AnswerErrors
from jaxserve.server.metrics.endpoint import metrics_router
from jaxserve.server.security.http_guard import RequireKey


def make_metrics_app(context: ServerContext) -> FastAPI:
    """`GET /metrics` alone; whoever calls it needs an API key if the context has any."""
    guards = [Middleware(AnswerErrors)]
    if context.keys is not None:
        guards.append(Middleware(RequireKey, keys=context.keys, open_paths=()))
    app = FastAPI(
        title="jaxserve metrics",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        middleware=guards,
        exception_handlers=EXCEPTION_HANDLERS,
    )
    app.include_router(metrics_router(context.observability.metrics))
    return app
