"""Just enough of HTTP/2 (RFC 9113) to read many gRPC streams at little cost.

A client made of `grpc.aio` takes several times the CPU that the server takes, and would be what is
measured. This one sends requests without compression, grants all the credit there is at once, and
counts tokens.
"""

import asyncio
import struct
from collections.abc import Callable, Sequence

from jaxserve.server.v1 import jaxserve_pb2 as pb

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY = 0, 1, 3, 4, 6, 7
_WINDOW_UPDATE = 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_MAX_WINDOW = 2**31 - 1
_HEAD_BYTES = 9
_PREFIX_BYTES = 5  # of a gRPC message: compressed or not, and its length

OnTokens = Callable[[int], None]


class GrpcStreams(asyncio.Protocol):
    """One connection with a Generate call per request.

    Args:
        requests: what to ask for.
        on_tokens: told how many tokens each message had.

    Attributes:
        num_open: calls that have not ended.
    """

    def __init__(self, requests: Sequence[pb.GenerateRequest], on_tokens: OnTokens) -> None:
        self._requests = requests
        self._on_tokens = on_tokens
        self._buffer = b""
        self._messages: dict[int, bytes] = {}  # by stream: the beginning of a message
        self.num_open = len(requests)
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send everything."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        settings = struct.pack("!HIHI", 4, _MAX_WINDOW, 5, 2**20)  # window, frame size
        transport.write(_PREFACE + _frame(_SETTINGS, 0, 0, settings))
        credit = struct.pack("!I", _MAX_WINDOW - 65_535)
        transport.write(_frame(_WINDOW_UPDATE, 0, 0, credit))
        headers = _headers("/jaxserve.v1.Jaxserve/Generate")
        for i, request in enumerate(self._requests):
            message = request.SerializeToString()
            data = struct.pack("!BI", 0, len(message)) + message
            stream = 2 * i + 1
            transport.write(
                _frame(_HEADERS, _END_HEADERS, stream, headers)
                + _frame(_DATA, _END_STREAM, stream, data)
            )

    def data_received(self, data: bytes) -> None:
        """Take whole frames."""
        buffer = self._buffer + data if self._buffer else data
        at, end = 0, len(buffer)
        while end - at >= _HEAD_BYTES:
            length = int.from_bytes(buffer[at : at + 3], "big")
            after = at + _HEAD_BYTES + length
            if after > end:
                break
            stream = int.from_bytes(buffer[at + 5 : at + 9], "big")
            self._take(buffer[at + 3], buffer[at + 4], stream, buffer[at + _HEAD_BYTES : after])
            at = after
        self._buffer = buffer[at:]

    def connection_lost(self, exc: Exception | None) -> None:
        """All calls have ended."""
        self.num_open = 0

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        assert self.transport is not None
        if kind == _DATA:
            self._take_data(stream, payload)
        elif kind == _SETTINGS and not flags & _ACK:
            self.transport.write(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            self.transport.write(_frame(_PING, _ACK, 0, payload))
        elif kind == _GOAWAY:
            self.transport.close()
        if stream and (kind == _RST_STREAM or (kind in (_DATA, _HEADERS) and flags & _END_STREAM)):
            self.num_open -= 1

    def _take_data(self, stream: int, payload: bytes) -> None:
        buffer = self._messages.pop(stream, b"") + payload
        at = 0
        while len(buffer) - at >= _PREFIX_BYTES:
            after = at + _PREFIX_BYTES + int.from_bytes(buffer[at + 1 : at + 5], "big")
            if after > len(buffer):
                break
            answer = pb.GenerateResponse.FromString(buffer[at + _PREFIX_BYTES : after])
            self._on_tokens(len(answer.token_ids))
            at = after
        if at < len(buffer):
            self._messages[stream] = buffer[at:]


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + struct.pack("!BBI", kind, flags, stream) + payload


def _headers(path: str) -> bytes:
    """A request's header block: every field a literal that is not indexed (RFC 7541, 6.2.2)."""
    fields = (
        (":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "localhost"),
        ("content-type", "application/grpc"), ("te", "trailers"),
    )  # fmt: skip
    return b"".join(
        bytes([0, len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in fields
    )
