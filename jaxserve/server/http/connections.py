"""HTTP connections that stand still, and how many there may be."""

import asyncio
import dataclasses
import errno
import logging
import socket
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger(__name__)

_LONGEST_PERIOD = 1.0
_TELL_SECONDS = 60.0
_NO_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
# A client that may be gone is asked after this time, then after twice that, and so on.
_FIRST_PROBE_SECONDS = 0.25
_LONGEST_PROBE_SECONDS = 4.0
_PROBE_REPLY_SECONDS = 0.1
_BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n"
    b"connection: close\r\ncontent-length: 91\r\n\r\n"
    b'{"error":{"message":"too many connections","type":"server_error","param":null,"code":null}}'
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """What clients may take their time for.

    Attributes:
        max_connections: open at the same time; more are answered with 503 and closed.
        read_timeout: seconds from a request's first byte, or from connecting, to its last byte.
        write_timeout: seconds in which a client that has something to read must read some of it.
    """

    max_connections: int
    read_timeout: float
    write_timeout: float


class Connections:
    """The open connections of one HTTP server, looked over regularly.

    A stream to a client that does not read costs the bytes of asyncio's write buffer (64 KiB),
    then the application waits; what the engine says meanwhile is merged into one delta. Neither
    that nor a client that never ends its request may last.

    Args:
        limits: what clients may take their time for.
    """

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self.open: set[Connection] = set()
        self.num_cut = 0
        self.num_refused = 0
        self._tell_at = 0.0

    def connection(self, **uvicorns: Any) -> "Connection":
        """A protocol for uvicorn, which calls this for each connection."""
        return Connection(self, **uvicorns)

    async def watch(self) -> None:
        """Look the connections over until cancelled."""
        shortest = min(self.limits.read_timeout, self.limits.write_timeout)
        period = min(_LONGEST_PERIOD, shortest / 4)
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(period)
            self.look_over(loop.time())

    def tell_refusal(self) -> None:
        """Log that there are too many connections; once in a while, not for each."""
        self.num_refused += 1
        now = time.monotonic()
        if now >= self._tell_at:
            self._tell_at = now + _TELL_SECONDS
            most = self.limits.max_connections
            log.warning("there are %d connections already: refused %d", most, self.num_refused)

    def look_over(self, now: float) -> None:
        """Cut off who has stood still for too long."""
        for connection in list(self.open):
            reason = connection.standstill(now)
            if reason:
                log.info("cut off %s: %s", connection.client, reason)
                self.num_cut += 1
                connection.transport.abort()


class AcceptErrors:
    """An event loop's exception handler, to which having no files left is one line at times.

    asyncio tries again after a second, and tells of every single failure with a traceback.
    """

    def __init__(self) -> None:
        self._tell_at = 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Handle what asyncio tells."""
        error = context.get("exception")
        if isinstance(error, ValueError) and str(error) == "Invalid file descriptor: -1":
            return  # asyncio's next try, with a port that was closed meanwhile
        if not (isinstance(error, OSError) and error.errno in _NO_FILES):
            loop.default_exception_handler(context)
        elif loop.time() >= self._tell_at:
            self._tell_at = loop.time() + _TELL_SECONDS
            log.error("no connection can be taken: %s (ulimit -n)", error.strerror)


class _CountedTransport(asyncio.Transport):
    """A transport that knows how much was written to it."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__()
        self._transport = transport
        self.num_written = 0
        # Bound once: every event of every stream goes through here.
        self._write = transport.write

    @property
    def num_read(self) -> int:
        """Bytes that the client, or the kernel on its behalf, has taken."""
        return self.num_written - self._transport.get_write_buffer_size()

    @property
    def is_behind(self) -> bool:
        """Whether there is something left that the client has not taken."""
        return self._transport.get_write_buffer_size() > 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.num_written += len(data)
        self._write(data)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()


