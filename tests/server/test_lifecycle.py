"""From an open port over READY to the end."""

import asyncio
import re
import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2

from jaxserve.core.errors import ConfigError, EngineDead
from jaxserve.server.serve import serve
from jaxserve.server.server import ServerOptions
from jaxserve.server.v1 import jaxserve_pb2 as pb
from jaxserve.server.watchdog import LEAST_SECONDS, StepWatchdog

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
SERVICE = "jaxserve.v1.Jaxserve"


def test_before_the_engine_is_there(make_engine, serving, make_request) -> None:
    async def main() -> None:
        async with serving(None) as s:
            assert await s.health() == await s.health(SERVICE) == "NOT_SERVING"
            code, details = await s.refusal(make_request())
            assert code is UNAVAILABLE and "warming up" in details
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await s.stub.GetLoad(pb.GetLoadRequest())
            assert caught.value.code() is UNAVAILABLE
            await s.server.attach(make_engine())
            assert await s.health() == await s.health(SERVICE) == "SERVING"
            assert await s.ask(make_request())

    asyncio.run(main())


def test_drain_refuses_new_requests_and_finishes_the_running(
    make_engine, serving, make_request, wait_for, wait_idle
) -> None:
    async def main() -> None:
        engine = make_engine(step_seconds=0.005)
        async with serving(engine, grace_period=10) as s:
            request = make_request(max_tokens=100)
            tasks = [asyncio.create_task(s.ask(request)) for _ in range(8)]
            await wait_for(engine, lambda load: load.num_running == 8)
            draining = asyncio.create_task(s.server.drain())
            await asyncio.sleep(0.05)
            assert await s.health() == await s.health(SERVICE) == "NOT_SERVING"
            code, _ = await s.refusal(request)
            assert code is UNAVAILABLE
            load = await s.stub.GetLoad(pb.GetLoadRequest())
            assert load.num_running == 8
            answers = await asyncio.gather(*tasks)
            assert all(a[-1].usage.completion_tokens == 100 for a in answers)
            await asyncio.wait_for(draining, 1)
            await wait_idle(engine)

    asyncio.run(main())


def test_drain_cuts_off_what_outlives_the_grace_period(
    make_engine, serving, make_request, wait_idle
) -> None:
    async def main() -> None:
        engine = make_engine(step_seconds=0.02)
        async with serving(engine, grace_period=0.1) as s:
            call = s.stub.Generate(make_request(max_tokens=400))
            await anext(aiter(call))
            await asyncio.wait_for(s.server.drain(), 5)
            messages = []
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for message in call:
                    messages.append(message)
            assert caught.value.code() is UNAVAILABLE  # not taken for a complete answer
            assert messages[-1].finish_reason == pb.FINISH_REASON_ABORT
            await wait_idle(engine)

    asyncio.run(main())


def test_a_health_watch_sees_every_change_and_does_not_hold_up_the_end(
    make_engine, serving
) -> None:
    async def main() -> None:
        states = health_pb2.HealthCheckResponse
        async with serving(None) as s:
            watch = s.health_stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
            assert (await watch.read()).status == states.NOT_SERVING
            await s.server.attach(make_engine())
            assert (await watch.read()).status == states.SERVING
            await s.server.drain()
            assert (await watch.read()).status == states.NOT_SERVING
            await asyncio.wait_for(s.server.stop(), 3)

    asyncio.run(main())


def test_a_taken_port_is_a_clear_error(serving) -> None:
    async def main() -> None:
        async with serving(None) as s:
            options = ServerOptions(port=s.server.port)
            taken = f"cannot listen on 127.0.0.1:{s.server.port}: .* --port 0 takes a free one"
            with pytest.raises(ConfigError, match=taken):
                await serve(lambda: pytest.fail("must not build an engine"), options)

    asyncio.run(main())


def test_a_failing_start_is_passed_on_and_the_port_closed() -> None:
    def build() -> None:
        raise ConfigError("no such mesh")

    with pytest.raises(ConfigError, match="no such mesh"):
        asyncio.run(serve(build, ServerOptions(port=0)))  # type: ignore[arg-type]


def test_a_dead_engine_ends_the_server(make_engine) -> None:
    engine = make_engine()
    lines: list[str] = []

    def announce(line: str) -> None:
        lines.append(line)
        threading.Thread(target=engine.shutdown).start()

    with pytest.raises(EngineDead):
        asyncio.run(
            asyncio.wait_for(serve(lambda: engine, ServerOptions(port=0), announce=announce), 5)
        )
    assert re.fullmatch(
        r"READY 127\.0\.0\.1:\d+ model=fake seconds=\d+\.\d programs_compiled=0", lines[0]
    )


@pytest.mark.parametrize(
    "options",
    [{"port": -1}, {"port": 65536}, {"metrics_port": -1}, {"grace_period": -1},
     {"grace_period": float("inf")}, {"max_message_mib": 0}, {"max_message_mib": 4096},
     {"max_concurrent_streams": 0}, {"max_connections": 10**10}, {"step_timeout": 1e300},
     {"read_timeout": float("nan")}, {"max_message_mib": float("nan")}],
)  # fmt: skip
def test_impossible_options(options: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        ServerOptions(**options)


def test_the_watchdog_counts_no_time_between_steps_and_none_it_did_not_see(make_engine) -> None:
    engine = make_engine()
    watchdog = StepWatchdog(engine)
    assert watchdog.limit == LEAST_SECONDS
    engine.pulse.turn = 1
    assert watchdog.look(LEAST_SECONDS) is None  # it may have begun a moment ago
    assert watchdog.look(LEAST_SECONDS) is None
    engine.pulse.turn = 2
    assert watchdog.look(LEAST_SECONDS) is None
    engine.pulse.turn = None
    assert watchdog.look(LEAST_SECONDS) is None
    engine.pulse.turn = 3
    assert [watchdog.look(200.0) for _ in range(3)] == [None, None, 400.0]
    engine.pulse.longest = 100.0  # as a step of a large model on a small machine
    assert watchdog.limit == 2000.0 and watchdog.look(200.0) is None
