"""The metrics as Prometheus families, put together when they are scraped."""

from collections.abc import Iterator, Mapping

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from jaxserve.core.request import FinishReason
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.outputs import EngineLoad, ModelInfo
from jaxserve.engine.records import EngineRecords
from jaxserve.server.metrics.names import MetricNames
from jaxserve.server.metrics.texts import COUNTERS, GAUGES, HISTOGRAMS
from jaxserve.server.metrics.totals import Totals

ENGINE = "0"  # vLLM numbers its engines; there is one here
LABELS = ("model_name", "engine")


class EngineCollector(Collector):
    """Everything about one engine; only `jaxserve:ready` until there is one.

    Args:
        names: what the metrics are called.
    """

    def __init__(self, names: MetricNames) -> None:
        self._names = names
        self._engine: AsyncEngine | None = None
        self._totals: Totals | None = None

    @property
    def totals(self) -> Totals | None:
        """What was counted, as of now; None before there is an engine."""
        return None if self._totals is None else self._totals.snapshot()

    def attach(self, engine: AsyncEngine) -> None:
        """Count what this engine does from now on."""
        totals = Totals(engine.model_info.max_model_len)
        engine.records.observe(totals)
        self._engine, self._totals = engine, totals

    def count(self, name: str) -> None:
        """Count one more of what `Totals.counts` has by this name."""
        if self._totals is not None:
            self._totals.count(name)

    def collect(self) -> Iterator[Metric]:
        """All metrics as of now."""
        engine, totals = self._engine, self._totals
        ready = engine is not None and engine.is_ready
        yield GaugeMetricFamily("jaxserve:ready", GAUGES["ready"], float(ready))
        if engine is None or totals is None:
            return
        write = _Writer(self._names, (engine.model_info.name, ENGINE))
        load, now = engine.load(), totals.snapshot()
        yield from _gauges(write, load)
        yield from _counters(write, load, now, engine.has_store)
        yield from _steps(write, now, engine.records)
        for name, text in HISTOGRAMS.items():
            yield write.histogram(name, text, now)
        if self._names.with_deprecated:
            yield from _deprecated(write, load, now)
        yield from _infos(self._names, engine.model_info)


class _Writer:
    """Makes families with the labels that all metrics of an engine have."""

    def __init__(self, names: MetricNames, labels: tuple[str, str]) -> None:
        self._names = names
        self._labels = labels

    def gauge(self, name: str, value: float) -> Metric:
        family = GaugeMetricFamily(self._names(name), GAUGES[name], labels=LABELS)
        family.add_metric(self._labels, value)
        return family

    def gauges(self, name: str, label: str, values: Mapping[str, float]) -> Metric:
        family = GaugeMetricFamily(self._names(name), GAUGES[name], labels=(*LABELS, label))
        for value, number in values.items():
            family.add_metric((*self._labels, value), number)
        return family

    def counter(self, name: str, value: float) -> Metric:
        family = CounterMetricFamily(self._names(name), COUNTERS[name], labels=LABELS)
        family.add_metric(self._labels, value)
        return family

    def counters(self, name: str, labels: tuple[str, ...], values: Mapping) -> Metric:
        """One sample per key of `values`: the value of the label, or a tuple of values."""
        family = CounterMetricFamily(self._names(name), COUNTERS[name], labels=(*LABELS, *labels))
        for key, number in values.items():
            parts = key if isinstance(key, tuple) else (key,)
            family.add_metric((*self._labels, *map(str, parts)), number)
        return family

    def histogram(self, name: str, text: str, totals: Totals, *, of: str = "") -> Metric:
        counted = totals.histograms[of or name]
        family = HistogramMetricFamily(self._names(name), text, labels=LABELS)
        family.add_metric(self._labels, counted.buckets(), counted.sum)
        return family


def _gauges(write: _Writer, load: EngineLoad) -> Iterator[Metric]:
    yield write.gauge("num_requests_running", load.num_running)
    yield write.gauge("num_requests_waiting", load.num_waiting)
    yield write.gauge("kv_cache_usage_perc", _usage(load))
    pages = {
        "free": load.num_free_pages, "cached": load.num_cached_pages, "used": load.num_used_pages
    }  # fmt: skip
    yield write.gauges("kv_pages", "state", pages)
    stored = {"host": load.num_host_pages, "disk": load.num_disk_pages}
    yield write.gauges("stored_pages", "tier", stored)
    yield write.gauge("length_prediction_mae", load.prediction_mae)
    yield write.gauge("length_prediction_bucket_accuracy", load.prediction_bucket_accuracy)
    yield write.gauge("length_prediction_kendall_tau", load.prediction_kendall_tau)


