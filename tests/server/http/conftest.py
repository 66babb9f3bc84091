"""A real HTTP server over a real engine whose device is a hash function."""

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any

import httpx
import openai
import pytest
from fastapi import APIRouter
from starlette.middleware import Middleware

from jaxserve.core.request import Request
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.server.context import ServerContext
from jaxserve.server.http.app import make_app
from jaxserve.server.http.server import HttpServer
from jaxserve.server.limits import RequestLimits
from jaxserve.server.server import ServerOptions
from jaxserve.testing.echo_model import EchoModel
from jaxserve.testing.fake_engine import fake_engine
from jaxserve.testing.fake_executor import FakeModel
from tests.server.in_a_thread import in_a_thread
from tests.waiting import PATIENCE

MODEL = FakeModel(vocab_size=256)  # bytes only: no answer ends by chance


@dataclasses.dataclass
class Serving:
    """A running server and a client of it."""

    server: HttpServer
    context: ServerContext
    client: httpx.AsyncClient

    async def post(self, path: str, body: dict[str, Any], **options: Any) -> httpx.Response:
        """One answer."""
        return await self.client.post(path, json=body, **options)

    async def refusal(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and error object of a request that must fail."""
        response = await self.post(path, body)
        assert response.status_code >= 400, response.text
        return response.status_code, response.json()["error"]

    async def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The parsed events of a stream, which must end as OpenAI's do; not its [DONE]."""
        response = await self.post(path, {"stream": True, **body})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        return parsed_events(response.text)


def parsed_events(text: str) -> list[Any]:
    """The objects of a stream's events."""
    assert text.endswith("\n\n")
    lines = text[:-2].split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@contextlib.asynccontextmanager
async def _serving(
    engine: AsyncEngine | None,
    *,
    limits: RequestLimits | None = None,
    parsers: Mapping[str, Any] | None = None,
    routers: Sequence[APIRouter] = (),
    middlewares: Sequence[Middleware] = (),
    **options: Any,
) -> AsyncIterator[Serving]:
    context = ServerContext(limits, **(parsers or {}))
    context.engine = engine
    app = make_app(context, routers=routers, middlewares=middlewares)
    server = HttpServer(ServerOptions(**{"http_port": 0, **options}), app)
    await server.start()
    try:
        url = f"http://{server.address}"
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, trust_env=False) as client:
            yield Serving(server, context, client)
    finally:
        await server.stop(0)


@pytest.fixture
def make_engine() -> Iterator[Callable[..., AsyncEngine]]:
    """`fake_engine`, with every engine shut down at the end of the test."""
    engines: list[AsyncEngine] = []

    def make(**options: Any) -> AsyncEngine:
        engines.append(fake_engine(**{"model": MODEL, **options}))
        return engines[-1]

    yield make
    for engine in engines:
        engine.shutdown()


@pytest.fixture
def serving() -> Callable[..., contextlib.AbstractAsyncContextManager[Serving]]:
    """`async with serving(engine, limits=, parsers=, routers=, ..., **ServerOptions) as s`."""
    return _serving


@pytest.fixture
def expected() -> Callable[..., list[int]]:
    """The greedy answer to a prompt, computed without server, scheduler and pages."""

    def oracle(prompt: list[int], max_tokens: int) -> list[int]:
        params = SamplingParams(temperature=0)
        return MODEL.generate(
            Request(
                request_id="oracle", prompt_token_ids=prompt, params=params, max_tokens=max_tokens
            )
        )

    return oracle


@pytest.fixture
def wait_idle() -> Callable[..., object]:
    """`await wait_idle(engine)`: until no request is left, then all pages must be back."""

    async def wait(engine: AsyncEngine) -> None:
        async with asyncio.timeout(PATIENCE):
            while (load := engine.load()).num_running + load.num_waiting:
                await asyncio.sleep(0.002)
        assert load.num_used_pages == 0

    return wait


@contextlib.contextmanager
def running_in_a_thread(engine: AsyncEngine, **options: Any) -> Iterator[str]:
    """A server on an event loop of its own, for clients that block; gives its base URL."""
    with in_a_thread(_serving(engine, **options)) as s:
        yield f"http://{s.server.address}"


@pytest.fixture(scope="session")
def serve_in_a_thread() -> Callable[..., contextlib.AbstractContextManager[str]]:
    """`with serve_in_a_thread(engine, parsers=, ...) as base_url`."""
    return running_in_a_thread


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    """The address of a server that runs throughout the module."""
    engine = fake_engine(model=MODEL)
    with running_in_a_thread(engine) as url:
        yield url
    engine.shutdown()


@pytest.fixture(scope="module")
def echo_client() -> Iterator[Callable[[int], openai.OpenAI]]:
    """`echo_client(max_model_len)`: OpenAI's, of a server that says what it is told to.

    Thoughts and tool calls are read as Qwen writes them. Ended with the module.
    """
    with contextlib.ExitStack() as stack:

        def make(max_model_len: int) -> openai.OpenAI:
            engine = fake_engine(model=EchoModel(), num_pages=4096, max_model_len=max_model_len)
            stack.callback(engine.shutdown)
            parsers = {"tool_call_parser": "hermes", "reasoning_parser": "think"}
            url = stack.enter_context(running_in_a_thread(engine, parsers=parsers))
            made = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            return stack.enter_context(made)

        yield make
