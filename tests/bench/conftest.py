"""A real gRPC server on a thread of its own, with a fake device behind it."""

import asyncio
import threading
from collections.abc import Iterator

import pytest

from jaxserve.cache.page_pool import PagePool
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.engine import Engine
from jaxserve.engine.outputs import ModelInfo
from jaxserve.scheduling.policies import make_policy
from jaxserve.scheduling.scheduler import Scheduler
from jaxserve.server.server import GrpcServer, ServerOptions
from jaxserve.testing.byte_tokenizer import ByteTokenizer
from jaxserve.testing.fake_executor import FakeExecutor, FakeModel

MAX_MODEL_LEN = 256


def build_engine() -> AsyncEngine:
    """An engine with a context of 256 tokens whose steps take two milliseconds."""
    page_size, budget, max_num_seqs, num_pages = 4, 128, 16, 1024
    tokenizer = ByteTokenizer()
    scheduler = Scheduler(
        page_pools=[PagePool(num_pages)],
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=MAX_MODEL_LEN,
        max_waiting=1000,
        policy=make_policy("fcfs"),
    )
    info = ModelInfo(
        name="fake",
        family="hash",
        max_model_len=MAX_MODEL_LEN,
        vocab_size=tokenizer.vocab_size,
        num_layers=1,
        dtype="int32",
        mesh="data=1,tensor=1",
        attention_implementation="none",
        page_size=page_size,
        num_pages=num_pages,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        platform="fake",
        eos_token_ids=tokenizer.eos_token_ids,
    )
    model = FakeModel(vocab_size=tokenizer.vocab_size)
    executor = FakeExecutor(page_size=page_size, model=model, step_seconds=0.002)
    return AsyncEngine(Engine(scheduler, executor, tokenizer, info))


@pytest.fixture(scope="module")
def server_port() -> Iterator[int]:
    """The port of a running server."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    engine = build_engine()

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