class Connection(H11Protocol):
    """uvicorn's protocol, which knows since when its client has stood still.

    Args:
        connections: those of the server.
        uvicorns: uvicorn's own arguments.
    """

    def __init__(self, connections: Connections, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._others = connections
        self._is_refused = False
        self._state: tuple[str, object] = ("", None)
        self._since = 0.0  # it has been in that state
        self._num_read = 0
        self._has_ended = False  # the client's half: no more requests than have come
        self._probe_pause = _FIRST_PROBE_SECONDS
        self._next_probe = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, unless there are too many."""
        self.transport: _CountedTransport = _CountedTransport(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            # asyncio does so only for sockets whose protocol number was named. Without it, small
            # writes wait for the acknowledgement of the one before, which takes clients 40 ms.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        others, limits = self._others.open, self._others.limits
        self._is_refused = len(others) >= limits.max_connections
        others.add(self)
        if self._is_refused:
            self._others.tell_refusal()
            self.transport.write(_BUSY)
            self.transport.close()
        else:
            super().connection_made(self.transport)

    def data_received(self, data: bytes) -> None:
        """Take bytes of a request; empty lines before one are skipped (RFC 9112, 2.2)."""
        if self._is_refused:
            return
        if data[:1] in (b"\r", b"\n") and self._is_between_requests():
            data = data.lstrip(b"\r\n")
        if data:
            super().data_received(data)

    def _is_between_requests(self) -> bool:
        """Whether nothing of a request has come yet, not even of one that waits for its turn."""
        is_between = self.conn.their_state in (h11.IDLE, h11.DONE)
        return is_between and not self.conn.trailing_data[0]

    def _unsupported_upgrade_warning(self) -> None:
        """An `Upgrade` is passed over in silence, as RFC 9110 (7.8) allows, and the request served.

        uvicorn would log two warnings for each.
        """

    def eof_received(self) -> bool:
        """The client has no more to say; it may still want its answer.

        A client that has shut down only its own half of the connection (`shutdown(SHUT_WR)`)
        looks the same as one that is gone until something is written to it; see `_probe`.

        Returns:
            Whether to keep the other half open; with TLS, asyncio cannot.
        """
        stays = self._owes_answer() and self.scheme == "http"
        if stays and not self._has_ended:
            self._next_probe = self.loop.time() + self._probe_pause
            self.loop.call_later(_PROBE_REPLY_SECONDS, self._probe)
        self._has_ended = True
        return stays

    def on_response_complete(self) -> None:
        """Go on to the next request that has come, if any."""
        super().on_response_complete()
        if not self._has_ended:
            return
        if self._owes_answer():
            self._probe()
        else:
            self.transport.close()

    def _probe(self) -> None:
        """Find out, until the answer begins, whether a client that ended its half is still there.

        What is written to one that is gone comes back as a reset of the connection. An answer's
        own bytes do that; before them, HTTP has interim responses, of which there may be any
        number and which every HTTP/1.1 client skips.
        """
        cycle, transport = self.cycle, self.transport
        if transport.is_closing() or not self._owes_answer() or cycle.response_started:
            return
        if transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            transport.abort()
            return
        now = self.loop.time()
        if now >= self._next_probe and cycle.scope["http_version"] == "1.1":
            self._probe_pause = min(2 * self._probe_pause, _LONGEST_PROBE_SECONDS)
            self._next_probe = now + self._probe_pause
            interim = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
            transport.write(self.conn.send(interim))
        self.loop.call_later(_PROBE_REPLY_SECONDS, self._probe)

    def _owes_answer(self) -> bool:
        """Whether a whole request is there that is not yet answered to its end."""
        cycle = self.cycle
        return cycle is not None and not cycle.response_complete and not cycle.more_body

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._others.open.discard(self)
        if not self._is_refused:
            super().connection_lost(exc)

    def standstill(self, now: float) -> str | None:
        """Why the client is to be cut off, if it is; to be asked regularly.

        Args:
            now: seconds, on the event loop's clock.
        """
        limits, state = self._others.limits, self._current_state()
        if state != self._state:
            self._state, self._since = state, now
            self._num_read = self.transport.num_read
        elif state[0] == "reading" and self.transport.num_read > self._num_read:
            self._since, self._num_read = now, self.transport.num_read
        stood = now - self._since
        if state[0] == "reading" and stood > limits.write_timeout:
            return f"it has read nothing for {stood:.1f} s"
        if state[0] == "asking" and stood > limits.read_timeout:
            return f"its request is incomplete after {stood:.1f} s"
        return None

    def _current_state(self) -> tuple[str, object]:
        """What the client is about to do, if it is its turn; in which request."""
        if self.transport.is_behind:
            return ("reading", None)
        # Between requests uvicorn's own timer runs as well, but only until the next byte.
        if self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
            return ("asking", self.cycle)
        return ("listening", self.cycle)
