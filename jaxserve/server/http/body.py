"""Bodies of HTTP requests: bounded, decompressed, and JSON by what they say they are."""

import asyncio
import zlib

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.core.errors import InvalidRequest, RequestTooLarge, UnsupportedMediaType

_ENCODINGS = ("gzip", "deflate")
_ALIASES = {"x-gzip": "gzip"}
_GZIP_BITS, _ZLIB_BITS, _RAW_BITS = 31, 15, -15  # zlib's names for its three containers
_INLINE_BYTES = 2**16  # are inflated in well under a millisecond, if not to the limit


class ReadBody:
    """Reads a request's whole body, which all our routes want, and refuses what is none.

    Args:
        app: what it is around; the errors below must be answered further out.
        max_bytes: the largest body, as it comes and as it is once decompressed.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Go on to the application, with a body that is there and has no encoding.

        Raises:
            RequestTooLarge: the body is too large, by what it says or while it is read.
            UnsupportedMediaType: it does not say that it is JSON, or is encoded otherwise than
                with gzip or deflate.
            InvalidRequest: it cannot be decompressed.
        """
        headers = Headers(scope=scope)
        told = headers.get("content-length", "0")
        if scope["type"] != "http" or (told == "0" and "transfer-encoding" not in headers):
            await self._app(scope, receive, send)
            return
        if scope["method"] == "POST":  # no other method's body is looked at
            _check_type(headers.get("content-type", ""))
        encoding = _encoding_of(headers.getlist("content-encoding"))
        if told.isdecimal() and int(told[:20]) > self._max_bytes:
            raise _too_large(self._max_bytes)
        body = await self._read(receive)
        if body is None:
            return
        if encoding is not None:
            if len(body) > _INLINE_BYTES:
                body = await asyncio.to_thread(inflated, body, encoding, self._max_bytes)
            else:
                body = inflated(body, encoding, self._max_bytes)
            scope = _without_encoding(scope)
        whole: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def receive_whole() -> Message:
            nonlocal whole
            if whole is None:
                return await receive()
            message, whole = whole, None
            return message

        await self._app(scope, receive_whole, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body, or None if the client went away."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                raise _too_large(self._max_bytes)
            if not message.get("more_body", False):
                return bytes(body)


def inflated(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """A compressed body's content; never more than the limit is made of it.

    Args:
        body: as it came.
        encoding: "gzip" or "deflate"; the latter with zlib's header, as HTTP wants it, or without,
            as some send it.
        max_bytes: the most that may come of it.

    Raises:
        RequestTooLarge: there is more.
        InvalidRequest: it is damaged, cut off, or goes on after its end.
    """
    has_header = len(body) > 1 and body[0] & 15 == 8 and int.from_bytes(body[:2]) % 31 == 0
    deflate_bits = _ZLIB_BITS if has_header else _RAW_BITS
    stream = zlib.decompressobj(_GZIP_BITS if encoding == "gzip" else deflate_bits)
    try:
        content = stream.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise InvalidRequest(f"the body is not valid {encoding}: {error}") from error
    if len(content) > max_bytes:
        raise _too_large(max_bytes)
    if not stream.eof or stream.unused_data:
        what = "goes on after its end" if stream.eof else "is cut off"
        raise InvalidRequest(f"the body is not valid {encoding}: it {what}")
    return content


def _check_type(content_type: str) -> None:
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json" and not (
        kind.startswith("application/") and kind.endswith("+json")
    ):
        said = f"not {kind!r}" if kind else "and the request has none"
        raise UnsupportedMediaType(
            f"the body must be JSON: its Content-Type must be application/json, {said}"
        )


def _encoding_of(headers: list[str]) -> str | None:
    """How a body is compressed, by its `Content-Encoding`; None for not at all."""
    names = [name.strip().lower() for header in headers for name in header.split(",")]
    names = [_ALIASES.get(name, name) for name in names if name not in ("", "identity")]
    if not names:
        return None
    if len(names) > 1 or names[0] not in _ENCODINGS:
        raise UnsupportedMediaType(
            f"Content-Encoding: {', '.join(names)} is not read here, only gzip or deflate, once"
        )
    return names[0]


def _without_encoding(scope: Scope) -> Scope:
    dropped = (b"content-encoding", b"content-length", b"transfer-encoding")
    return {**scope, "headers": [pair for pair in scope["headers"] if pair[0] not in dropped]}


def _too_large(max_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(f"the body has more than the {max_bytes} bytes allowed")
