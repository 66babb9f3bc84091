"""The page in a browser that reports all that goes wrong."""

import contextlib
from collections.abc import Iterator

from playwright.sync_api import Browser, BrowserContext, Page

from tests.waiting import PATIENCE

PHONE = {"width": 360, "height": 740}


class Complaints:
    """What a browser complains of, and requests that leave the server.

    Attributes:
        allowed: parts of console messages that the test expects.
    """

    def __init__(self, context: BrowserContext, url: str) -> None:
        self._all: list[str] = []
        self.allowed: list[str] = []
        context.on("console", lambda message: self._console(message.type, message.text))
        context.on("weberror", lambda error: self._all.append(f"uncaught: {error.error}"))
        context.on("request", lambda request: self._request(request.url, url))

    def _console(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self._all.append(f"console: {text}")

    def _request(self, url: str, own: str) -> None:
        if not url.startswith(own):
            self._all.append(f"request: {url}")

    def check(self) -> None:
        """Nothing but what is allowed may have been seen."""
        rest = [text for text in self._all if not any(part in text for part in self.allowed)]
        assert not rest, rest


@contextlib.contextmanager
def opened(browser: Browser, url: str, **options: object) -> Iterator[tuple[Page, Complaints]]:
    """The page at a URL in a fresh context; afterwards there must have been no complaint."""
    context = browser.new_context(**options)  # type: ignore[arg-type]
    context.set_default_timeout(PATIENCE * 1000)
    complaints = Complaints(context, url)
    page = context.new_page()
    page.goto(url)
    try:
        yield page, complaints
        complaints.check()
    finally:
        context.close()
