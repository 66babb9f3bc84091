"""Where metrics are scraped: a registry, a port of its own, a route beside others."""

import threading
from typing import Any
from wsgiref.simple_server import WSGIServer

from fastapi import APIRouter
from prometheus_client import (
    CollectorRegistry,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response

from jaxserve.core.errors import ConfigError, Unauthenticated
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.server.metrics.collector import EngineCollector
from jaxserve.server.metrics.names import MetricNames
from jaxserve.server.security.keys import ApiKeys
from jaxserve.server.security.tls import Tls


class Metrics:
    """All metrics of one server.

    Args:
        compat: "vllm" serves what vLLM has too under its names.

    Attributes:
        registry: what the endpoints serve.
    """

    def __init__(self, compat: str = "none") -> None:
        self.registry = CollectorRegistry()
        self._collector = EngineCollector(MetricNames(compat))
        self.registry.register(self._collector)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

    def attach(self, engine: AsyncEngine) -> None:
        """Report this engine from now on."""
        self._collector.attach(engine)


class MetricsServer:
    """An HTTP endpoint `/metrics` on a thread of its own.

    Args:
        host, port: where to listen.
        metrics: what to serve.
        tls: as on the server's other ports.
        keys: who may look; None lets everybody.

    Raises:
        ConfigError: the address cannot be listened on.
    """

    def __init__(
        self,
        host: str,
        port: int,
        metrics: Metrics,
        *,
        tls: Tls | None = None,
        keys: ApiKeys | None = None,
    ) -> None:
        files: dict[str, Any] = {}
        if tls is not None:
            files.update(certfile=str(tls.cert), keyfile=str(tls.key))
            if tls.client_ca is not None:
                files.update(client_cafile=str(tls.client_ca), client_auth_required=True)
        try:
            server, thread = start_http_server(port, host, metrics.registry, **files)
        except OSError as error:
            raise ConfigError(f"cannot serve metrics on {host}:{port}: {error}") from error
        if keys is not None:  # there is no engine yet, and so nothing to see
            server.set_app(_with_keys(server.get_app(), keys))
        self._server: WSGIServer = server
        self._thread: threading.Thread = thread
        self.address = f"{host}:{server.server_port}"

    def stop(self) -> None:
        """Close the endpoint."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _with_keys(app: Any, keys: ApiKeys) -> Any:
    """A WSGI application that asks for an API key first."""

    def guarded(environ: dict[str, Any], start_response: Any) -> Any:
        try:
            keys.caller(environ.get("HTTP_AUTHORIZATION"))
        except Unauthenticated as error:
            start_response("401 Unauthorized", [("WWW-Authenticate", "Bearer")])
            return [str(error).encode()]
        return app(environ, start_response)

    return guarded


def metrics_router(metrics: Metrics) -> APIRouter:
    """`GET /metrics` for the HTTP server; a scrape does not hold up its event loop."""
    router = APIRouter()

    @router.get("/metrics", response_class=Response)
    def get_metrics(request: Request) -> Response:  # not async, so on a thread
        """Prometheus metrics, as text or in OpenMetrics' format, as the scraper accepts."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(metrics.registry), media_type=content_type)

    return router
