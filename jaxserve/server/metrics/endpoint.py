"""Where metrics are scraped: a registry, a port of its own, a route beside others."""

import threading
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

from jaxserve.core.errors import ConfigError
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.server.metrics.collector import EngineCollector
from jaxserve.server.metrics.names import MetricNames


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

    Raises:
        ConfigError: the address cannot be listened on.
    """

    def __init__(self, host: str, port: int, metrics: Metrics) -> None:
        try:
            server, thread = start_http_server(port, addr=host, registry=metrics.registry)
        except OSError as error:
            raise ConfigError(f"cannot serve metrics on {host}:{port}: {error}") from error
        self._server: WSGIServer = server
        self._thread: threading.Thread = thread
        self.address = f"{host}:{server.server_port}"

    def stop(self) -> None:
        """Close the endpoint."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def metrics_router(metrics: Metrics) -> APIRouter:
    """`GET /metrics` for the HTTP server; a scrape does not hold up its event loop."""
    router = APIRouter()

    @router.get("/metrics", response_class=Response)
    def get_metrics(request: Request) -> Response:  # not async, so on a thread
        """Prometheus metrics, as text or in OpenMetrics' format, as the scraper accepts."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(metrics.registry), media_type=content_type)

    return router
