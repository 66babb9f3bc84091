"""Passes ended requests on to whoever takes longer over them than the engine can wait."""

import logging
import queue
import threading
from collections.abc import Callable, Sequence

from jaxserve.core.request import Request
from jaxserve.engine.records import RequestRecord, StepRecord, TokenTimes

log = logging.getLogger(__name__)

CAPACITY = 8192

RequestConsumer = Callable[[RequestRecord, Sequence[int]], None]


class RequestFeed:
    """An `EngineObserver` that calls consumers on a thread of its own.

    If they cannot keep up with `CAPACITY` requests, what comes then is lost to them, and a
    warning says how many.

    Args:
        consumers: each is called with a request's record and its prompt's token ids; one that
            raises is logged and called again for the next request.
    """

    def __init__(self, consumers: Sequence[RequestConsumer]) -> None:
        self._consumers = tuple(consumers)
        self._queue: queue.Queue[tuple[RequestRecord, Sequence[int]] | None] = queue.Queue(CAPACITY)
        self._num_lost = 0
        self._thread = threading.Thread(target=self._run, name="jaxserve-requests", daemon=True)
        self._thread.start()

    def step_done(self, step: StepRecord, times: TokenTimes) -> None:
        """Steps are not passed on."""

    def prompt_answered(self, n: int, num_tokens: int) -> None:
        """Neither are prompts."""

    def request_done(self, record: RequestRecord, request: Request) -> None:
        """Pass a request on, or lose it."""
        try:
            self._queue.put_nowait((record, request.prompt_token_ids))
        except queue.Full:
            self._num_lost += 1

    def close(self) -> None:
        """Pass on what is queued and end the thread; call it once the engine has stopped."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            for consume in self._consumers:
                try:
                    consume(*item)
                except Exception:
                    log.exception("request %r could not be passed on", item[0].request_id)
            if self._num_lost:
                lost, self._num_lost = self._num_lost, 0
                log.warning("%d ended requests came too fast to be logged or traced", lost)
