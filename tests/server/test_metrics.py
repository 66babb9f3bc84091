"""What Prometheus gets to see."""

import asyncio
import socket
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxserve.core.errors import ConfigError
from jaxserve.server.metrics import MetricsServer
from jaxserve.server.server import GrpcServer, ServerOptions


def scrape(address: str) -> dict[tuple[str, ...], float]:
    """Samples by (name, label value)."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as response:
        text = response.read().decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_metrics_before_and_after_a_request(make_engine, serving, make_request) -> None:
    async def main() -> None:
        async with serving(None, metrics_port=free_port()) as s:
            address = s.server.metrics_address
            before = await asyncio.to_thread(scrape, address)
            assert before["jaxserve:ready",] == 0
            assert ("jaxserve:steps_total",) not in before
            await s.server.attach(make_engine(num_pages=100))
            await s.ask(make_request([1, 2, 3], max_tokens=5))
            after = await asyncio.to_thread(scrape, address)
        assert after["jaxserve:ready",] == 1
        assert after["jaxserve:prompt_tokens_total",] == 3
        assert after["jaxserve:generation_tokens_total",] == 5
        assert after["jaxserve:requests_total", "finished"] == 1
        assert after["jaxserve:requests_total", "aborted"] == 0
        assert after["jaxserve:num_requests_running",] == 0
        assert after["jaxserve:num_requests_waiting",] == 0
        assert after["jaxserve:kv_pages", "free"] + after["jaxserve:kv_pages", "cached"] == 100
        assert after["jaxserve:kv_pages", "used"] == 0
        assert after["jaxserve:compiles_total", "serving"] == 0
        assert ("jaxserve:compiles_total", "startup") in after
        assert after["jaxserve:steps_total",] >= 5

    asyncio.run(main())


def test_off_by_default(serving) -> None:
    async def main() -> None:
        async with serving(None, metrics_port=0) as s:
            assert s.server.metrics_address is None

    asyncio.run(main())


def test_a_taken_metrics_port_is_a_clear_error() -> None:
    port = free_port()
    first = MetricsServer("127.0.0.1", port)
    try:
        with pytest.raises(ConfigError, match=f"metrics on 127.0.0.1:{port}"):
            asyncio.run(_start_only(ServerOptions(port=0, metrics_port=port)))
    finally:
        first.stop()


async def _start_only(options: ServerOptions) -> None:
    server = GrpcServer(options)
    try:
        await server.start()
    finally:
        await server.stop(0)
