"""A server with the page, on a thread and an event loop of its own."""

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
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
from tests.server.in_a_thread import in_a_thread


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


@contextlib.asynccontextmanager
async def _serving(
    engine: AsyncEngine | None, keys: ApiKeys | None = None
) -> AsyncIterator[PageServer]:
    context = ServerContext(keys=keys)
    context.engine = engine
    server = HttpServer(ServerOptions(http_port=0), make_app(context))
    await server.start()
    yield PageServer(f"http://{server.address}/", context)
    await server.stop(0)


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
            return stack.enter_context(in_a_thread(_serving(engine, **more)))

        yield make
