"""gRPC streams whose clients read nothing, cut off after a while."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf.message import Message

from jaxserve.core.errors import StreamStalled

log = logging.getLogger(__name__)

_LONGEST_PERIOD = 1.0


class WatchedContext:
    """A call's context that knows since when a write has been under way.

    A write waits for the client: gRPC takes a message only when the stream has credit left.

    Args:
        context: the call's.
        cutoff: ends what is under way in the call when its time is up.
    """

    def __init__(self, context: grpc.aio.ServicerContext, cutoff: asyncio.Timeout) -> None:
        self._context = context
        self._loop = asyncio.get_running_loop()
        self.cutoff = cutoff
        self.writing_since: float | None = None

    async def write(self, message: Message) -> None:
        """Send a message."""
        self.writing_since = self._loop.time()
        await self._context.write(message)
        self.writing_since = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


class StreamWatch:
    """The open streams of a gRPC server, looked over regularly.

    Args:
        write_timeout: seconds that a message may wait for its client.
    """

    def __init__(self, write_timeout: float) -> None:
        self._write_timeout = write_timeout
        self._open: set[WatchedContext] = set()
        self.num_cut = 0

    @contextlib.asynccontextmanager
    async def watching(self, context: grpc.aio.ServicerContext) -> AsyncIterator[WatchedContext]:
        """Watch a stream: what is inside is cut off when a write takes too long.

        Raises:
            StreamStalled: that happened.
        """
        watched = None
        try:
            async with asyncio.timeout(None) as cutoff:
                watched = WatchedContext(context, cutoff)
                self._open.add(watched)
                yield watched
        except TimeoutError as error:
            if not cutoff.expired():
                raise
            self.num_cut += 1
            raise StreamStalled(
                f"the client has read nothing for {self._write_timeout:g} s"
            ) from error
        finally:
            if watched is not None:
                self._open.discard(watched)

    async def watch(self) -> None:
        """Look the streams over until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(_LONGEST_PERIOD, self._write_timeout / 4))
            now = loop.time()
            for watched in list(self._open):
                since = watched.writing_since
                if since is not None and now - since > self._write_timeout:
                    watched.writing_since = None
                    watched.cutoff.reschedule(now)
