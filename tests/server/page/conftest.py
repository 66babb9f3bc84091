"""A server with the page, on a thread and an event loop of its own."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.server.context import ServerContext
from jaxserve.server.http.app import make_app
from jaxserve.server.http.server import HttpServer
from jaxserve.server.security.keys import ApiKeys
from jaxserve.server.server import ServerOptions
from jaxserve.testing.fake_engine import fake_engine


class PageServer:
    """A running server.

    Attributes:
        url: its address, ending in a slash.
        context: whose engine may be set.
    """

    def __init__(self, url: str, context: ServerContext) -> None:
        self.url = url
        self.context = context

    @property
    def engine(self) -> AsyncEngine:
        """The engine behind it."""
        assert self.context.engine is not None
        return self.context.engine

    def get(self, path: str, **options: Any) -> httpx.Response:
        """One answer."""
        return httpx.get(self.url + path, trust_env=False, **options)

    def live(self, since: str = "") -> dict[str, Any]:
        """One snapshot."""
        response = self.get("live", params={"since": since} if since else {})
        assert response.status_code == 200, response.text
        return response.json()

    def chat(self, text: str = "hello", **fields: Any) -> None:
        """One whole answer."""
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, **fields}
        url = self.url + "v1/chat/completions"
        response = httpx.post(url, json={"model": "fake", **body}, trust_env=False)
        assert response.status_code == 200, response.text


@contextlib.contextmanager
def _serving(engine: AsyncEngine | None, keys: ApiKeys | None = None) -> Iterator[PageServer]:
    started, loop = threading.Event(), asyncio.new_event_loop()
    context, end = ServerContext(keys=keys), asyncio.Event()
    context.engine = engine
    server = HttpServer(ServerOptions(http_port=0), make_app(context))

    async def main() -> None:
        await server.start()
        started.set()
        await end.wait()
        await server.stop(0)

    thread = threading.Thread(target=loop.run_until_complete, args=[main()])
    thread.start()
    try:
        assert started.wait(10)
        yield PageServer(f"http://{server.address}/", context)
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join()
        loop.close()


@pytest.fixture
def page_server() -> Iterator[Callable[..., PageServer]]:
    """`page_server(engine_options, keys=...)`; ended with the test.

    None for the options leaves the server without an engine.
    """
    with contextlib.ExitStack() as stack:

        def make(options: dict[str, Any] | None, **more: Any) -> PageServer:
            engine = None
            if options is not None:
                engine = fake_engine(**options)
                stack.callback(engine.shutdown)
            return stack.enter_context(_serving(engine, **more))

        yield make
