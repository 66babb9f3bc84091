"""How the server's process ends: real signals, hung and failing devices, too many clients."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from jaxserve.core.errors import EngineDead, StepHung
from jaxserve.server.v1 import jaxserve_pb2 as pb
from jaxserve.server.v1 import jaxserve_pb2_grpc
from jaxserve.testing.tiny_model import write_tiny_checkpoint
from tests.waiting import PATIENCE

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


# The command over a real engine with the CPU kernels; a launch fails if its number is given.
REAL = """
import sys, jax
from jaxserve.cli.main import main
from jaxserve.runner.device_runner import DeviceRunner

launch, left = DeviceRunner.launch, [int(sys.argv[1])]

def failing(self, plan):
    left[0] -= 1
    if not left[0]:
        raise jax.errors.JaxRuntimeError("INTERNAL: injected")
    return launch(self, plan)

DeviceRunner.launch = failing
main(["serve", *sys.argv[2:]])
"""
_STREAMS = 6


def _real_server(model: Path, programs: Path, fails_at: int = 0) -> Any:
    return process_of(
        REAL, str(fails_at), str(model), "--port", "0", "--http-port", "0", "--grace-period", "0.2",
        "--num-pages", "1024", "--max-num-batched-tokens", "8", "--max-num-seqs", "8",
        "--token-buckets", "8", "--row-buckets", "8", "--attention-implementation", "cpu",
        "--linear-implementation", "cpu", "--compilation-cache-dir", str(programs),
        stderr=subprocess.PIPE,
    )  # fmt: skip


@contextlib.contextmanager
def _endless_streams(process: subprocess.Popen[str]) -> Iterator[list[socket.socket]]:
    """Streams of which each has begun, and which all go on for thousands of tokens."""
    assert process.stdout
    http = next(p for p in process.stdout.readline().split() if p.startswith("http="))
    host, port = http.removeprefix("http=").split(":")
    body = b'{"prompt": "a", "max_tokens": 8000, "ignore_eos": true, "stream": true}'
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection((host, int(port)), PATIENCE))
            for _ in range(_STREAMS)
        ]
        for client in clients:
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        for client in clients:
            assert b"200 OK" in client.recv(4096)
        yield clients


def _rest_of(client: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionError):
        while piece := client.recv(2**16):
            received += piece
    return received


@pytest.fixture(scope="module")
def endless_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers outlive every grace."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("endless"), max_position_embeddings=2**13)


@pytest.mark.slow
def test_a_drain_cuts_endless_streams_and_ends_well(
    endless_model: Path, program_cache_dir: Path
) -> None:
    with (
        _real_server(endless_model, program_cache_dir) as process,
        _endless_streams(process) as clients,
    ):
        process.send_signal(signal.SIGTERM)
        assert not any(b"[DONE]" in _rest_of(client) for client in clients)
        assert process.stderr and "Traceback" not in process.stderr.read()
        assert process.wait(PATIENCE) == 0


@pytest.mark.slow
def test_a_device_that_fails_ends_the_streams_and_the_process(
    endless_model: Path, program_cache_dir: Path
) -> None:
    with (
        _real_server(endless_model, program_cache_dir, fails_at=50) as process,
        _endless_streams(process) as clients,
    ):
        for client in clients:
            assert b'"error"' in _rest_of(client)
        assert process.stderr
        said = process.stderr.read()
        assert "INTERNAL: injected" in said
        assert process.wait(PATIENCE) == EngineDead.exit_status == 70, said