def _usage(load: EngineLoad) -> float:
    return load.num_used_pages / load.num_total_pages if load.num_total_pages else 0.0


def _counters(
    write: _Writer, load: EngineLoad, totals: Totals, has_store: bool
) -> Iterator[Metric]:
    counts = totals.counts
    yield write.counter("num_preemptions", load.num_preemptions)
    yield write.counter("prompt_tokens", counts["prompt_tokens"])
    yield write.counter("prompt_tokens_cached", counts["prompt_tokens_cached"])
    sources = {
        "local_compute": counts["prompt_tokens"] - counts["prompt_tokens_cached"],
        "local_cache_hit": counts["prompt_tokens_cached"] - counts["prompt_tokens_fetched"],
        "external_kv_transfer": counts["prompt_tokens_fetched"],
    }
    yield write.counters("prompt_tokens_by_source", ("source",), sources)
    yield write.counter("generation_tokens", counts["generation_tokens"])
    finished = {reason.value: totals.finished[reason] for reason in FinishReason}
    yield write.counters("request_success", ("finished_reason",), finished)
    yield write.counter("prefix_cache_queries", load.num_queried_tokens)
    yield write.counter("prefix_cache_hits", load.num_device_hit_tokens)
    missed = load.num_queried_tokens - load.num_device_hit_tokens
    yield write.counter("external_prefix_cache_queries", missed if has_store else 0)
    yield write.counter("external_prefix_cache_hits", load.num_store_hit_tokens)
    yield write.counter("schema_mismatches", counts["schema_mismatches"])
    yield write.counter("restored_tokens", load.num_restored_tokens)
    yield write.counter("corrupt_pages", load.num_corrupt_pages)
    yield write.counter("length_predictions", load.num_predictions)
    compiles = {
        "startup": load.compiles_before_ready,
        "planned": load.compiles_planned,
        "serving": load.compiles_after_ready,
    }
    yield write.counters("compiles", ("phase",), compiles)


def _steps(write: _Writer, totals: Totals, records: EngineRecords) -> Iterator[Metric]:
    """What the fixed shapes of XLA's programs make of the steps."""
    for name in ("steps", "step_tokens", "step_padding_tokens", "step_rows", "step_padding_rows"):
        yield write.counter(name, totals.counts[name])
    used = {
        **dict.fromkeys((("tokens", size) for size in records.token_buckets), 0),
        **dict.fromkeys((("rows", size) for size in records.row_buckets), 0),
        **{("tokens", size): n for size, n in totals.token_buckets.items()},
        **{("rows", size): n for size, n in totals.row_buckets.items()},
    }
    yield write.counters("bucket_steps", ("axis", "bucket"), used)
    last = records.steps()
    padding = {
        "tokens": _share(
            sum(s.num_padding_tokens for s in last), sum(s.token_bucket for s in last)
        ),
        "rows": _share(
            sum(s.row_bucket - s.num_sampled for s in last), sum(s.row_bucket for s in last)
        ),
    }
    yield write.gauges("padding_fraction", "axis", padding)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _deprecated(write: _Writer, load: EngineLoad, totals: Totals) -> Iterator[Metric]:
    yield write.gauge("gpu_cache_usage_perc", _usage(load))
    yield write.histogram(
        "time_per_output_token_seconds",
        "The same as inter_token_latency_seconds, under the name it had before.",
        totals,
        of="inter_token_latency_seconds",
    )


def _infos(names: MetricNames, info: ModelInfo) -> Iterator[Metric]:
    cache = {
        "engine": ENGINE,
        "block_size": str(info.page_size),
        "num_gpu_blocks": str(info.num_pages),
        "cache_dtype": info.kv_cache_dtype,
    }
    yield _info(names("cache_config_info"), GAUGES["cache_config_info"], cache)
    model = {
        "model_name": info.name,
        "family": info.family,
        "dtype": info.dtype,
        "mesh": info.mesh,
        "attention": info.attention_implementation,
        "linear": info.linear_implementation,
        "platform": info.platform,
        "max_model_len": str(info.max_model_len),
    }
    yield _info(names("model_info"), GAUGES["model_info"], model)


def _info(name: str, text: str, labels: dict[str, str]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=tuple(labels))
    family.add_metric(tuple(labels.values()), 1)
    return family
