"""Where metrics are scraped: a registry, and a route that serves it."""

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response

from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.server.metrics.collector import EngineCollector
from jaxserve.server.metrics.names import MetricNames
from jaxserve.server.metrics.totals import Totals


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

    @property
    def totals(self) -> Totals | None:
        """What was counted, as of now; None before there is an engine."""
        return self._collector.totals

    def count_mismatch(self) -> None:
        """Count an answer that does not fit its schema; see `server.schema_check`."""
        self._collector.count("schema_mismatches")

    def attach(self, engine: AsyncEngine) -> None:
        """Report this engine from now on."""
        self._collector.attach(engine)


def metrics_router(metrics: Metrics) -> APIRouter:
    """`GET /metrics` for the HTTP server; a scrape does not hold up its event loop."""
    router = APIRouter()

    @router.get("/metrics", response_class=Response)
    def get_metrics(request: Request) -> Response:  # not async, so on a thread
        """Prometheus metrics, as text or in OpenMetrics' format, as the scraper accepts."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(metrics.registry), media_type=content_type)

    return router
