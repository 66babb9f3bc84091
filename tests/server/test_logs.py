"""Log lines: their form, the request's id in them, and what they never say."""

import asyncio
import json
import logging
import sys

import grpc
import pytest

from jaxserve.core.errors import ConfigError
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.service_params import ServiceParams
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.server.log_format import (
    STARTING,
    JsonFormatter,
    TextFormatter,
    about_request,
    configure_logging,
)
from jaxserve.server.observability import Observability, ObservabilityOptions
from jaxserve.server.request_feed import RequestFeed


class Lines(logging.Handler):
    """Keeps what is logged, formatted."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def log() -> logging.Logger:
    return logging.getLogger("jaxserve.requests")


def logged(log: logging.Logger, formatter: logging.Formatter) -> list[str]:
    handler = Lines(formatter)
    log.addHandler(handler)
    return handler.lines


def answer(engine: AsyncEngine, options: ObservabilityOptions, request_id: str = "r-1") -> None:
    """Ask an engine something, with an observer of it."""

    async def ask() -> None:
        params = SamplingParams(max_tokens=3, ignore_eos=True)
        service = ServiceParams(tenant="gold")
        async for _ in engine.generate(request_id, list(b"secret"), params, service):
            pass

    watch = Observability(options)
    watch.attach(engine)
    asyncio.run(ask())
    engine.shutdown()
    watch.close()


def test_a_line_per_request_as_json(make_engine, log) -> None:
    lines = logged(log, JsonFormatter())
    answer(make_engine(), ObservabilityOptions(log_requests=True))
    [line] = lines
    fields = json.loads(line)
    assert "secret" not in line
    assert fields["message"] == "request ended"
    assert (fields["level"], fields["logger"]) == ("info", "jaxserve.requests")
    assert (fields["request_id"], fields["tenant"]) == ("r-1", "gold")
    assert (fields["prompt_tokens"], fields["output_tokens"]) == (6, 3)
    assert (fields["cached_tokens"], fields["preemptions"]) == (0, 0)
    assert fields["finish_reason"] == "length"
    parts = fields["queue_seconds"] + fields["prefill_seconds"] + fields["decode_seconds"]
    assert fields["e2e_seconds"] == pytest.approx(parts, abs=1e-4)
    assert fields["ttft_seconds"] <= fields["e2e_seconds"]


def test_a_line_per_request_as_text(make_engine, log) -> None:
    lines = logged(log, TextFormatter())
    answer(make_engine(), ObservabilityOptions(log_requests=True))
    [line] = lines
    assert "request ended finish_reason=length prompt_tokens=6" in line
    assert line.endswith("[request r-1]")
    assert "secret" not in line


def test_prompts_only_when_asked_for(make_engine, log) -> None:
    lines = logged(log, JsonFormatter())
    answer(make_engine(), ObservabilityOptions(log_requests=True, log_prompts=True))
    assert json.loads(lines[0])["prompt"] == "secret"


def test_nothing_by_default(make_engine, log) -> None:
    lines = logged(log, JsonFormatter())
    engine = make_engine()
    answer(engine, ObservabilityOptions())
    assert lines == [] and len(engine.records.requests()) == 1


def test_prompts_without_requests_are_refused() -> None:
    with pytest.raises(ConfigError, match="log_requests"):
        ObservabilityOptions(log_prompts=True)


def test_text_of_callers_cannot_begin_a_line(make_engine, log) -> None:
    lines = logged(log, TextFormatter())
    answer(make_engine(), ObservabilityOptions(log_requests=True), "x\n2000 INFO root: forged")
    [line] = lines
    assert "\n" not in line and "x\\n2000" in line


def test_a_traceback_is_kept(log) -> None:
    text, as_json = logged(log, TextFormatter()), logged(log, JsonFormatter())
    try:
        raise ValueError("broken")
    except ValueError:
        with about_request("r-2"):
            log.exception("failed")
    assert "[request r-2]\nTraceback" in text[0] and "ValueError: broken" in text[0]
    fields = json.loads(as_json[0])
    assert "ValueError: broken" in fields["exception"] and fields["request_id"] == "r-2"


def test_refusals_over_grpc_name_the_request(make_engine, serving, make_request) -> None:
    logger = logging.getLogger("jaxserve.server.handlers")
    lines = logged(logger, JsonFormatter())
    logger.setLevel(logging.DEBUG)

    async def main() -> None:
        async with serving(make_engine()) as s:
            with pytest.raises(grpc.aio.AioRpcError):
                await s.ask(make_request(list(range(200)) * 10, request_id="too-long"))

    asyncio.run(main())
    assert [json.loads(line)["request_id"] for line in lines] == ["too-long"]


def test_the_level_is_jaxserves_own() -> None:
    logger = logging.getLogger("jaxserve")
    configure_logging("json", "error")
    assert logger.level == logging.ERROR
    configure_logging("text", None)
    assert logger.level == logging.ERROR
    for name in STARTING:  # what -v did not ask for, but how the start goes
        assert logging.getLogger(name).isEnabledFor(logging.INFO)
    configure_logging("text", "warning")
    assert not any(logging.getLogger(name).isEnabledFor(logging.INFO) for name in STARTING)


def test_a_consumer_that_raises_is_called_again(make_engine, caplog) -> None:
    seen: list[str] = []

    def consume(record, prompt_token_ids) -> None:
        seen.append(record.request_id)
        if len(seen) == 1:
            raise RuntimeError("broken")

    feed = RequestFeed([consume])
    engine = make_engine()
    engine.records.observe(feed)

    async def ask() -> None:
        for name in ("a", "b"):
            async for _ in engine.generate(name, [1, 2], SamplingParams(max_tokens=1)):
                pass

    asyncio.run(ask())
    feed.close()
    assert seen == ["a", "b"]
    assert "'a' could not be passed on" in caplog.text
    assert "jaxserve-requests" not in str(sys.exc_info())
