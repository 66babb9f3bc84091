"""From an open port over READY to the end."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from jaxserve.core.errors import ConfigError, EngineDead, StepHung
from jaxserve.server.serve import serve
from jaxserve.server.server import ServerOptions
from jaxserve.server.v1 import jaxserve_pb2 as pb
from jaxserve.server.v1 import jaxserve_pb2_grpc
from jaxserve.server.watchdog import LEAST_SECONDS, StepWatchdog
from tests.waiting import PATIENCE

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
            with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{s.server.port}"):
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
     {"max_concurrent_streams": 0}],
)  # fmt: skip
def test_impossible_options(options: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        ServerOptions(**options)


# The process as a whole, with real signals.

PROGRAM = """
import asyncio, sys, time
from jaxserve.server.serve import serve
from jaxserve.server.server import ServerOptions
from jaxserve.testing.fake_engine import fake_engine

def build():
    print("BUILDING", flush=True)
    time.sleep(float(sys.argv[1]))
    return fake_engine(step_seconds=0.02)

status = asyncio.run(serve(build, ServerOptions(port=0, grace_period=20)))
print("END", "jax" in sys.modules, flush=True)
sys.exit(status)
"""


# The command, with an engine whose device hangs at the fourth step.
HANGING = """
import sys, threading, time, types
from jaxserve.cli.main import main
from jaxserve.engine import async_engine
from jaxserve.server import serve, signals
from jaxserve.testing.fake_engine import fake_engine
from jaxserve.testing.fake_executor import FakeExecutor

class Hanging(FakeExecutor):
    def collect(self, handle):
        if handle.number == 3:
            print("HANGS", flush=True)
            threading.Event().wait()
        return super().collect(handle)

build = types.ModuleType("jaxserve.engine.build")
build.build_engine = lambda config: fake_engine(executor=Hanging(page_size=4))
sys.modules["jaxserve.engine.build"] = build
async_engine.LEAST_PATIENCE = serve._SAVE_SECONDS = signals.HARD_STOP_SECONDS = 0.2
if sys.argv[1] == "loop":
    serve._ready_line = lambda *_: print("BLOCKED", flush=True) or time.sleep(60)
