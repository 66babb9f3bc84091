"""Prometheus metrics, read from the engine when they are scraped."""

import threading
from collections.abc import Iterator
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jaxserve.core.errors import ConfigError
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.outputs import EngineLoad


class EngineCollector(Collector):
    """The engine's load as Prometheus metrics; only `jaxserve:ready` until there is one."""

    def __init__(self) -> None:
        self.engine: AsyncEngine | None = None

    def collect(self) -> Iterator[Metric]:
        """All metrics as of now."""
        engine = self.engine
        ready = engine is not None and engine.is_ready
        yield GaugeMetricFamily("jaxserve:ready", "1 while new requests are taken", float(ready))
        if engine is not None:
            yield from _load_metrics(engine.load())


def _load_metrics(load: EngineLoad) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "jaxserve:num_requests_waiting", "requests that wait to run", load.num_waiting
    )
    yield GaugeMetricFamily("jaxserve:num_requests_running", "requests that run", load.num_running)
    yield _labelled(
        GaugeMetricFamily("jaxserve:kv_pages", "KV pages by state", labels=["state"]),
        {"free": load.num_free_pages, "cached": load.num_cached_pages, "used": load.num_used_pages},
    )
    for name, text, value in (
        ("steps", "steps run", load.num_steps),
        ("preemptions", "requests put back to waiting for lack of pages", load.num_preemptions),
        ("prompt_tokens", "tokens of accepted prompts", load.num_prompt_tokens),
        ("generation_tokens", "tokens generated", load.num_generated_tokens),
    ):
        yield CounterMetricFamily(f"jaxserve:{name}", text, value)
    yield _labelled(
        CounterMetricFamily("jaxserve:requests", "requests that ended", labels=["outcome"]),
        {"finished": load.num_finished, "aborted": load.num_aborted, "shed": load.num_shed},
    )
    yield CounterMetricFamily(
        "jaxserve:prefix_cache_queries", "tokens looked up in the caches", load.num_queried_tokens
    )
    yield _labelled(
        GaugeMetricFamily("jaxserve:stored_pages", "KV pages off the device", labels=["tier"]),
        {"host": load.num_host_pages, "disk": load.num_disk_pages},
    )
    yield CounterMetricFamily(
        "jaxserve:corrupt_pages", "KV pages found damaged on disk", load.num_corrupt_pages
    )
    yield CounterMetricFamily(
        "jaxserve:length_predictions", "answers compared with their prediction",
        load.num_predictions,
    )  # fmt: skip
    for name, text, value in (
        ("mae", "mean absolute error in tokens", load.prediction_mae),
        ("bucket_accuracy", "share in the right power of two", load.prediction_bucket_accuracy),
        ("kendall_tau", "rank correlation with the lengths", load.prediction_kendall_tau),
    ):
        yield GaugeMetricFamily(f"jaxserve:length_prediction_{name}", text, value)
    yield _labelled(
        CounterMetricFamily(
            "jaxserve:prefix_cache_hits", "tokens whose KV was there", labels=["tier"]
        ),
        {"device": load.num_device_hit_tokens, "store": load.num_store_hit_tokens},
    )
    yield _labelled(
        CounterMetricFamily(
            "jaxserve:compiles", "XLA programs compiled; serving must stay 0", labels=["phase"]
        ),
        {"startup": load.compiles_before_ready, "serving": load.compiles_after_ready},
    )


def _labelled(family: GaugeMetricFamily | CounterMetricFamily, values: dict[str, int]) -> Metric:
    for label, value in values.items():
        family.add_metric([label], value)
    return family


class MetricsServer:
    """An HTTP endpoint `/metrics` on a thread of its own.

    Raises:
        ConfigError: the address cannot be listened on.
    """

    def __init__(self, host: str, port: int) -> None:
        self._collector = EngineCollector()
        registry = CollectorRegistry()
        registry.register(self._collector)
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        try:
            server, thread = start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            raise ConfigError(f"cannot serve metrics on {host}:{port}: {error}") from error
        self._server: WSGIServer = server
        self._thread: threading.Thread = thread
        self.address = f"{host}:{server.server_port}"

    def attach(self, engine: AsyncEngine) -> None:
        """Report this engine from now on."""
        self._collector.engine = engine

    def stop(self) -> None:
        """Close the endpoint."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
