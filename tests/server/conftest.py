"""A real server over a real engine whose device is a hash function."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jaxserve.core.request import Request
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.outputs import EngineLoad
from jaxserve.server.context import ServerContext
from jaxserve.server.server import GrpcServer, ServerOptions
from jaxserve.server.v1 import jaxserve_pb2 as pb
from jaxserve.server.v1 import jaxserve_pb2_grpc
from jaxserve.testing.fake_engine import fake_engine
from jaxserve.testing.fake_executor import FakeModel
from tests.waiting import PATIENCE

MODEL = FakeModel(vocab_size=256)  # bytes only: no answer ends by chance


def oracle(prompt: list[int], max_tokens: int) -> list[int]:
    """The greedy answer to a prompt, computed without server, scheduler and pages."""
    params = SamplingParams(temperature=0)
    request = Request(
        request_id="oracle", prompt_token_ids=prompt, params=params, max_tokens=max_tokens
    )
    return MODEL.generate(request)


@pytest.fixture
def make_engine() -> Iterator[Callable[..., AsyncEngine]]:
    """`fake_engine`, with every engine shut down at the end of the test."""
    engines: list[AsyncEngine] = []

    def make(**options: Any) -> AsyncEngine:
        engines.append(fake_engine(model=MODEL, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.shutdown()


@dataclasses.dataclass
class Serving:
    """A running server and a client of it."""

    server: GrpcServer
    channel: grpc.aio.Channel
    stub: jaxserve_pb2_grpc.JaxserveStub
    health_stub: Any  # grpc_health has no types

    async def health(self, service: str = "") -> str:
        """The health status's name."""
        answer = await self.health_stub.Check(health_pb2.HealthCheckRequest(service=service))
        return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)

    async def ask(self, request: pb.GenerateRequest, **call: float) -> list[pb.GenerateResponse]:
        """All messages of one Generate stream."""
        return [message async for message in self.stub.Generate(request, **call)]

    async def refusal(self, request: pb.GenerateRequest) -> tuple[grpc.StatusCode, str]:
        """Status and details of a Generate call that must fail."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.ask(request)
        return caught.value.code(), caught.value.details() or ""


@contextlib.asynccontextmanager
async def _serving(
    engine: AsyncEngine | None,
    channel_options: Any = (),
    context: ServerContext | None = None,
    **options: Any,
) -> AsyncIterator[Serving]:
    server = GrpcServer(ServerOptions(**{"port": 0, **options}), context)
    await server.start()
    try:
        if engine is not None:
            await server.attach(engine)
        async with grpc.aio.insecure_channel(server.address, options=channel_options) as channel:
            stub = jaxserve_pb2_grpc.JaxserveStub(channel)
            yield Serving(server, channel, stub, health_pb2_grpc.HealthStub(channel))
    finally:
        await server.stop(0)


@pytest.fixture(scope="session")
def serving() -> Callable[..., contextlib.AbstractAsyncContextManager[Serving]]:
    """`async with serving(engine, channel_options, context, **ServerOptions) as s`."""
    return _serving


@pytest.fixture
def make_request() -> Callable[..., pb.GenerateRequest]:
    """A greedy GenerateRequest for token ids; other fields by keyword."""

    def make(
        ids: list[int] | None = None, max_tokens: int = 8, **fields: Any
    ) -> pb.GenerateRequest:
        params = pb.SamplingParams(temperature=0, max_tokens=max_tokens)
        if not {"text", "chat"} & set(fields):
            fields["token_ids"] = pb.TokenIds(ids=[1, 2, 3] if ids is None else ids)
        return pb.GenerateRequest(**{"sampling_params": params, **fields})

    return make


@pytest.fixture
def expected() -> Callable[[list[int], int], list[int]]:
    """`oracle`."""
    return oracle


async def _wait_for(
    engine: AsyncEngine, condition: Callable[[EngineLoad], bool], seconds: float = PATIENCE
) -> EngineLoad:
    async with asyncio.timeout(seconds):
        while not condition(load := engine.load()):
            await asyncio.sleep(0.002)
    return load


@pytest.fixture
def wait_for() -> Callable[..., object]:
    """`await wait_for(engine, condition)`: the first load that fulfils a condition."""
    return _wait_for


@pytest.fixture
def wait_idle() -> Callable[..., object]:
    """`await wait_idle(engine)`: until no request is left, then all pages must be back."""

    async def wait(engine: AsyncEngine) -> None:
        load = await _wait_for(engine, lambda load: not load.num_running + load.num_waiting)
        assert load.num_used_pages == 0

    return wait
