"""Server-sent events: an answer piece by piece, with its client watched."""

import contextlib
import logging
from collections.abc import Mapping
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxserve.core.errors import JaxserveError
from jaxserve.engine.outputs import TokenDelta
from jaxserve.server.http.errors import error_body
from jaxserve.server.http.generation import Generation, until_disconnect

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventWriter(Protocol):
    """Turns deltas into the bytes of events. Called for every token: it should be quick."""

    def push(self, choice: int, delta: TokenDelta) -> bytes:
        """The events that a delta makes; empty for none."""
        ...

    def finish(self) -> bytes:
        """The events after the last delta."""
        ...

    def fail(self, error: JaxserveError) -> bytes:
        """The last event of a stream that ends early."""
        ...


def error_event(error: JaxserveError) -> bytes:
    """An error as the last event of a chat or completion."""
    return b"data: " + error_body(error) + b"\n\n"


class EventStream(Response):
    """Sends a generation as server-sent events; ends it when the client goes away.

    An error on the way becomes a last event, since the status is long sent.

    Args:
        generation: closed in any case.
        writer: makes the events.
        headers: more headers.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        generation: Generation,
        writer: EventWriter,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(headers={**_HEADERS, **(headers or {})})
        del self.headers["content-length"]
        self._generation = generation
        self._writer = writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as an ASGI application."""
        try:
            await until_disconnect(receive, self._send_all(send))
        finally:
            await self._generation.aclose()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        push = self._writer.push
        try:
            async with contextlib.aclosing(self._generation) as deltas:
                async for choice, delta in deltas:
                    events = push(choice, delta)
                    if events:
                        await send(
                            {"type": "http.response.body", "body": events, "more_body": True}
                        )
            last = self._writer.finish()
        except JaxserveError as error:
            log.info("a stream ended early: %s", error)
            last = self._writer.fail(error)
        await send({"type": "http.response.body", "body": last, "more_body": False})
