"""Requests in forms that HTTP allows and routes do not know."""

from urllib.parse import unquote

from starlette.types import ASGIApp, Receive, Scope, Send

_SCHEMES = ("http://", "https://")


class UsualForms:
    """Brings requests into the form that routes know.

    HEAD is answered as GET; the server leaves the body out. A target in absolute form
    (`GET http://host/path`, which proxies send and every server has to take) becomes its path.

    Args:
        app: what it is around: everything that looks at method or path.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Go on to the application."""
        if scope["type"] == "http":
            changes: dict[str, object] = {}
            if scope["method"] == "HEAD":
                changes["method"] = "GET"
            if scope["path"].lower().startswith(_SCHEMES):
                raw = _path_of(scope["raw_path"])
                changes.update(raw_path=raw, path=unquote(raw.decode("ascii")))
            if changes:
                scope = {**scope, **changes}
        await self._app(scope, receive, send)


def _path_of(target: bytes) -> bytes:
    """What comes after the host in an absolute target without its query."""
    _, _, rest = target.partition(b"://")
    return b"/" + rest.partition(b"/")[2]
