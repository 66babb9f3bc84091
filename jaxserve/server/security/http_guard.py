"""API keys on HTTP requests; pure ASGI, so that streams stream."""

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

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
