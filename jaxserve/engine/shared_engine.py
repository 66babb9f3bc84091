"""One engine for callers in any thread, each of whom may be interrupted at any moment.

Ctrl-C, a handler of another signal or another thread can raise an exception between any two
bytecodes of a caller, and an engine whose step was cut there serves no more. So callers never touch
the engine. A thread steps it for all of them, in which nothing is raised from outside; it starts
when somebody asks, and ends when nobody is left. What passes between them passes through C: locks
and queues that are written in Python can be left half-way themselves.
"""

import _thread
import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple, TypeVar

from jaxserve.core.errors import EngineDead, QueueFull
from jaxserve.engine.engine import Engine
from jaxserve.engine.outputs import TokenDelta

log = logging.getLogger(__name__)

SHARED_ENGINE_THREAD = "jaxserve-llm"  # the name of the thread that steps
GLANCE_SECONDS = 0.25  # how often who waits looks for exceptions that other threads raise in it

T = TypeVar("T")


class Ask(NamedTuple):
    """A request's name in the engine, and what queues it there (called with `now=`)."""

    request_id: str
    add: Callable[..., None]


class _Call:
    """What one caller asks for. The engine's thread changes it, but for the caller's presence.

    Attributes:
        presence: held as long as the caller is there; `with` lets it go whatever is raised, and
            how often.
        has_left: the caller says that it is not there any more.
        mailbox: what the caller gets: deltas, or what failed; None: look at `is_over`.
        waiting: requests that are not in the engine yet.
        running: names of those that are.
        unread: deltas that are not in the mailbox yet.
        is_stream: whether the caller wants every delta at once, and no step before it asks again.
        is_due: whether what is unread goes to the mailbox after this step.
        wants: whether the engine is to go on for this caller.
        is_over: whether nothing of it is in the engine any more.
    """

    def __init__(self, asks: Sequence[Ask], is_stream: bool) -> None:
        self.presence = threading.Lock()
        self.has_left = False
        self.mailbox: queue.SimpleQueue[list[TokenDelta] | BaseException | None] = (
            queue.SimpleQueue()
        )
        self.waiting = deque(asks)
        self.running: set[str] = set()
        self.unread: list[TokenDelta] = []
        self.is_stream = is_stream
        self.is_due = False
        self.wants = False
        self.is_over = False


