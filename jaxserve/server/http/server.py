"""One HTTP server: its life beside the gRPC server's, on the same event loop."""

import asyncio
import contextlib
import errno
import functools
import logging
import math
import socket
from collections.abc import Callable, Iterator
from typing import cast

import uvicorn
from starlette.types import ASGIApp

from jaxserve.core.errors import ConfigError
from jaxserve.server.http.connections import ConnectionLimits, Connections
from jaxserve.server.http.request_forms import UsualForms
from jaxserve.server.server import ServerOptions

log = logging.getLogger(__name__)

_BACKLOG = 2048
# Connections taken in one go. Where there are no files left for any, asyncio tries so many times.
_ACCEPTS = 32
_MAX_HEADER_BYTES = 16 * 1024
_STOP_SECONDS = 0.5
_LAST_RESORT_SECONDS = 10  # for tasks that do not end with their connection


class HttpServer:
    """Serves an ASGI application with uvicorn, until it is stopped.

    Whether there is an engine, and whether it still takes requests, is the application's matter
    (see `ServerContext`); so is waiting for the last answers when draining.

    Args:
        options: where to listen: `host` and `http_port`; with what `tls`; for whom to wait how
            long.
        app: the application.
    """

    def __init__(self, options: ServerOptions, app: ASGIApp) -> None:
        if options.http_port is None:
            raise ConfigError("http_port is off")
        self._options = options
        tls = options.tls
        self._connections = Connections(
            ConnectionLimits(
                max_connections=options.max_connections,
                read_timeout=options.read_timeout,
                write_timeout=options.write_timeout,
            )
        )
        self._watch: asyncio.Task[None] | None = None
        self._server = _Uvicorn(
            read_timeout=options.read_timeout,
            config=uvicorn.Config(
                UsualForms(app),
                http=self._connections.connection,  # type: ignore[arg-type] - as good as a class
                h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
                ssl_context_factory=None if tls is None else lambda *_: tls.ssl_context(),
                proxy_headers=False,  # nothing here goes by the client's address
                lifespan="off",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=_ACCEPTS,
                timeout_graceful_shutdown=_LAST_RESORT_SECONDS + math.ceil(options.grace_period),
            ),
        )
        self._serving: asyncio.Task[None] | None = None
        self.port = options.http_port

    @property
    def address(self) -> str:
        """`host:port` as clients dial it; the real port once started."""
        host = f"[{self._options.host}]" if ":" in self._options.host else self._options.host
        return f"{host}:{self.port}"

    async def start(self) -> None:
        """Open the port and answer.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        family = socket.AF_INET6 if ":" in self._options.host else socket.AF_INET
        try:
            listener = socket.create_server(
                (self._options.host, self.port), family=family, backlog=_BACKLOG
            )
        except OSError as error:
            message = f"cannot serve HTTP on {self.address}: {error}"
            if not (self._options.http_port_may_change and self.port):
                is_taken = error.errno == errno.EADDRINUSE
                hint = "; --http-port 0 takes a free one" if is_taken else ""
                raise ConfigError(message + hint) from error
            log.warning("%s; it takes a free port, unless --http-port names one", message)
            self.port = 0
            return await self.start()
        self.port = listener.getsockname()[1]
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        self._watch = asyncio.create_task(self._connections.watch())
        while not self._server.started and not self._serving.done():
            await asyncio.sleep(0)
        if not self._serving.done():
            listener.listen(_BACKLOG)  # what the kernel keeps, which asyncio takes for the other

    async def stop(self, grace: float = _STOP_SECONDS) -> None:
        """Close the port; answers still under way after `grace` seconds are cut off."""
        if self._serving is None:
            return
        self._server.grace = grace
        self._server.should_exit = True
        await self._serving
        self._serving = None
        if self._watch is not None:
            self._watch.cancel()


class _Uvicorn(uvicorn.Server):
    """uvicorn's server, which leaves signals to us and cuts connections rather than tasks.

    A task that uvicorn cancels is an error in its log, with a traceback for each. One whose
    connection is gone ends as if the client had left.

    Args:
        config: uvicorn's.
        read_timeout: seconds in which a client must have ended a TLS handshake that it began by
            connecting; uvicorn leaves it the 60 of asyncio.
    """

    grace = _STOP_SECONDS

    def __init__(self, config: uvicorn.Config, *, read_timeout: float) -> None:
        super().__init__(config)
        self._read_timeout = read_timeout

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to take connections."""
        config = self.config
        make = cast("Callable[..., asyncio.Protocol]", config.http_protocol_class)
        connection = functools.partial(
            make, config=config, server_state=self.server_state, app_state={}
        )
        limit = None if config.ssl is None else self._read_timeout
        loop = asyncio.get_running_loop()
        self.servers = [
            await loop.create_server(
                connection,
                sock=each,
                ssl=config.ssl,
                backlog=config.backlog,
                ssl_handshake_timeout=limit,
            )
            for each in sockets or []
        ]
        self.started = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, wait for answers under way, cut off what is left."""
        cut = asyncio.get_running_loop().call_later(self.grace, self._cut_off)
        try:
            await super().shutdown(sockets)
        finally:
            cut.cancel()

    def _cut_off(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()
