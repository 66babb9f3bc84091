"""Traces of requests, as an OpenTelemetry collector gets them."""

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.testclient import TestClient

from jaxserve.core.errors import ConfigError
from jaxserve.core.request import FinishReason
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.service_params import ServiceParams
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.records import RequestRecord
from jaxserve.server.context import ServerContext
from jaxserve.server.http.app import make_app
from jaxserve.server.observability import Observability, ObservabilityOptions
from jaxserve.server.traces import RequestTraces

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def record(**changes: Any) -> RequestRecord:
    fields: dict[str, Any] = {
        "number": 1, "request_id": "r", "tenant": "gold", "traceparent": "", "arrival": 10.0,
        "started": 11.0, "first_token": 13.0, "last_token": 17.0, "finished": 17.0,
        "num_prompt_tokens": 5, "num_output_tokens": 3, "num_cached_tokens": 4,
        "num_fetched_tokens": 0, "num_preemptions": 0, "is_answered": True, "max_tokens": 3,
        "asked_max_tokens": 3, "temperature": 0.5, "top_p": 1.0,
        "finish_reason": FinishReason.LENGTH,
    }  # fmt: skip
    return RequestRecord(**{**fields, **changes})


def spans_of(*records: RequestRecord) -> list[ReadableSpan]:
    exporter = InMemorySpanExporter()
    traces = RequestTraces(exporter, "fake")
    for one in records:
        traces(one, [1, 2, 3])
    traces._provider.force_flush()
    spans = list(exporter.get_finished_spans())
    traces.close()
    return spans


def seconds(span: ReadableSpan, zero: ReadableSpan) -> tuple[float, float]:
    """Start and end, since the start of another span."""
    assert span.start_time and span.end_time and zero.start_time
    return (span.start_time - zero.start_time) / 1e9, (span.end_time - zero.start_time) / 1e9


def test_phases_lie_inside_the_request() -> None:
    spans = {span.name: span for span in spans_of(record())}
    root = spans.pop("llm_request")
    assert root.kind is SpanKind.SERVER and root.parent is None
    assert seconds(root, root) == (0, 7)
    times = {name: seconds(span, root) for name, span in spans.items()}
    assert times == {"queue": (0, 1), "prefill": (1, 3), "decode": (3, 7)}
    for span in spans.values():
        assert span.parent is not None and root.context is not None
        assert span.parent.span_id == root.context.span_id
        assert span.context is not None and span.context.trace_id == root.context.trace_id


def test_attributes() -> None:
    root = next(span for span in spans_of(record()) if span.name == "llm_request")
    attributes = dict(root.attributes or {})
    assert attributes == {
        "gen_ai.request.id": "r",
        "gen_ai.request.model": "fake",
        "gen_ai.response.model": "fake",
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.prompt_tokens": 5,
        "gen_ai.usage.completion_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.latency.time_in_queue": 1.0,
        "gen_ai.latency.time_to_first_token": 3.0,
        "gen_ai.latency.time_in_model_prefill": 2.0,
        "gen_ai.latency.time_in_model_decode": 4.0,
        "gen_ai.latency.time_in_model_inference": 6.0,
        "gen_ai.latency.e2e": 7.0,
        "jaxserve.tenant": "gold",
        "jaxserve.preemptions": 0,
    }
    assert root.resource.attributes["service.name"] == "jaxserve"


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"started": None, "first_token": None, "last_token": None}, {"queue"}),
        ({"first_token": None, "last_token": None}, {"queue", "prefill"}),
    ],
)
def test_a_request_that_did_not_come_far(changes: dict[str, None], names: set[str]) -> None:
    spans = spans_of(record(finish_reason=FinishReason.SHED, **changes))
    assert {span.name for span in spans} == {"llm_request", *names}
    root = next(span for span in spans if span.name == "llm_request")
    assert root.status.status_code is StatusCode.ERROR
    assert max(seconds(span, root)[1] for span in spans) == 7


