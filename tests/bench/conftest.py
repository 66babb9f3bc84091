"""A real gRPC server on a thread of its own, with a fake device behind it."""

import contextlib
import gc
from collections.abc import AsyncIterator, Iterator

import pytest

from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.server.server import GrpcServer, ServerOptions
from jaxserve.testing.fake_engine import fake_engine
from tests.server.in_a_thread import in_a_thread


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect() -> Iterator[None]:
    """Benchmarks collect garbage between engines: what was there before need not be looked at."""
    gc.freeze()
    yield
    gc.unfreeze()


@contextlib.asynccontextmanager
async def _serving(engine: AsyncEngine) -> AsyncIterator[GrpcServer]:
    server = GrpcServer(ServerOptions(port=0))
    await server.start()
    await server.attach(engine)
    yield server
    await server.stop(0)


@pytest.fixture(scope="module")
def server_port() -> Iterator[int]:
    """The port of a running server."""
    engine = fake_engine(max_model_len=256, num_pages=1024, step_seconds=0.002)
    with in_a_thread(_serving(engine)) as server:
        yield server.port
    engine.shutdown()