main(["serve", "m", "--port", "0", "--http-port", "0", *sys.argv[2:]])
"""


@contextlib.contextmanager
def process_of(program: str, *args: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", textwrap.dedent(program), *args]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    options = {"stdout": subprocess.PIPE, "text": True, "env": env, **options}
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def server_process(build_seconds: float = 0.0) -> Iterator[subprocess.Popen[str]]:
    with process_of(PROGRAM, str(build_seconds)) as process:
        assert process.stdout and process.stdout.readline() == "BUILDING\n"
        yield process


def test_sigterm_lets_a_stream_finish_then_ends(make_request) -> None:
    async def main(process: subprocess.Popen[str]) -> None:
        assert process.stdout
        address = process.stdout.readline().split()[1]
        async with grpc.aio.insecure_channel(address) as channel:
            stub = jaxserve_pb2_grpc.JaxserveStub(channel)
            call = stub.Generate(make_request(max_tokens=40))
            await anext(aiter(call))
            process.send_signal(signal.SIGTERM)
            messages = [message async for message in call]
            assert messages[-1].usage.completion_tokens == 40
        assert process.stdout.readline() == "END False\n"
        assert process.wait(5) == 0

    with server_process() as process:
        asyncio.run(main(process))


def test_a_second_signal_does_not_wait(make_request) -> None:
    async def main(process: subprocess.Popen[str]) -> None:
        assert process.stdout
        address = process.stdout.readline().split()[1]
        async with grpc.aio.insecure_channel(address) as channel:
            stub = jaxserve_pb2_grpc.JaxserveStub(channel)
            call = stub.Generate(make_request(max_tokens=500))  # ten seconds' worth
            await anext(aiter(call))
            process.send_signal(signal.SIGINT)
            await asyncio.sleep(0.2)
            process.send_signal(signal.SIGINT)
            assert await asyncio.to_thread(process.stdout.readline) == "END False\n"
            assert process.wait(PATIENCE) == 128 + signal.SIGINT
            with pytest.raises(grpc.aio.AioRpcError):
                _ = [message async for message in call]

    with server_process() as process:
        asyncio.run(main(process))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_start_up_stops_at_once(number: int) -> None:
    with server_process(build_seconds=60) as process:
        process.send_signal(number)
        assert process.stdout and process.stdout.readline() == "END False\n"
        assert process.wait(PATIENCE) == 128 + number


async def _until_it_hangs(process: subprocess.Popen[str], make_request: Any) -> Any:
    """Begin a stream, and wait for the step that hangs; the channel and the stream."""
    assert process.stdout
    address = process.stdout.readline().split()[1]
    channel = grpc.aio.insecure_channel(address)
    call = jaxserve_pb2_grpc.JaxserveStub(channel).Generate(make_request(max_tokens=100))
    assert await asyncio.to_thread(process.stdout.readline) == "HANGS\n"
    return channel, call


def test_a_step_that_hangs_fails_the_requests_and_ends_the_process(make_request) -> None:
    async def main(process: subprocess.Popen[str]) -> None:
        channel, call = await _until_it_hangs(process, make_request)
        async with channel:
            with pytest.raises(grpc.aio.AioRpcError, match="a step has not ended"):
                _ = [message async for message in call]
        assert process.wait(PATIENCE) == StepHung.exit_status == 71

    with process_of(HANGING, "step", "--step-timeout", "0.3") as process:
        asyncio.run(main(process))


@pytest.mark.parametrize(
    ("numbers", "status"),
    [((signal.SIGTERM,), 71), ((signal.SIGTERM, signal.SIGINT), 128 + signal.SIGINT)],
)
def test_a_drain_ends_though_a_step_hangs(make_request, numbers, status) -> None:
    async def main(process: subprocess.Popen[str]) -> None:
        channel, _ = await _until_it_hangs(process, make_request)
        async with channel:
            for number in numbers:
                process.send_signal(number)
                await asyncio.sleep(0.1)
            assert await asyncio.to_thread(process.wait, PATIENCE) == status

    grace = "0.1" if len(numbers) == 1 else "1000"
    with process_of(HANGING, "step", "--grace-period", grace) as process:
        asyncio.run(main(process))


def test_a_second_signal_ends_a_process_whose_event_loop_hangs() -> None:
    with process_of(HANGING, "loop") as process:
        assert process.stdout and process.stdout.readline() == "BLOCKED\n"
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.1)  # or the second is the first, for the kernel
        assert process.wait(PATIENCE) == 128 + signal.SIGTERM


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


CROWDED = """
import asyncio, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
from jaxserve.server.security import options
options.OTHER_FILES = int(sys.argv[1])
from jaxserve.server.serve import serve
from jaxserve.server.server import ServerOptions
from jaxserve.testing.fake_engine import fake_engine

asyncio.run(serve(fake_engine, ServerOptions(port=0, http_port=0)))
"""


@pytest.mark.parametrize("other_files", ["64", "0"], ids=["bounded", "exhausted"])
def test_more_clients_than_files(other_files: str) -> None:
    """One that comes before the crowd is served all the while, and the log stays short."""
    with process_of(CROWDED, other_files, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        line = process.stdout.readline().split()
        http = next(part for part in line if part.startswith("http=")).split("=")[1]
        with grpc.insecure_channel(line[1]) as channel, contextlib.ExitStack() as crowd:
            load = jaxserve_pb2_grpc.JaxserveStub(channel).GetLoad
            load(pb.GetLoadRequest(), timeout=PATIENCE)
            for address in (http, line[1]):
                host, port = address.split(":")
                for _ in range(150):
                    client = crowd.enter_context(socket.socket())
                    client.setblocking(False)
                    client.connect_ex((host, int(port)))
                load(pb.GetLoadRequest(), timeout=PATIENCE)
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
        assert process.wait(PATIENCE) == 0
    assert "--max-connections is" in said
    assert "no connection can be taken" in said or other_files == "64"
    assert "Traceback" not in said and len(said) < 8192
