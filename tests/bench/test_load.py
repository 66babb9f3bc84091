"""The load generator: when it sends, how much at once, and through a real gRPC server."""

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.bench import load
from jaxserve.bench.load import RequestRecord, arrival_times, run_load
from jaxserve.bench.load_settings import WorkloadSpec
from jaxserve.bench.report import summarize
from jaxserve.bench.workloads import WorkloadItem, build_workload
from jaxserve.core.errors import ConfigError, JaxserveError


def items(count: int, arrivals: list[float] | None = None) -> list[WorkloadItem]:
    times = arrivals or [None] * count
    return [WorkloadItem(time, np.arange(1, 6, dtype=np.int32), 4) for time in times]


@given(st.integers(1, 50), st.floats(0.1, 100), st.floats(0.1, 10), st.integers(0, 99))
def test_random_arrivals_ascend_at_the_exact_mean_rate(
    count: int, rate: float, burstiness: float, seed: int
) -> None:
    times = arrival_times(items(count), rate, burstiness, seed)
    assert len(times) == count and (np.diff(times) >= 0).all() and times[0] >= 0
    assert times[-1] == pytest.approx(count / rate)
    assert np.array_equal(times, arrival_times(items(count), rate, burstiness, seed))


def test_poisson_gaps_vary_as_much_as_they_last_and_steady_ones_less() -> None:
    for burstiness, variation in ((1.0, 1.0), (100.0, 0.1), (0.25, 2.0)):
        gaps = np.diff(arrival_times(items(20_000), 5.0, burstiness))
        assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.1)


def test_arrivals_without_a_rate() -> None:
    assert arrival_times(items(3), float("inf")).tolist() == [0, 0, 0]
    assert arrival_times(items(3)).tolist() == [0, 0, 0]
    assert arrival_times(items(2, [0.5, 2.0])).tolist() == [0.5, 2.0]
    assert arrival_times(items(2, [0.5, 2.0]), float("inf")).tolist() == [0, 0]


@pytest.mark.parametrize(("rate", "burstiness"), [(0.0, 1.0), (-1.0, 1.0), (None, 0.0)])
def test_bad_rates_are_refused(rate: float | None, burstiness: float) -> None:
    with pytest.raises(ConfigError):
        arrival_times(items(1), rate, burstiness)


def test_requests_wait_for_their_time_and_for_the_limit() -> None:
    running, most = 0, 0

    async def send(item: WorkloadItem, record: RequestRecord, clock: load.Clock) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1

    arrivals = np.array([0.0] * 6 + [0.1])
    result = asyncio.run(run_load(items(7), arrivals, send, max_concurrency=2, progress=False))
    assert most == 2
    starts = [record.start for record in result.records]
    assert starts[2] >= 0.009 and starts[4] >= 0.018  # behind the limit, not before it
    assert 0.1 <= starts[6] <= result.duration


def drive(port: int, workload: list[WorkloadItem], **options: int) -> load.LoadResult:
    async def main() -> load.LoadResult:
        async with load.connect(f"127.0.0.1:{port}") as client:
            arrivals = arrival_times(workload)
            return await run_load(workload, arrivals, client.send, progress=False, **options)

    return asyncio.run(main())


def test_every_token_that_a_server_sends_is_counted(server_port: int) -> None:
    spec = WorkloadSpec(
        num_prompts=30, random_input_len=20, random_output_len=15, random_range_ratio=0.5
    )
    workload = list(build_workload(spec, 256).items)
    result = drive(server_port, workload, max_concurrency=10)
    assert [record.error for record in result.records] == [None] * 30
    assert [r.output_len for r in result.records] == [item.output_len for item in workload]
    assert all(r.text for r in result.records)
    summary = summarize(result)
    assert summary["max_concurrent_requests"] <= 10
    assert summary["mean_ttft_ms"] >= 2  # one step
    assert summary["mean_tpot_ms"] >= 1
    for record in result.records:
        assert record.delta_times == sorted(record.delta_times)
        assert record.start <= record.delta_times[0] and record.delta_times[-1] <= result.duration


def test_a_refused_request_stops_nobody(server_port: int) -> None:
    too_long = WorkloadItem(None, np.ones(10_000, np.int32), 4)
    result = drive(server_port, [*items(3), too_long, *items(3)])
    errors = [record.error for record in result.records]
    assert [error is None for error in errors] == [True] * 3 + [False] + [True] * 3
    assert str(errors[3]).startswith("INVALID_ARGUMENT: ")


def test_a_server_that_is_not_there_is_an_error() -> None:
    async def main() -> None:
        async with load.connect("127.0.0.1:1") as client:
            await client.model_info(timeout=0.2)

    with pytest.raises(JaxserveError, match="UNAVAILABLE"):
        asyncio.run(main())
