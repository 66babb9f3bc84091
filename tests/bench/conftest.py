"""A real gRPC server on a thread of its own, with a fake device behind it."""

import asyncio
import threading
from collections.abc import Iterator

import pytest

from jaxserve.server.server import GrpcServer, ServerOptions
from jaxserve.testing.fake_engine import fake_engine


@pytest.fixture(scope="module")
def server_port() -> Iterator[int]:
    """The port of a running server."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    engine = fake_engine(max_model_len=256, num_pages=1024, step_seconds=0.002)

    async def start() -> GrpcServer:
        server = GrpcServer(ServerOptions(port=0))
        await server.start()
        await server.attach(engine)
        return server

    server = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    yield server.port
    asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(10)
    engine.shutdown()
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()
