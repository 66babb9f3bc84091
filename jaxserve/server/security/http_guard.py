"""API keys on HTTP requests, and a bound on their bodies; pure ASGI, so that streams stream."""

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.core.errors import RequestTooLarge
from jaxserve.server.security.caller import calling
from jaxserve.server.security.keys import ApiKeys


class RequireKey:
    """Lets requests pass that bring a known API key, and makes its tenant their caller.

    Args:
        app: what it is around; it must answer `Unauthenticated` further out.
        keys: those that are known.
        open_paths: paths that need no key; one that ends with a slash stands for all below it,
            but `/` for itself.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, open_paths: Collection[str]) -> None:
        self._app = app
        self._keys = keys
        self._open = frozenset(open_paths)
        self._open_folders = tuple(p for p in open_paths if p.endswith("/") and p != "/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Go on to the application, as the key's tenant.

        Raises:
            Unauthenticated: there is no key, or an unknown one.
        """
        path = scope.get("path", "")
        if scope["type"] != "http" or path in self._open or path.startswith(self._open_folders):
            await self._app(scope, receive, send)
            return
        with calling(self._keys.caller(Headers(scope=scope).get("authorization"))):
            await self._app(scope, receive, send)


class LimitBody:
    """Refuses bodies that are too large, by what they say or while they are read.

    Args:
        app: what it is around; `RequestTooLarge` must be answered further out.
        max_bytes: the largest body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Go on to the application.

        Raises:
            RequestTooLarge: the body is too large.
        """
        headers = Headers(scope=scope)
        told = headers.get("content-length", "0")
        if scope["type"] != "http" or (told == "0" and "transfer-encoding" not in headers):
            await self._app(scope, receive, send)
            return
        if told.isdecimal() and int(told[:20]) > self._max_bytes:
            raise self._refusal()
        body = await self._read(receive)
        if body is None:
            return
        whole: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def receive_whole() -> Message:
            nonlocal whole
            if whole is None:
                return await receive()
            message, whole = whole, None
            return message

        await self._app(scope, receive_whole, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body, or None if the client went away. All our routes want it whole."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                raise self._refusal()
            if not message.get("more_body", False):
                return bytes(body)

    def _refusal(self) -> RequestTooLarge:
        return RequestTooLarge(f"the body has more than the {self._max_bytes} bytes allowed")