class SharedEngine:
    """Steps an engine for callers in any thread; their requests are in one batch.

    A caller that leaves, for whatever reason, takes its own requests out and nobody else's. The
    engine goes on only as long as somebody waits for it.

    Args:
        engine: nobody else's from now on, but for what is safe to call from any thread.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._working = threading.Lock()  # held by the thread that steps
        self._thread = 0  # its identity
        self._calls: list[_Call] = []
        self._owners: dict[str, _Call] = {}

    # -- callers ------------------------------------------------------------------------------

    def deltas(
        self, asks: Sequence[Ask], *, is_stream: bool = False
    ) -> Generator[TokenDelta, None, None]:
        """Queue requests and yield their deltas as they come, until the last one has ended.

        Closing the iterator aborts what has not ended, and so does every exception, whose `finally`
        should close it. When it is closed, nothing of the requests is in the engine.

        Args:
            asks: the requests. They wait where the engine's queue is full.
            is_stream: yield every delta at once, and let the engine go on for the next one only
                when it is asked for. Otherwise deltas may wait until a request has ended.

        Raises:
            EngineDead: a step has failed before, in another call, or the engine is closed.
            Exception: what failed in a step of this one, or what `Ask.add` raises: then none of
                the requests goes on.
        """
        self._engine.check()
        call, unfinished = _Call(asks, is_stream), len(asks)
        try:
            with call.presence:
                while unfinished:
                    for delta in self._next(call):
                        unfinished -= delta.finish_reason is not None
                        yield delta
        finally:
            if asks:
                self._leave(call)

    def close(self) -> None:
        """End what runs, and close the engine: who waits for it gets EngineDead. Idempotent.

        An exception that is raised here meanwhile does not keep it from closing.
        """
        done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def work() -> None:
            try:
                self._engine.close()
            except BaseException as error:
                done.put(error)
            else:
                done.put(None)

        try:
            _thread.start_new_thread(work, ())
        except RuntimeError:  # the interpreter ends, and starts none any more
            work()
        error = _received(done)
        if error is not None:
            raise error

    def _next(self, call: _Call) -> list[TokenDelta]:
        """The next deltas of a call."""
        try:
            item = call.mailbox.get_nowait()
        except queue.Empty:
            self._tell(call)
            item = _received(call.mailbox)
        if isinstance(item, BaseException):
            raise item
        return item or []

    def _leave(self, call: _Call) -> None:
        """Wait until nothing of a call is in the engine."""
        call.has_left = True
        if not self._engine.is_open:
            return  # the interpreter may be ending, and no thread get anywhere
        self._tell(call)
        if self._thread == threading.get_ident():
            return  # garbage collected on the thread that would be waited for
        while not call.is_over:
            _received(call.mailbox)

    def _tell(self, call: _Call) -> None:
        """Let the engine's thread look at a call: it is new, wants more, or is left."""
        self._inbox.put(call)
        if not self._working.locked():
            thread = threading.Thread(target=self._work, name=SHARED_ENGINE_THREAD, daemon=True)
            # Not on this thread: `start` waits with locks that an interrupt can leave locked.
            _thread.start_new_thread(thread.start, ())

    # -- the engine's thread ------------------------------------------------------------------

    def _work(self) -> None:
        """Serve until nobody is left; one thread at a time."""
        # Asked again after the lock is free: who told before that has started no other thread.
        while not self._inbox.empty() and self._working.acquire(blocking=False):
            self._thread = threading.get_ident()
            try:
                self._serve()
            except BaseException as error:  # whatever it was, nobody may wait for ever
                log.exception("the engine's thread failed")
                self._fail(error)
            finally:
                self._thread = 0
                self._working.release()

    def _serve(self) -> None:
        while True:
            self._listen()
            if not self._calls:
                return
            if any(call.wants for call in self._calls):
                self._step()

    def _listen(self) -> None:
        """Hear who is new, wants more or has left; wait for that if nobody wants anything."""
        waits = bool(self._calls) and not any(call.wants for call in self._calls)
        with contextlib.suppress(queue.Empty):
            while True:
                call = self._inbox.get(block=waits)
                waits = False
                if call.is_over:
                    continue
                if call not in self._calls:
                    self._calls.append(call)
                call.wants = bool(call.running or call.waiting)
        for call in [call for call in self._calls if call.has_left or not call.presence.locked()]:
            self._end(call)

    def _step(self) -> None:
        for call in list(self._calls):
            try:
                self._admit(call)
            except Exception as error:
                self._end(call, error)
        if not self._calls:
            return
        try:
            deltas = self._engine.step(time.monotonic())
        except BaseException as error:
            self._fail(error)
        else:
            self._deliver(deltas)

    def _admit(self, call: _Call) -> None:
        """Queue those requests of a call for which there is room."""
        while call.waiting:
            ask = call.waiting[0]
            try:
                ask.add(now=time.monotonic())
            except QueueFull:
                if not self._engine.has_work:
                    raise
                return
            call.waiting.popleft()
            call.running.add(ask.request_id)
            self._owners[ask.request_id] = call

    def _deliver(self, deltas: Sequence[TokenDelta]) -> None:
        for delta in deltas:
            call = self._owners.get(delta.request_id)
            if call is None:  # its caller has left
                continue
            call.unread.append(delta)
            call.is_due |= call.is_stream
            if delta.finish_reason is not None:
                call.is_due = True
                call.running.remove(delta.request_id)
                del self._owners[delta.request_id]
        for call in self._calls:
            if call.is_due:
                batch, call.unread, call.is_due = call.unread, [], False
                # Before the caller has them, who may want more at once.
                call.wants = not call.is_stream and bool(call.running or call.waiting)
                call.mailbox.put(batch)

    def _end(self, call: _Call, error: BaseException | None = None) -> None:
        """Take a call's requests out of the engine; tell its caller, and why, if it failed."""
        self._calls.remove(call)
        try:
            for request_id in call.running:
                del self._owners[request_id]
                self._engine.abort(request_id)
            while self._engine.has_work and not self._calls:  # a step that was under way
                self._engine.step(time.monotonic())
        finally:
            call.mailbox.put(error)
            call.is_over = True
            call.mailbox.put(None)

    def _fail(self, error: BaseException) -> None:
        """End all calls after a step that failed: the oldest one with that, the others by it."""
        for call in list(self._calls):
            with contextlib.suppress(EngineDead):
                self._end(call, error)
            try:
                self._engine.check()
            except EngineDead as dead:
                error = dead


def _received(mailbox: "queue.SimpleQueue[T]") -> T:
    """What comes next, looking up now and then: exceptions wait for the end of a call into C."""
    while True:
        with contextlib.suppress(queue.Empty):
            return mailbox.get(timeout=GLANCE_SECONDS)
