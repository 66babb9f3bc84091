"""OpenTelemetry traces: a span per request, made when it has ended, with its phases inside."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxserve.core.errors import ConfigError
from jaxserve.core.request import FinishReason
from jaxserve.engine.records import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

SERVICE_NAME = "jaxserve"
EXPORT_TIMEOUT_SECONDS = 5

_FAILURES = {
    FinishReason.SHED: "it could not meet its target any more",
    FinishReason.ERROR: "it failed; the error is in the answer",
}


def otlp_exporter(endpoint: str) -> "SpanExporter":
    """Sends spans to a collector by OTLP over gRPC.

    Args:
        endpoint: `http://host:port` or `host:port`; `https://` for TLS.

    Raises:
        ConfigError: the packages of the extra `otel` are missing.
    """
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigError(
            f"traces need the extra otel (pip install 'jaxserve[otel]'): {error}"
        ) from error
    address = endpoint if "://" in endpoint else f"http://{endpoint}"
    return OTLPSpanExporter(
        endpoint=address,
        insecure=not address.startswith("https://"),
        timeout=EXPORT_TIMEOUT_SECONDS,
    )


class RequestTraces:
    """Makes the spans; a `RequestConsumer`.

    A span `llm_request` from arrival to the end, and under it `queue`, `prefill` and `decode` as
    far as the request came. With a `traceparent` it becomes part of the caller's trace, and is
    sampled if that is. Attributes are those of OpenTelemetry's gen_ai conventions and, for times,
    of vLLM; no text of prompt or answer.

    Args:
        exporter: where spans go, in batches, on a thread of its own.
        model: the served model's name.

    Raises:
        ConfigError: the packages of the extra `otel` are missing.
    """

    def __init__(self, exporter: "SpanExporter", model: str) -> None:
        try:
            from opentelemetry.sdk.resources import SERVICE_NAME as NAME_KEY
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ConfigError(
                f"traces need the extra otel (pip install 'jaxserve[otel]'): {error}"
            ) from error
        resource = Resource.create({NAME_KEY: SERVICE_NAME})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("jaxserve")
        self._propagator = TraceContextTextMapPropagator()
        self._model = model

    def __call__(self, record: RequestRecord, prompt_token_ids: Sequence[int]) -> None:
        """Make the spans of one request."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        clock = _Clock()
        span = self._tracer.start_span(
            "llm_request",
            context=self._propagator.extract({"traceparent": record.traceparent}),
            kind=SpanKind.SERVER,
            attributes=_attributes(record, self._model),
            start_time=clock.nanoseconds(record.arrival),
        )
        if record.finish_reason in _FAILURES:
            span.set_status(Status(StatusCode.ERROR, _FAILURES[record.finish_reason]))
        inside = set_span_in_context(span)
        for name, start, end in _phases(record):
            phase = self._tracer.start_span(
                name, context=inside, start_time=clock.nanoseconds(start)
            )
            phase.end(clock.nanoseconds(end))
        span.end(clock.nanoseconds(record.finished))

    def close(self) -> None:
        """Send what is left; waits for that no longer than a few seconds."""
        self._provider.shutdown()


class _Clock:
    """The engine's clock (`time.monotonic`) in nanoseconds since 1970."""

    def __init__(self) -> None:
        self._offset = time.time_ns() - time.monotonic_ns()

    def nanoseconds(self, seconds: float) -> int:
        return round(seconds * 1e9) + self._offset


def _phases(record: RequestRecord) -> list[tuple[str, float, float]]:
    """Name, start and end of each phase that the request came to."""
    marks = (record.arrival, record.started, record.first_token, None)
    phases = []
    for i, name in enumerate(("queue", "prefill", "decode")):
        start, following = marks[i], marks[i + 1]
        if start is not None:
            phases.append((name, start, record.finished if following is None else following))
    return phases


def _attributes(record: RequestRecord, model: str) -> dict[str, Any]:
    values = {
        "gen_ai.request.id": record.request_id,
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.request.max_tokens": record.asked_max_tokens,
        "gen_ai.request.temperature": record.temperature,
        "gen_ai.request.top_p": record.top_p,
        "gen_ai.response.finish_reasons": (record.finish_reason.value,),
        "gen_ai.usage.input_tokens": record.num_prompt_tokens,
        "gen_ai.usage.output_tokens": record.num_output_tokens,
        "gen_ai.usage.prompt_tokens": record.num_prompt_tokens,  # as they were called before
        "gen_ai.usage.completion_tokens": record.num_output_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.num_cached_tokens,
        "gen_ai.latency.time_in_queue": record.queue_seconds,
        "gen_ai.latency.time_to_first_token": record.time_to_first_token,
        "gen_ai.latency.time_in_model_prefill": record.prefill_seconds,
        "gen_ai.latency.time_in_model_decode": record.decode_seconds,
        "gen_ai.latency.time_in_model_inference": record.inference_seconds,
        "gen_ai.latency.e2e": record.e2e_seconds,
        "jaxserve.tenant": record.tenant or None,
        "jaxserve.preemptions": record.num_preemptions,
    }
    return {name: value for name, value in values.items() if value is not None}