def test_it_joins_the_callers_trace() -> None:
    parent = f"00-{TRACE_ID}-{PARENT_ID}-01"
    root = next(s for s in spans_of(record(traceparent=parent)) if s.name == "llm_request")
    assert root.context is not None and root.parent is not None
    assert f"{root.context.trace_id:032x}" == TRACE_ID
    assert f"{root.parent.span_id:016x}" == PARENT_ID


def test_what_the_caller_does_not_sample_is_not_sent() -> None:
    assert spans_of(record(traceparent=f"00-{TRACE_ID}-{PARENT_ID}-00")) == []


def test_a_malformed_traceparent_is_ignored() -> None:
    assert len(spans_of(record(traceparent="nonsense"))) == 4


async def ask(engine: AsyncEngine, traceparent: str = "") -> None:
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    service = ServiceParams(traceparent=traceparent)
    async for _ in engine.generate("asked", list(b"a secret prompt"), params, service):
        pass


def traced(engine: AsyncEngine) -> tuple[ServerContext, InMemorySpanExporter]:
    """A server's context around an engine, and where its spans go."""
    exporter = InMemorySpanExporter()
    context = ServerContext(observability=Observability(exporter=exporter))
    context.engine = engine
    return context, exporter


def trace_ids(context: ServerContext, exporter: InMemorySpanExporter) -> list[str]:
    """Those of the requests' spans; ends the tracing."""
    context.observability.close()
    spans = [span for span in exporter.get_finished_spans() if span.name == "llm_request"]
    return [f"{span.context.trace_id:032x}" for span in spans if span.context is not None]


def test_a_header_puts_all_answers_into_the_callers_trace(make_engine) -> None:
    context, exporter = traced(make_engine())
    answer = TestClient(make_app(context)).post(
        "/v1/completions",
        json={"model": "fake", "prompt": [1, 2, 3], "max_tokens": 2, "n": 2},
        headers={"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"},
    )
    assert answer.status_code == 200
    assert trace_ids(context, exporter) == [TRACE_ID, TRACE_ID]


def test_so_does_a_grpc_calls_metadata(make_engine, serving, make_request) -> None:
    context, exporter = traced(make_engine())

    async def main() -> None:
        async with serving(None, context=context) as s:
            metadata = (("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01"),)
            await s.ask(make_request(), metadata=metadata)

    asyncio.run(main())
    assert trace_ids(context, exporter) == [TRACE_ID]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """As much of an OpenTelemetry collector as it takes."""

    def __init__(self) -> None:
        self.requests: list[pb.ExportTraceServiceRequest] = []

    def Export(self, request: Any, context: Any) -> pb.ExportTraceServiceResponse:
        self.requests.append(request)
        return pb.ExportTraceServiceResponse()


def test_spans_reach_a_collector(make_engine) -> None:
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        watch = Observability(ObservabilityOptions(otlp_endpoint=f"http://127.0.0.1:{port}"))
        engine = make_engine()
        watch.attach(engine)
        asyncio.run(ask(engine, f"00-{TRACE_ID}-{PARENT_ID}-01"))
        engine.shutdown()
        watch.close()  # sends what is left
    finally:
        server.stop(0).wait()
    spans = [
        span
        for request in collector.requests
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    assert {span.name for span in spans} == {"llm_request", "queue", "prefill", "decode"}
    assert {span.trace_id.hex() for span in spans} == {TRACE_ID}
    assert b"secret" not in b"".join(r.SerializeToString() for r in collector.requests)


def test_a_collector_that_is_not_there_holds_up_nobody(make_engine) -> None:
    watch = Observability(ObservabilityOptions(otlp_endpoint="127.0.0.1:1"))
    engine = make_engine()
    watch.attach(engine)
    asyncio.run(ask(engine))
    assert len(engine.records.requests()) == 1
    engine.shutdown()
    watch.close()


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"jaxserve\[otel\]"):
        Observability(ObservabilityOptions(otlp_endpoint="http://127.0.0.1:4317"))
