"""What a server tells of itself: metrics always; traces, request logs and profiles if asked to."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from jaxserve.core.errors import ConfigError
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.server.metrics.endpoint import Metrics
from jaxserve.server.metrics.names import COMPAT_CHOICES
from jaxserve.server.request_feed import RequestConsumer, RequestFeed
from jaxserve.server.request_log import RequestLog
from jaxserve.server.traces import RequestTraces, otlp_exporter

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObservabilityOptions:
    """What to tell, and to whom.

    Attributes:
        metrics_compat: "vllm" serves metrics that vLLM has too under its names.
        otlp_endpoint: OpenTelemetry collector that gets traces; None for none.
        log_requests: a log line for each request that ended.
        log_prompts: with the prompt's text in it.
        profile_dir: where profiles may be written; None: none are taken.

    Raises:
        ConfigError: no such choice, or options that need another one.
    """

    metrics_compat: str = "none"
    otlp_endpoint: str | None = None
    log_requests: bool = False
    log_prompts: bool = False
    profile_dir: Path | None = None

    def __post_init__(self) -> None:
        if self.metrics_compat not in COMPAT_CHOICES:
            raise ConfigError(f"metrics_compat must be one of {', '.join(COMPAT_CHOICES)}")
        if self.log_prompts and not self.log_requests:
            raise ConfigError("log_prompts adds prompts to the lines of log_requests, which is off")


class Observability:
    """Watches the engine of one server.

    Args:
        options: what to tell.
        exporter: takes the spans instead of `options.otlp_endpoint` (for tests).

    Attributes:
        options: as given.
        metrics: what the metrics' endpoints serve.

    Raises:
        ConfigError: traces are wanted and their packages are missing.
    """

    def __init__(
        self, options: ObservabilityOptions | None = None, exporter: "SpanExporter | None" = None
    ) -> None:
        self.options = options or ObservabilityOptions()
        self.metrics = Metrics(self.options.metrics_compat)
        self._exporter = exporter
        if exporter is None and self.options.otlp_endpoint is not None:
            self._exporter = otlp_exporter(self.options.otlp_endpoint)
        self._traces: RequestTraces | None = None
        self._feed: RequestFeed | None = None

    def attach(self, engine: AsyncEngine) -> None:
        """Watch this engine from now on; once."""
        self.metrics.attach(engine)
        consumers: list[RequestConsumer] = []
        if self._exporter is not None:
            self._traces = RequestTraces(self._exporter, engine.model_info.name)
            consumers.append(self._traces)
        if self.options.log_requests:
            consumers.append(RequestLog(engine.tokenizer if self.options.log_prompts else None))
        if consumers:
            self._feed = RequestFeed(consumers)
            engine.records.observe(self._feed)

    def close(self) -> None:
        """Send and write what is left; call it once the engine has stopped. Idempotent."""
        if self._feed is not None:
            self._feed.close()
            self._feed = None
        if self._traces is not None:
            self._traces.close()
            self._traces = None
