"""A whole server as a process: a thousand clients that stall, and SIGTERM under load."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import grpc
import httpx

from jaxserve.bench.frontend.stalled import WAYS, stalled_clients
from jaxserve.server.security.options import allow_many_files
from jaxserve.server.v1 import jaxserve_pb2 as pb
from jaxserve.server.v1 import jaxserve_pb2_grpc
from tests.waiting import PATIENCE

CHAT = "/v1/chat/completions"
NUM_STALLED = 1001  # each way of stalling as often as the others


class Server(NamedTuple):
    process: subprocess.Popen[str]
    grpc: str
    http: str


@contextlib.contextmanager
def fake_server(*options: str) -> Iterator[Server]:
    command = [sys.executable, "-m", "jaxserve.testing.fake_server", *options]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            words = process.stdout.readline().split()
            named = dict(word.split("=", 1) for word in words[2:])
            yield Server(process, words[1], named["http"])
        finally:
            process.kill()


def num_files(server: Server) -> int:
    """Files and sockets that the server's process has open (Linux)."""
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def body(max_tokens: int) -> dict[str, object]:
    messages = [{"role": "user", "content": "hi"}]
    return {"messages": messages, "max_tokens": max_tokens, "stream": True, "ignore_eos": True}


def request(max_tokens: int) -> pb.GenerateRequest:
    params = pb.SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return pb.GenerateRequest(text="hi", sampling_params=params)


async def over_http(client: httpx.AsyncClient, max_tokens: int, begun: asyncio.Event) -> None:
    """A streamed answer, which must be whole."""
    text = ""
    async with client.stream("POST", CHAT, json=body(max_tokens)) as answer:
        assert answer.status_code == 200
        async for piece in answer.aiter_text():
            begun.set()
            text += piece
    assert text.endswith("data: [DONE]\n\n")
    assert text.count("Z") == max_tokens


async def over_grpc(stub, max_tokens: int, begun: asyncio.Event) -> None:
    """A streamed answer over gRPC, which must be whole."""
    tokens, finish_reason = 0, None
    async for message in stub.Generate(request(max_tokens)):
        begun.set()
        tokens += len(message.token_ids)
        finish_reason = message.finish_reason
    assert (tokens, finish_reason) == (max_tokens, pb.FINISH_REASON_LENGTH)


@contextlib.asynccontextmanager
async def clients(server: Server):
    limits = httpx.Limits(max_connections=None)
    async with (
        grpc.aio.insecure_channel(server.grpc) as channel,
        httpx.AsyncClient(
            base_url=f"http://{server.http}", timeout=PATIENCE, trust_env=False, limits=limits
        ) as client,
    ):
        yield client, jaxserve_pb2_grpc.JaxserveStub(channel)


async def several(client: httpx.AsyncClient, stub) -> None:
    """Whole answers, over both at once."""
    begun = asyncio.Event()
    for _ in range(3):
        await asyncio.gather(over_http(client, 50, begun), over_grpc(stub, 50, begun))


async def assert_nothing_is_left(client: httpx.AsyncClient, stub) -> None:
    while (load := await stub.GetLoad(pb.GetLoadRequest())).num_running:
        await asyncio.sleep(0.05)
    used = load.num_total_pages - load.num_free_pages - load.num_cached_pages
    assert used == load.num_waiting == 0
    assert (await client.get("/health")).status_code == 200


def test_a_thousand_stalled_clients_hold_up_nobody() -> None:
    """None is cut off in this test, however long it takes."""
    allow_many_files()

    async def main(server: Server) -> None:
        async with clients(server) as (client, stub), asyncio.timeout(PATIENCE):
            before = num_files(server)
            async with stalled_clients(NUM_STALLED, server.http, server.grpc):
                await several(client, stub)
                assert num_files(server) > before + NUM_STALLED // 2
            await assert_nothing_is_left(client, stub)

    forever = str(10 * PATIENCE)
    options = ("--rows", "256", "--tokens-per-second", "20000")
    with fake_server(*options, "--read-timeout", forever, "--write-timeout", forever) as server:
        asyncio.run(main(server))


def test_stalled_clients_are_cut_off_and_leave_nothing() -> None:
    """They are still connected when all is over: it is the server that closes."""
    num_stalled = 30 * len(WAYS)

    async def main(server: Server) -> None:
        async with clients(server) as (client, stub), asyncio.timeout(PATIENCE):
            before = num_files(server)
            async with stalled_clients(num_stalled, server.http, server.grpc):
                await several(client, stub)  # who connected before has been accepted by then
                # An idle connection that speaks HTTP/2 may stay; all others are cut off.
                while num_files(server) > before + num_stalled // len(WAYS) + 16:
                    await asyncio.sleep(0.1)
                await several(client, stub)
                await assert_nothing_is_left(client, stub)

    options = ("--rows", "256", "--tokens-per-second", "20000", "--read-timeout", "4")
    with fake_server(*options, "--write-timeout", "4") as server:
        asyncio.run(main(server))


def test_sigterm_under_load_loses_no_accepted_request() -> None:
    async def main(server: Server) -> None:
        async with clients(server) as (client, stub), asyncio.timeout(PATIENCE):
            begun = [asyncio.Event() for _ in range(128)]
            answers = [
                asyncio.create_task(
                    over_http(client, 150, event) if i % 2 else over_grpc(stub, 150, event)
                )
                for i, event in enumerate(begun)
            ]
            for event in begun:
                await event.wait()
            server.process.send_signal(signal.SIGTERM)
            refusals = 0
            while not all(task.done() for task in answers):
                await asyncio.sleep(0.2)
                with contextlib.suppress(httpx.TransportError):
                    answer = await client.post(CHAT, json=body(4))
                    refusals += answer.status_code == 503
            await asyncio.gather(*answers)
            assert refusals
        assert await asyncio.to_thread(server.process.wait, PATIENCE) == 0

    with fake_server("--rows", "128", "--tokens-per-second", "5000") as server:
        asyncio.run(main(server))
